"""Ablate every head in turn: the next-token loss of a model without it.

1. Run a batch of prompts once and keep the residual stream before every block.
2. A head of layer l changes nothing below l. So for each layer, copy the kept residual stream once
   for each of its heads, and run the blocks from l on with one head replaced in each copy: half the
   blocks on average, and few large products instead of many small ones.
3. A head's output is replaced by zero, by its mean over positions, or by that on another prompt
   (Wang et al. 2022, "Interpretability in the Wild", arXiv 2211.00593, on mean ablation). Zero
   exaggerates, since later layers rely on a head's average; see `interventions.AblateHeads`,
   which does the same in whole forward passes. Or it is replaced by its own output when it attends
   to the first tokens and a window only (`interventions.WindowedAttention`). A head whose loss does
   not rise then needs no other keys, which is what DuoAttention (Xiao et al. 2024, arXiv
   2410.10819) determines for each head; its gates are trained, for all heads at once, whereas this
   is the effect of restricting a single head.
4. The effect of a head is the loss without it minus the baseline loss, prompt by prompt, with a
   bootstrap interval over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture import batches
from sinkscope.devices import in_pieces
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.partial_forward import Hooks, Partway, Track, with_predictions
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.interventions.base import check_indices, check_layers, check_mode
from sinkscope.interventions.calibration import mean_output
from sinkscope.interventions.window import WindowedAttention
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.capabilities import Capabilities
from sinkscope.models.load import load_model
from sinkscope.models.provenance import digest
from sinkscope.models.rope import length_class
from sinkscope.output import listed, number
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.renamed import attribute
from sinkscope.statistics import Interval, bootstrap, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MODES = ("zero", "mean", "resample")
"""Replacements for an ablated head's output."""
WINDOW = "window"
"""The mode in which a head is not replaced but attends to fewer keys."""
_TOKENS = {"cuda": 2**16, "cpu": 2**12}
"""Tokens of one forward pass, copies counted."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Ablation(Result):
    """The loss with all heads, and without each of them.

    Attributes:
        mode: Replacement of the head's output, of `MODES` or `WINDOW`.
        texts: Source of the prompts.
        loss: Baseline: mean next-token loss of each prompt [nat]; nan where no head was ablated.
        ablated_loss: The same without the head; nan where it was not ablated.
    """

    QUESTION = "What does ablating a head cost?"

    mode: str
    texts: str
    loss: Float[Tensor, "prompt"]
    ablated_loss: Float[Tensor, "prompt layer head"]

    loss_without = attribute("loss_without", "ablated_loss")

    @property
    def loss_change(self) -> Float[Tensor, "prompt layer head"]:
        """Effect of ablating each head: ablated loss minus baseline loss [nat]."""
        return self.ablated_loss - self.loss[:, None, None]

    def interval(self, level: float = 0.95) -> Interval:
        """Mean loss change of each head over prompts, with its bootstrap interval [layer head].

        Args:
            level: Probability between the ends.
        """
        return bootstrap(self.loss_change, level)

    def to_frame(self) -> pd.DataFrame:
        """One row per ablated head.

        Returns:
            domain (the texts), layer, head, mode; loss_change with the ends of its 95 % interval
            in loss_change_low and loss_change_high [nat].
        """
        mean, low, high = self.interval()
        layers, heads = mean.shape
        axes = {"domain": [self.texts], "layer": range(layers), "head": range(heads)}
        frame = tidy(
            axes, mode=self.mode, loss_change=mean, loss_change_low=low, loss_change_high=high
        )
        return frame.dropna(subset="loss_change", ignore_index=True)

    def statistics(self) -> dict[str, Any]:
        """The baseline loss, and the distribution of the effects over heads.

        Returns:
            mode; loss (baseline, with its interval); heads (how many were ablated); median_cost;
            most_costly (the five heads with the largest mean loss change); significant and
            harmful: for how many heads the 95 % interval of the loss change lies above 0 (ablation
            raises the loss) and below 0 (ablation lowers it).
        """
        mean, low, high = (end.flatten() for end in self.interval())
        cost = mean[~mean.isnan()]
        heads = self.ablated_loss.shape[2]
        largest = mean.nan_to_num(-torch.inf).argsort(descending=True)[: min(5, len(cost))]
        return {
            "mode": self.mode,
            "loss": estimate(self.loss),
            "heads": len(cost),
            "median_cost": float(cost.quantile(0.5)) if len(cost) else float("nan"),
            "most_costly": [
                {"layer": at // heads, "head": at % heads, "loss_change": float(mean[at])}
                for at in largest.tolist()
            ],
            "significant": int((low > 0).sum()),
            "harmful": int((high < 0).sum()),
        }

    def summary(self) -> str:
        """Baseline loss, median and largest effects, and how many are significant."""
        facts = self.statistics()
        most = [
            f"layer {head['layer']} head {head['head']} ({number(head['loss_change'])})"
            for head in facts["most_costly"]
        ]
        return (
            f"The baseline loss is {facts['loss']} nat. Ablating one of {facts['heads']} heads "
            f"({self.mode}) changes it by {number(facts['median_cost'])} nat in the median. "
            f"The loss is highest without {listed(most)}. Ablation significantly raises the "
            f"loss for {facts['significant']} heads and significantly lowers it for "
            f"{facts['harmful']} (95 % intervals over prompts, head by head)."
        )

    def figures(self) -> dict[str, go.Figure]:
        """No figures; see `Dormancy.figures` for effects against sink attention."""
        return {}


def ablate_heads(
    model: Any,
    texts: Any,
    mode: str = "zero",
    *,
    heads: Iterable[tuple[int, int]] | Bool[Tensor, "prompt layer head"] | None = None,
    calibration: Any = None,
    window: int = 64,
    sinks: int = 1,
    seed: int = 0,
    batch: int | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> Ablation:
    """Ablate every head in turn, and measure the loss without it.

    Args:
        model: A bridge, or anything that `load_model` takes; active interventions stay active.
        texts: Prompts.
        mode: Replacement of a head's output before W_O: "zero"; "mean", its mean over the
            calibration texts' positions; "resample", its output at the same position of another
            prompt; "window", its output when it attends to the first tokens and a window only.
        heads: (layer, head) pairs, or which heads on which prompts [prompt layer head]; all by
            default.
        calibration: Texts for "mean" and "resample"; by default the prompts themselves, of which
            "resample" never takes a prompt's own.
        window: For "window", how many keys up to and including the query's own stay [tokens].
        sinks: For "window", how many of the first tokens stay [tokens].
        seed: Seed of the draws.
        batch: Prompts per batch; by default as many as fit on the device. If memory runs out, fewer
            copies run at once.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        The baseline loss and the loss without each head, prompt by prompt.

    Raises:
        UnsupportedError: If the model has no loss, if starting at a later block is not exact for
            it, or if a head does not exist.
        TextError: If a prompt has a single token, or ends before a position that an intervention
            changes; or "resample" gets prompts of several lengths, or a single prompt.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.
    """
    model = load_model(model)
    file = kept_in(file, model)
    partway = Partway(model)
    caps = partway.caps
    prompts = with_predictions(as_texts(texts).tokenize(model).right_padded())
    refuse_short_prompts(model, prompts.mask)
    check_mode(mode, (*MODES, WINDOW))
    restricted = {"window": window, "sinks": sinks} if mode == WINDOW else {}
    shape = len(prompts), caps.n_layers, caps.n_heads
    wanted = _wanted(heads, shape, caps)
    stand_in = None if calibration is None else as_texts(calibration).tokenize(model)
    request = {}
    if file is not None:
        drawn_from = None if stand_in is None else digest(stand_in)
        request = request_of(
            model, prompts, mode=mode, seed=seed, calibration=drawn_from, **restricted
        )
    empty = Ablation(
        about=about(model, prompts),
        mode=mode,
        texts=prompts.source,
        loss=torch.full((len(prompts),), torch.nan),
        ablated_loss=torch.full(shape, torch.nan),
    )
    with Kept(Ablation, file, request) as kept, partway.opened():
        result = kept.found or empty
        run = _Run(partway, prompts, mode, stand_in, seed, batch, restricted)
        run.fill(result, wanted, lambda: kept.grew(result), progress)
    return result


def _wanted(
    heads: Iterable[tuple[int, int]] | Tensor | None,
    shape: tuple[int, int, int],
    caps: Capabilities,
) -> Bool[Tensor, "prompt layer head"]:
    """Return which heads are ablated on which prompts; by default those of every attention layer.

    Raises:
        UnsupportedError: If one does not exist, or there are none.
    """
    attends = torch.zeros(shape[1], dtype=torch.bool)
    attends[list(caps.attending)] = True
    if isinstance(heads, Tensor):
        if heads.shape != shape:
            raise UnsupportedError(
                f"heads is {tuple(heads.shape)}, which is not [prompt layer head] = {shape}."
            )
        elsewhere = (heads.cpu().any(dim=2).any(dim=0) & ~attends).nonzero()
        if len(elsewhere):
            raise caps.no_attention(int(elsewhere[0]))
        return heads.cpu()
    wanted = attends[:, None].expand(shape).clone() & (heads is None)
    for pair in heads or ():
        try:
            layer, head = pair
        except (TypeError, ValueError):
            raise UnsupportedError(
                f"heads takes pairs (layer, head), such as (5, 7), not {pair!r}."
            ) from None
        check_layers(layer, shape[1])
        check_indices(head, shape[2], "head")
        if not attends[layer]:
            raise caps.no_attention(layer)
        wanted[:, layer, head] = True
    if not wanted.any():
        raise UnsupportedError("No head is named; name at least one (layer, head) pair.")
    return wanted


class _Run:
    """Ablates heads, one batch of prompts after another."""

    def __init__(
        self,
        partway: Partway,
        prompts: Texts,
        mode: str,
        calibration: Texts | None,
        seed: int,
        batch: int | None,
        restricted: dict[str, int],
    ) -> None:
        self._restricted = restricted
        self.partway, self.caps, self.mode = partway, partway.caps, mode
        self.tokens, self.mask = prompts.tokens, prompts.mask
        self._room = _TOKENS[partway.device.type if partway.device.type in _TOKENS else "cpu"]
        self._batch = batch or max(1, self._room // (self.tokens.shape[1] * self.caps.n_heads))
        self._order = batches.by_length(self.mask)
        self._classes = batches.classes(self.mask, length_class(partway.model.original_model))
        self._mean: dict[str, Tensor] = {}
        if mode == "mean":
            hooks = [self.caps.hook("z", layer) for layer in self.caps.attending]
            self._mean = mean_output(partway.model, calibration or prompts, hooks)
        elif mode == "resample":
            self._others = _others(prompts, calibration, seed)

    def fill(
        self, result: Ablation, wanted: Tensor, grew: Callable[[], None], progress: bool
    ) -> None:
        """Measure the requested values that are still nan, reporting progress after every layer."""
        missing = result.ablated_loss.isnan() & wanted
        with tqdm(
            total=int(wanted.sum()),
            initial=int(wanted.sum() - missing.sum()),
            unit="head",
            disable=not progress,
            leave=False,
        ) as bar:
            for rows in self._batches(missing):
                heads = missing[rows[0]]
                self._start(rows)
                result.loss[rows] = self._baseline()
                for layer in heads.any(dim=1).nonzero()[:, 0].tolist():
                    chosen = heads[layer].nonzero()[:, 0]
                    losses = self._without(layer, chosen)
                    result.ablated_loss[rows[:, None], layer, chosen] = losses.T.cpu()
                    bar.update(losses.numel())
                    grew()

    def _batches(self, missing: Bool[Tensor, "prompt layer head"]) -> list[Tensor]:
        """Batches of prompts, long ones first, in which the same heads are missing."""
        _, kind = missing.flatten(1).unique(dim=0, return_inverse=True)
        found = []
        for same in kind.unique().tolist():
            rows = self._order[(kind == same)[self._order]]
            if missing[rows[0]].any():
                found += batches.together(rows, self._classes, self._batch)
        return found

    def _start(self, rows: Int[Tensor, "prompt"]) -> None:
        """Run a batch of prompts, and with "resample" the prompts whose outputs replace theirs."""
        length = int(self.mask[rows].sum(dim=1).max())
        device = self.partway.device
        self._here = self.tokens[rows, :length].to(device), self.mask[rows, :length].to(device)
        self._track: Track = self.partway.track(*self._here)
        self._z: dict[int, Tensor] = {}
        if self.mode == "resample":
            tokens = self._others[rows, :length].to(device)
            layers = self.caps.attending
            hooks = [(self.caps.hook("z", layer), self._keep(layer)) for layer in layers]
            self.partway.track(tokens, torch.ones_like(tokens, dtype=torch.bool), hooks)

    def _keep(self, layer: int) -> Callable[..., None]:
        return lambda z, hook: self._z.__setitem__(layer, z)

    def _baseline(self) -> Float[Tensor, "prompt"]:
        return self.partway.losses(*self._here, self._track.final).cpu()

    def _without(self, layer: int, heads: Int[Tensor, "head"]) -> Float[Tensor, "head prompt"]:
        """The loss of each prompt without each of these heads of a layer."""
        tokens, mask = self._here
        if self.mode == WINDOW:
            self._restrict(layer)
        copies = max(1, self._room // tokens.numel())

        def work(at: slice) -> Tensor:
            chosen = heads[at]
            ids, real, residual = (
                repeat(x, "prompt ... -> (head prompt) ...", head=len(chosen))
                for x in (tokens, mask, self._track.before[layer])
            )
            hooks: Hooks = [(self.caps.hook("z", layer), self._edit(layer, chosen))]
            final = self.partway.final(ids, real, layer, residual, hooks)
            losses = self.partway.losses(ids, real, final)
            return rearrange(losses, "(head prompt) -> head prompt", head=len(chosen))

        return in_pieces(len(heads), copies, work)

    def _restrict(self, layer: int) -> None:
        """Keep the outputs of a layer whose heads are all restricted: none depends on another's."""
        hooks = [(self.caps.hook("z", layer), self._keep(layer))]
        with WindowedAttention(self.partway.model, **self._restricted, layers=layer):
            self.partway.final(*self._here, layer, self._track.before[layer], hooks)

    def _edit(self, layer: int, heads: Int[Tensor, "head"]) -> Callable[..., Tensor]:
        """Replace one head in each copy of the batch."""

        def edit(z: Float[Tensor, "row position head d_head"], hook: Any) -> Tensor:
            copy = torch.arange(len(heads), device=z.device)
            z = rearrange(z, "(copy prompt) t head d -> copy prompt t head d", copy=len(heads))
            z = z.clone()
            z[copy, :, :, heads.to(z.device)] = self._stand_in(layer, heads, z)
            return rearrange(z, "copy prompt t head d -> (copy prompt) t head d")

        return edit

    def _stand_in(self, layer: int, heads: Tensor, z: Tensor) -> Float[Tensor, "..."]:
        """What replaces each head's output, to be broadcast to [copy prompt position d_head]."""
        if self.mode == "zero":
            return z.new_zeros(())
        if self.mode == "mean":
            return rearrange(self._mean[self.caps.hook("z", layer)][heads].to(z), "c d -> c 1 1 d")
        return rearrange(self._z[layer][:, :, heads], "prompt t c d -> c prompt t d")


def _others(prompts: Texts, calibration: Texts | None, seed: int) -> Int[Tensor, "prompt position"]:
    """For each prompt, the tokens of the prompt that its heads are resampled from.

    Raises:
        TextError: If lengths differ, so that a position may have no counterpart, or there is no
            other prompt.
    """
    pool = (calibration or prompts).right_padded()
    if not pool.mask.all() or not prompts.mask.all():
        raise TextError('mode="resample" needs prompts of equal length.')
    if pool.tokens.shape[1] < prompts.tokens.shape[1]:
        raise TextError("Calibration prompts for resampling should be as long as the prompts.")
    generator = torch.Generator().manual_seed(seed)
    if calibration is not None:
        return pool.tokens[torch.randint(len(pool), (len(prompts),), generator=generator)]
    if len(prompts) < 2:
        raise TextError('mode="resample" takes outputs of another prompt; give at least two.')
    # Each prompt gets the next one in a shuffled cycle, which is never itself.
    circle = torch.randperm(len(prompts), generator=generator)
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(1)
    return pool.tokens[partner]
