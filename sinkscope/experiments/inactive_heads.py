"""Ablate the heads that a score flags as inactive, and measure the loss.

Sandoval-Segura, Wang, Panda, Goldblum, Basri, Goldstein and Jacobs 2025, "Identifying and
Evaluating Inactive Heads in Pretrained LLMs" (arXiv 2504.03889): whether a head is inactive is
decided anew for every input, by one of thirteen scores (`metrics.heads.inactivity_scores`).

1. Score every head of every prompt in a forward pass of the unchanged model.
2. For each score and each share of heads, the threshold is that quantile of the score over all
   prompts, layers and heads. Prompts with more inactive heads therefore lose more of them.
3. Set the flagged heads' outputs to zero at all positions, and measure the loss. There are two
   procedures:

   "two passes" (ours)
       The flags are those of the scores of step 1: all heads of a prompt are judged in the
       unchanged model, and the share of flagged heads is as requested.
   "one pass" (the paper's; its reproduction)
       Each layer is scored and zeroed in the same forward pass, against the thresholds of step 2.
       Heads that are zero in earlier layers change the scores of later ones, so that a different
       number of heads is flagged.
4. As a baseline, as many heads of each prompt are drawn at random.

The paper measures accuracy on MMLU. The loss is more sensitive: it rises without a head long before
any answer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture.batches import Batch, average
from sinkscope.capture.scan import scan
from sinkscope.errors import ReportError, SinkscopeError, UnsupportedError
from sinkscope.experiments.partial_forward import (
    Flags,
    Hooks,
    Partway,
    PromptLosses,
    with_predictions,
)
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.interventions.base import check_mode
from sinkscope.metrics import values
from sinkscope.metrics.heads import (
    INACTIVE_IF,
    Direction,
    inactivity_scores,
    inactivity_threshold,
)
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.load import load_model
from sinkscope.models.provenance import digest_of
from sinkscope.prompts.texts import as_texts
from sinkscope.renamed import attribute
from sinkscope.report.report import SinkReport
from sinkscope.statistics import Interval, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RANDOM = "random"
"""Name of the random baseline."""
PROCEDURES = ("two passes", "one pass")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_RESAMPLES = 1000
_METRICS = ("sink_attention", "values", "head_outputs", "entropy")

Scores = Mapping[str, Float[Tensor, "prompt layer head"]]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class InactiveAblation(Result):
    """The loss when the heads that a score flags are set to zero.

    Attributes:
        scores: Names along `score`; the last is "random", heads drawn at random.
        procedure: One of `PROCEDURES`.
        shares: Share of heads that each threshold flags in the unchanged model, over all prompts.
        quantile: The same as a tensor.
        loss: Baseline: mean next-token loss of each prompt with all heads [nat].
        ablated_loss: The same with the flagged heads' outputs zero [nat].
        share_ablated: Share of each prompt's heads that were set to zero.
    """

    QUESTION = "How many heads can be ablated at once?"
    OLD_NAMES: ClassVar = {"share_removed": "share_ablated"}

    scores: list[str]
    procedure: str
    shares: list[float]
    quantile: Float[Tensor, "quantile"]
    loss: Float[Tensor, "prompt"]
    ablated_loss: Float[Tensor, "score quantile prompt"]
    share_ablated: Float[Tensor, "score quantile prompt"]

    loss_asleep = attribute("loss_asleep", "ablated_loss")
    share_removed = attribute("share_removed", "share_ablated")

    def largest_share(self, tolerance: float = 0.01) -> dict[str, dict[str, Any]]:
        """The largest share of heads that can be zero within a tolerance of the baseline loss.

        The mean loss is followed from no head on until it first leaves the tolerance, with straight
        lines between the thresholds. Intervals are over prompts.

        Args:
            tolerance: Share of the baseline loss.

        Returns:
            For each score: `share`; `over_random`, how much more than of random heads (both with
            intervals, from the same resamples); and `censored`, whether even the largest share
            tried stays within the tolerance.
        """
        draws = torch.Generator().manual_seed(0)
        prompts = len(self.loss)
        drawn = torch.randint(prompts, (_RESAMPLES, prompts), generator=draws).numpy()
        share, ablated = (x.double().numpy() for x in (self.share_ablated, self.ablated_loss))
        loss = self.loss.double().numpy()

        def reach(rows: np.ndarray) -> list[float]:
            limit = (1 + tolerance) * loss[rows].mean()
            means = share[..., rows].mean(-1), ablated[..., rows].mean(-1)
            return [
                last_within(x, y, loss[rows].mean(), limit) for x, y in zip(*means, strict=True)
            ]

        measured = np.array(reach(np.arange(prompts)))
        again = np.array([reach(rows) for rows in drawn])
        shares = {}
        for index, score in enumerate(self.scores):
            over = again[:, index] - again[:, -1], measured[index] - measured[-1]
            shares[score] = {
                "share": _estimate(measured[index], again[:, index], prompts),
                "over_random": _estimate(over[1], over[0], prompts),
                "censored": bool(measured[index] >= share[index].mean(-1).max()),
            }
        return shares

    def to_frame(self) -> pd.DataFrame:
        """One row per score, threshold and prompt, as `plot.loss_by_share_ablated` takes it.

        Returns:
            score, quantile, prompt; share_ablated (mean over prompts), share_of_prompt (this
            prompt's own) and loss [nat]. Quantile 0 has the baseline loss.
        """
        none = torch.zeros_like(self.share_ablated[:, :1])
        share = torch.cat([none, self.share_ablated], dim=1)
        loss = torch.cat([self.loss.expand_as(none), self.ablated_loss], dim=1)
        axes = {
            "score": self.scores,
            "quantile": [0.0, *self.quantile.tolist()],
            "prompt": range(len(self.loss)),
        }
        mean = share.mean(dim=-1, keepdim=True)
        return tidy(axes, share_ablated=mean, share_of_prompt=share, loss=loss)

    def statistics(self) -> dict[str, Any]:
        """The baseline loss, the largest share within 1 %, and the cost of each share.

        Returns:
            procedure; loss; largest_share, see there; for each score and share, the
            relative_loss_change (mean over prompts, of the mean baseline loss), and heads_removed
            (how many, all prompts together).
        """
        change = (self.ablated_loss - self.loss).mean(-1) / self.loss.mean()
        return {
            "procedure": self.procedure,
            "loss": estimate(self.loss),
            "largest_share": self.largest_share(),
            "relative_loss_change": self._by_share(change),
            "share_ablated": self._by_share(self.share_ablated.mean(-1)),
        }

    def _by_share(self, x: Float[Tensor, "score quantile"]) -> dict[str, dict[str, float]]:
        return {
            score: dict(zip(map(str, self.shares), row.tolist(), strict=True))
            for score, row in zip(self.scores, x, strict=True)
        }

    def summary(self) -> str:
        """The largest share of heads that can be zero, score by score, largest first."""
        shares = self.largest_share()
        order = sorted(self.scores, key=lambda score: -shares[score]["share"].mean)
        lines = [
            f"Heads that can be ablated within 1 % of the baseline loss ({estimate(self.loss)} "
            f"nat), flagged for each input in {self.procedure}:"
        ]
        for score in order:
            values = shares[score]
            more = "at least " if values["censored"] else ""
            line = f"  {score:<10} {more}{values['share'].in_percent(1)} of heads"
            if score != RANDOM:
                line += f" (minus random {values['over_random'].in_percent(1)})"
            lines.append(line)
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Loss against the share of heads that are zero, one line per score."""
        from sinkscope.plot import loss_by_share_ablated

        return {"inactive-heads": loss_by_share_ablated(self.to_frame(), about=self.about)}


def last_within(shares: np.ndarray, losses: np.ndarray, baseline: float, limit: float) -> float:
    """Return the share at which a piecewise linear loss curve first exceeds a limit.

    Args:
        shares: In rising order, none 0.
        losses: The loss at each.
        baseline: The loss at share 0.
        limit: The largest loss that is allowed.

    Returns:
        The share; the largest one if the limit is never exceeded.
    """
    x, y = np.concatenate([[0.0], shares]), np.concatenate([[baseline], losses])
    beyond = np.flatnonzero(y > limit)
    if beyond.size == 0:
        return float(x[-1])
    at = beyond[0]
    part = (limit - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + part * (x[at] - x[at - 1]))


def _estimate(mean: float, again: np.ndarray, prompts: int) -> Interval:
    low, high = np.quantile(again, [0.025, 0.975]) if prompts > 1 else (np.nan, np.nan)
    return Interval(float(mean), float(low), float(high))


def ablate_inactive(
    model: Any,
    texts: Any,
    *,
    scores: Iterable[str] = tuple(INACTIVE_IF),
    shares: Iterable[float] = SHARES,
    procedure: str = "two passes",
    draws: int = 3,
    thresholds: SinkReport | None = None,
    also: Scores | None = None,
    seed: int = 0,
    batch: int | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> InactiveAblation:
    """Set to zero the heads that each score flags at each threshold, input by input.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts.
        scores: Names from `metrics.heads.INACTIVE_IF`.
        shares: Quantiles: which share of heads a threshold flags, over all prompts.
        procedure: "two passes" flags heads by their scores in the unchanged model; "one pass"
            scores and zeroes layer after layer in one forward pass, as Sandoval-Segura et al. do.
        draws: How often random heads are drawn; their losses are averaged.
        thresholds: A report from which thresholds are taken, as in deployment; by default the
            quantiles of these prompts.
        also: Further scores of these prompts by name, a head being inactive where they are small,
            such as `Ablation.loss_change`. They are fixed in both procedures.
        seed: Seed of the random heads.
        batch: Prompts per batch; by default as many as fit on the device.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        Losses and shares of flagged heads, for each score, threshold and prompt.

    Raises:
        UnsupportedError: If the model has no loss or cannot show what the scores need, or there is
            no such score or procedure.
        TextError: If a prompt has a single token, or ends before a position that an intervention
            changes.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.
    """
    model = load_model(model)
    file = kept_in(file, model)
    partway = Partway(model)
    prompts = with_predictions(as_texts(texts).tokenize(model).right_padded())
    refuse_short_prompts(model, prompts.mask)
    names, shares = tuple(scores), tuple(sorted(set(map(float, shares))))
    _check(names, shares, draws)
    check_mode(procedure, PROCEDURES)
    further = dict(also or {})
    request = {}
    if file is not None:
        request = request_of(
            model,
            prompts,
            scores=[*names, *further],
            shares=list(shares),
            procedure=procedure,
            draws=draws,
            seed=seed,
            also={name: digest_of(score) for name, score in further.items()},
            thresholds=None if thresholds is None else _digest(thresholds, names),
        )
    shape = len(names) + len(further) + 1, len(shares), len(prompts)
    empty = InactiveAblation(
        about=about(model, prompts),
        scores=[*names, *further, RANDOM],
        procedure=procedure,
        shares=list(shares),
        quantile=torch.tensor(shares),
        loss=torch.full(shape[2:], torch.nan),
        ablated_loss=torch.full(shape, torch.nan),
        share_ablated=torch.full(shape, torch.nan),
    )
    with Kept(InactiveAblation, file, request) as kept:
        result = kept.found or empty
        if result.ablated_loss.isnan().any():
            report = scan(model, prompts, metrics=_METRICS, progress=progress).to("cpu")
            choose = _Chooser(report, names, thresholds, further, draws, seed)
            with partway.opened():
                measure = _Measure(partway, PromptLosses(partway, prompts, batch), choose)
                measure.fill(result, lambda: kept.grew(result), progress)
    return result


def _digest(report: SinkReport, names: tuple[str, ...]) -> str:
    """Hash the scores that thresholds are taken from."""
    scores = report.inactivity_scores()
    return digest_of(*(scores[name] for name in names))


def _check(names: tuple[str, ...], shares: tuple[float, ...], draws: int) -> None:
    for name in names:
        if name not in INACTIVE_IF:
            raise UnsupportedError(
                f"There is no score {name!r}; choose some of {', '.join(INACTIVE_IF)}."
            )
    if not shares or not all(0 < share < 1 for share in shares) or draws < 1:
        raise SinkscopeError(
            f"shares are {shares} and draws {draws}; expected shares between 0 and 1 and at least "
            "one draw."
        )


class _Chooser:
    """Chooses the heads of each prompt to ablate, for a score and a share."""

    def __init__(
        self,
        report: SinkReport,
        names: tuple[str, ...],
        thresholds: SinkReport | None,
        further: dict[str, Tensor],
        draws: int,
        seed: int,
    ) -> None:
        measured, elsewhere = report.inactivity_scores(), (thresholds or report).inactivity_scores()
        self._scores: dict[str, tuple[Tensor, Tensor, Direction]] = {
            name: (measured[name], elsewhere[name].cpu(), INACTIVE_IF[name]) for name in names
        }
        self._shape = measured["AWFT"].shape
        for name, score in further.items():
            if score.shape != self._shape:
                raise ReportError(
                    f"The score {name!r} is {tuple(score.shape)}, which is not [prompt layer head] "
                    f"= {tuple(self._shape)}."
                )
            self._scores[name] = score.cpu(), score.cpu(), "below"
        self._draws, self._seed = draws, seed
        self._attending = list(report.settings.attending)

    def __call__(self, name: str, share: float) -> list[Flags]:
        """Return the flags in the unchanged model; for random heads, several draws."""
        if name == RANDOM:
            return [self._random(share, draw) for draw in range(self._draws)]
        score, _, inactive_if = self._scores[name]
        return [_beyond(score, self.threshold(name, share), inactive_if)]

    def threshold(self, name: str, share: float) -> float:
        """The threshold of a score that flags this share of heads where thresholds come from."""
        _, source, inactive_if = self._scores[name]
        return inactivity_threshold(source, share, inactive_if)

    def _random(self, quantile: float, draw: int) -> Flags:
        """Flag as many heads of every prompt at random, drawn separately for each prompt."""
        prompts, _, heads = self._shape
        layers = len(self._attending)
        generator = torch.Generator().manual_seed(1000 * self._seed + draw)
        order = torch.rand(prompts, layers * heads, generator=generator).argsort(dim=1)
        chosen = order < round(quantile * layers * heads)
        flags = torch.zeros(self._shape, dtype=torch.bool)
        flags[:, self._attending] = rearrange(chosen, "p (layer head) -> p layer head", head=heads)
        return flags


def _beyond(
    score: Float[Tensor, "*shape"], threshold: float, inactive_if: Direction
) -> Bool[Tensor, "*shape"]:
    return score < threshold if inactive_if == "below" else score > threshold


class _Measure:
    """The losses with flagged heads set to zero."""

    def __init__(self, partway: Partway, losses: PromptLosses, choose: _Chooser) -> None:
        self._partway, self._losses, self._choose = partway, losses, choose

    def fill(self, result: InactiveAblation, grew: Callable[[], None], progress: bool) -> None:
        """Measure the values that are still nan."""
        missing = result.ablated_loss.isnan().any(dim=-1)
        if result.loss.isnan().any():
            result.loss[:] = self._losses()
        bar = tqdm(
            total=missing.numel(),
            initial=missing.numel() - int(missing.sum()),
            unit="threshold",
            disable=not progress,
            leave=False,
        )
        with bar:
            for row, column in missing.nonzero().tolist():
                name, share = result.scores[row], result.shares[column]
                one_pass = result.procedure == "one pass" and name in INACTIVE_IF
                losses, flags = (self._one_pass if one_pass else self._two_passes)(name, share)
                result.ablated_loss[row, column] = losses
                result.share_ablated[row, column] = flags
                bar.update()
                grew()

    def _two_passes(self, name: str, share: float) -> tuple[Tensor, Tensor]:
        """Loss and share of zeroed heads of each prompt; of random heads the mean over draws."""
        flags = self._choose(name, share)
        losses = torch.stack([self._losses(one) for one in flags])
        attending = list(self._partway.caps.attending)
        shares = [one[:, attending].float().mean((1, 2)) for one in flags]
        return losses.mean(dim=0), torch.stack(shares).mean(0)

    def _one_pass(self, name: str, share: float) -> tuple[Tensor, Tensor]:
        """The same, each layer scored and zeroed in the forward pass that gives the loss."""
        threshold, inactive_if = self._choose.threshold(name, share), INACTIVE_IF[name]
        caps = self._partway.caps
        flagged: list[tuple[Tensor, Tensor]] = []

        def hooks(batch: Batch) -> Hooks:
            measured: dict[str, Tensor] = {}
            count = torch.zeros(len(batch.tokens))
            flagged.append((batch.rows, count))

            def read(signal: str, layer: int, x: Any) -> None:
                measured.update(_read(signal, x, batch, caps.n_heads))

            def zero(z: Float[Tensor, "prompt position head d_head"], hook: Any) -> Tensor:
                norms = average(values.norms(z), batch.on(z.device).averages("mask", "last_token"))
                mean, last = norms.unbind(-1)
                sizes = {"head_output_norm": mean, "last_output_norm": last}
                layer = {key: x.to(z.device)[:, None] for key, x in (measured | sizes).items()}
                score = inactivity_scores(**layer)[name][:, 0]
                flags = _beyond(score, threshold, inactive_if)
                count.add_(flags.float().mean(dim=1).cpu() / len(caps.attending))
                return z.masked_fill(flags[:, None, :, None], 0)

            edits = [(caps.hook("z", layer), zero) for layer in caps.attending]
            return [*self._partway.observers(batch, ("attention", "value"), read), *edits]

        losses = self._losses.run(hooks)
        rows, shares = (torch.cat(x) for x in zip(*flagged, strict=True))
        return losses, shares[rows.argsort()]


def _read(signal: str, x: Any, batch: Batch, n_heads: int) -> dict[str, Tensor]:
    """What the scores need of a layer's attention or values [prompt head]."""
    if signal == "attention":
        own = x.batch
        first = average(x.on_keys(own.first_token, most=1), own.averages("mask"))[..., 0]
        entropy = average(x.entropy(), own.averages("mask"))[..., 0]
        return {"first_token_attention": first, "attention_entropy": entropy}
    norm = values.norms(x)  # [prompt kv_head position]
    group = n_heads // norm.shape[1]
    first, mean = norm[..., 0], values.mean_norm(norm, batch.on(x.device).mask)
    return {
        "first_value_norm": first.repeat_interleave(group, dim=-1),
        "mean_value_norm": mean.repeat_interleave(group, dim=-1),
    }
