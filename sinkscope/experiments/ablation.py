"""What every head is worth: the loss of a model without it, head by head.

A head of layer l changes nothing below l. So the residual stream is kept at every block in one
ordinary pass, and a layer's heads are removed side by side, one copy of the batch each, from there
on: half the blocks, and few large products instead of many small ones.

Zeroing exaggerates, since later layers are used to a head's average: "mean" and "resample" leave
that in place (see `interventions.AblateHeads`, whose figures these are).
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
from sinkscope.experiments import result as _result
from sinkscope.experiments import resume as _partial
from sinkscope.experiments.partial_forward import Hooks, Partway, Track, with_predictions
from sinkscope.experiments.result import Result
from sinkscope.interventions import calibration as _calibration
from sinkscope.interventions.base import check_indices, check_layers, check_mode
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.load import load_model
from sinkscope.models.provenance import digest
from sinkscope.output import listed, number
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import Interval, bootstrap, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


# --- What `removal` finds: the cost of each head, in a table and in words.


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Removal(Result):
    """The loss with all heads and without each of them.

    Attributes:
        mode: What took a head's place.
        asked: What the figures were made of.
        loss: Mean next-token loss of each prompt [nat]; nan where no head was removed.
        loss_without: The same without the head; nan where it was not removed.
    """

    QUESTION = "What does it cost to remove a head?"

    mode: str
    asked: dict[str, Any]
    loss: Float[Tensor, "prompt"]
    loss_without: Float[Tensor, "prompt layer head"]

    @property
    def loss_change(self) -> Float[Tensor, "prompt layer head"]:
        """What removing each head costs: the loss without it less the loss with it [nat]."""
        return self.loss_without - self.loss[:, None, None]

    def interval(self, level: float = 0.95) -> Interval:
        """Mean cost of each head over prompts with its bootstrap interval."""
        return bootstrap(self.loss_change, level)

    def frame(self) -> pd.DataFrame:
        """One row a head: loss_change with the ends of its interval, domain and mode."""
        import pandas as pd

        mean, low, high = self.interval()
        layers, heads = mean.shape
        columns = _result.grid(
            domain=[self.asked["texts"]], layer=range(layers), head=range(heads), mode=[self.mode]
        )
        costs = {"loss_change": mean, "loss_change_low": low, "loss_change_high": high}
        frame = pd.DataFrame(columns | {name: _result.flat(x) for name, x in costs.items()})
        return frame.dropna(subset="loss_change", ignore_index=True)

    def findings(self) -> dict[str, Any]:
        """The untouched loss, the dearest heads, and how many cost nothing that shows."""
        mean, low, high = (end.flatten() for end in self.interval())
        cost = mean[~mean.isnan()]
        heads = self.loss_without.shape[2]
        dearest = mean.nan_to_num(-torch.inf).argsort(descending=True)[: min(5, len(cost))]
        return {
            "mode": self.mode,
            "loss": estimate(self.loss),
            "heads": len(cost),
            "median_cost": float(cost.median()),
            "dearest": [
                {"layer": at // heads, "head": at % heads, "loss_change": float(mean[at])}
                for at in dearest.tolist()
            ],
            "dear": int((low > 0).sum()),
            "harmful": int((high < 0).sum()),
        }

    def summary(self) -> str:
        """How much a head is worth, in words."""
        found = self.findings()
        dearest = [
            f"{head['layer']}.{head['head']} ({number(head['loss_change'])})"
            for head in found["dearest"]
        ]
        return (
            f"The loss is {found['loss']} nat. Without one of {found['heads']} heads "
            f"({self.mode}) it rises by {number(found['median_cost'])} in the median; by most "
            f"without {listed(dearest)}. Heads that are "
            f"missed for sure: {found['dear']}; that do harm for sure: {found['harmful']} (95 % "
            "intervals over prompts, head by head)."
        )

    def figures(self) -> dict[str, go.Figure]:
        """None: a cost needs something to be drawn against, see `Dormancy.figures`."""
        return {}


MODES = ("zero", "mean", "resample")
_TOKENS = {"cuda": 2**16, "cpu": 2**12}
"""Tokens of one forward pass, copies counted."""

StandIn = Float[Tensor, "..."]


def removal(
    model: Any,
    texts: Any,
    mode: str = "zero",
    *,
    heads: Iterable[tuple[int, int]] | Bool[Tensor, "prompt layer head"] | None = None,
    calibration: Any = None,
    seed: int = 0,
    batch: int | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> Removal:
    """Remove every head in turn and see what it costs.

    Args:
        model: A bridge, or anything that `load_model` takes; interventions in force stay in force.
        texts: Prompts.
        mode: What takes the place of a head's output before W_O: "zero"; "mean", its mean over the
            calibration texts' positions; "resample", its output at the same position of another
            prompt.
        heads: (layer, head) pairs, or which heads on which prompts [prompt layer head]; all by
            default.
        calibration: Texts for "mean" and "resample"; by default the prompts themselves, where
            "resample" then never takes a prompt's own.
        seed: Of the draws.
        batch: Prompts at once; by default what fills the device.
        file: A ``.nc`` file to keep the figures in as they come, and to continue from.
        progress: Whether to draw a progress bar.

    Raises:
        UnsupportedError: If the model has no loss, if starting partway is not exact for it, or if a
            head does not exist.
        TextError: If a prompt has a single token, or ends before a position that an intervention
            changes; or "resample" gets prompts of several lengths, or a single prompt.
        ReportError: If the file was begun with other settings; or hooks or interventions are in
            force, which a file cannot tell apart.
    """
    model = load_model(model)
    file = _partial.kept_in(file, model)
    partway = Partway(model)
    can = partway.can
    prompts = with_predictions(as_texts(texts).tokenize(model).right_padded())
    refuse_short_prompts(model, prompts.mask)
    check_mode(mode, MODES)
    shape = len(prompts), can.n_layers, can.n_heads
    wanted = _wanted(heads, shape)
    standing_in = None if calibration is None else as_texts(calibration).tokenize(model)
    asked = _partial.asked_of(
        model,
        prompts,
        mode=mode,
        seed=seed,
        calibration=None if standing_in is None else digest(standing_in),
    )
    empty = Removal(
        about=_result.about(model, prompts),
        mode=mode,
        asked=asked,
        loss=torch.full((len(prompts),), torch.nan),
        loss_without=torch.full(shape, torch.nan),
    )
    growing = _partial.Growing(empty, file)
    with growing.kept(), partway.opened():
        _Run(partway, prompts, mode, standing_in, seed, batch).fill(growing, wanted, progress)
    return growing.result


def _wanted(
    heads: Iterable[tuple[int, int]] | Tensor | None, shape: tuple[int, int, int]
) -> Bool[Tensor, "prompt layer head"]:
    """Which heads are removed on which prompts.

    Raises:
        UnsupportedError: If one does not exist, or there are none.
    """
    if isinstance(heads, Tensor):
        if heads.shape != shape:
            raise UnsupportedError(
                f"heads is {tuple(heads.shape)}, which is not [prompt layer head] = {shape}."
            )
        return heads.cpu()
    wanted = torch.full(shape, heads is None)
    for layer, head in heads or ():
        check_layers(layer, shape[1])
        check_indices(head, shape[2], "head")
        wanted[:, layer, head] = True
    if not wanted.any():
        raise UnsupportedError("No head is named; name at least one (layer, head) pair.")
    return wanted


class _Run:
    """The removal of heads from batch after batch of prompts."""

    def __init__(
        self,
        partway: Partway,
        prompts: Texts,
        mode: str,
        calibration: Texts | None,
        seed: int,
        batch: int | None,
    ) -> None:
        self.partway, self.can, self.mode = partway, partway.can, mode
        self.tokens, self.mask = prompts.tokens, prompts.mask
        self._room = _TOKENS[partway.device.type if partway.device.type in _TOKENS else "cpu"]
        self._batch = batch or max(1, self._room // (self.tokens.shape[1] * self.can.n_heads))
        self._order = batches.by_length(self.mask)
        self._mean: dict[str, Tensor] = {}
        if mode == "mean":
            hooks = [self.can.hook("z", layer) for layer in range(self.can.n_layers)]
            self._mean = _calibration.mean_output(partway.model, calibration or prompts, hooks)
        elif mode == "resample":
            self._others = _others(prompts, calibration, seed)

    def fill(self, growing: _partial.Growing, wanted: Tensor, progress: bool) -> None:
        """Measure what is wanted and still nan."""
        found: Removal = growing.result
        missing = found.loss_without.isnan() & wanted
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
                found.loss[rows] = self._untouched()
                for layer in heads.any(dim=1).nonzero()[:, 0].tolist():
                    chosen = heads[layer].nonzero()[:, 0]
                    losses = self._without(layer, chosen)
                    found.loss_without[rows[:, None], layer, chosen] = losses.T.cpu()
                    bar.update(losses.numel())
                    growing.grown()

    def _batches(self, missing: Bool[Tensor, "prompt layer head"]) -> list[Tensor]:
        """Batches of prompts, long ones first, that lack the same heads; those that lack any."""
        _, kind = missing.flatten(1).unique(dim=0, return_inverse=True)
        found = []
        for same in kind.unique().tolist():
            rows = self._order[(kind == same)[self._order]]
            if missing[rows[0]].any():
                found += rows.split(self._batch)
        return found

    def _start(self, rows: Int[Tensor, "prompt"]) -> None:
        """Run a batch of prompts whole; and what stands in for its heads, if that is prompts."""
        length = int(self.mask[rows].sum(dim=1).max())
        device = self.partway.device
        self._here = self.tokens[rows, :length].to(device), self.mask[rows, :length].to(device)
        self._track: Track = self.partway.track(*self._here)
        self._z: dict[int, Tensor] = {}
        if self.mode == "resample":
            tokens = self._others[rows, :length].to(device)
            hooks = [
                (self.can.hook("z", layer), self._keep(layer)) for layer in range(self.can.n_layers)
            ]
            self.partway.track(tokens, torch.ones_like(tokens, dtype=torch.bool), hooks)

    def _keep(self, layer: int) -> Callable[..., None]:
        return lambda z, hook: self._z.__setitem__(layer, z)

    def _untouched(self) -> Float[Tensor, "prompt"]:
        return self.partway.losses(*self._here, self._track.final).cpu()

    def _without(self, layer: int, heads: Int[Tensor, "head"]) -> Float[Tensor, "head prompt"]:
        """The loss of each prompt without each of these heads of a layer."""
        tokens, mask = self._here
        copies = max(1, self._room // tokens.numel())

        def work(at: slice) -> Tensor:
            chosen = heads[at]
            ids, real, residual = (
                repeat(x, "prompt ... -> (head prompt) ...", head=len(chosen))
                for x in (tokens, mask, self._track.before[layer])
            )
            hooks: Hooks = [(self.can.hook("z", layer), self._edit(layer, chosen))]
            final = self.partway.final(ids, real, layer, residual, hooks)
            losses = self.partway.losses(ids, real, final)
            return rearrange(losses, "(head prompt) -> head prompt", head=len(chosen))

        return in_pieces(len(heads), copies, work)

    def _edit(self, layer: int, heads: Int[Tensor, "head"]) -> Callable[..., Tensor]:
        """Take one head out of each copy of the batch."""

        def edit(z: Float[Tensor, "row position head d_head"], hook: Any) -> Tensor:
            copy = torch.arange(len(heads), device=z.device)
            z = rearrange(z, "(copy prompt) t head d -> copy prompt t head d", copy=len(heads))
            z = z.clone()
            z[copy, :, :, heads.to(z.device)] = self._stand_in(layer, heads, z)
            return rearrange(z, "copy prompt t head d -> (copy prompt) t head d")

        return edit

    def _stand_in(self, layer: int, heads: Tensor, z: Tensor) -> StandIn:
        """What each head puts out instead, to be broadcast to [copy prompt position d_head]."""
        if self.mode == "zero":
            return z.new_zeros(())
        if self.mode == "mean":
            return rearrange(self._mean[self.can.hook("z", layer)][heads].to(z), "c d -> c 1 1 d")
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
    # Each prompt's next one around a shuffled circle: another one for sure.
    circle = torch.randperm(len(prompts), generator=generator)
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(1)
    return pool.tokens[partner]
