"""How many heads can sleep: zero the heads that a score calls inactive, and watch the loss.

As Sandoval-Segura et al. (2504.03889) do: whether a head is inactive is asked anew of every input.
A first pass scores the heads of a prompt, a second one runs that prompt with the flagged heads'
outputs zero at all positions. Thresholds are quantiles of a score over all prompts, layers and
heads, so that a prompt with sleepier heads loses more of them. The paper measures accuracy on MMLU;
here it is the loss, which feels a missing head long before an answer changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture.scan import scan
from sinkscope.errors import ReportError, SinkscopeError, UnsupportedError
from sinkscope.experiments import result as _result
from sinkscope.experiments import resume as _partial
from sinkscope.experiments.partial_forward import Flags, Partway, PromptLosses, with_predictions
from sinkscope.experiments.result import Result
from sinkscope.metrics.heads import INACTIVE_IF, Direction, inactivity_threshold
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.load import load_model
from sinkscope.models.provenance import digest_of
from sinkscope.prompts.texts import as_texts
from sinkscope.report.report import SinkReport
from sinkscope.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


# --- How many heads can sleep within a tolerance of the loss: the result of `sleep`.

RANDOM = "random"
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sleeping(Result):
    """The loss with the heads asleep that a score flags.

    Attributes:
        scores: Names along `score`; the last is "random", any heads at all.
        asked: What the figures were made of.
        quantile: Share of heads that each threshold flags, over all prompts.
        loss: Mean next-token loss of each prompt with all heads [nat].
        loss_asleep: The same with the flagged heads' outputs zero [nat].
        share_removed: Share of each prompt's heads that were flagged.
    """

    QUESTION = "How many heads can sleep at once?"

    scores: list[str]
    asked: dict[str, Any]
    quantile: Float[Tensor, "quantile"]
    loss: Float[Tensor, "prompt"]
    loss_asleep: Float[Tensor, "score quantile prompt"]
    share_removed: Float[Tensor, "score quantile prompt"]

    def largest_share(self, tolerance: float = 0.01) -> dict[str, dict[str, Any]]:
        """How many heads each score can put to sleep within a tolerance of the untouched loss.

        The mean loss is followed from no head on until it first leaves the tolerance; the share in
        between two thresholds is read off the straight line. Intervals are over prompts.

        Args:
            tolerance: Share of the untouched loss.

        Returns:
            For each score: `share`; `over_random`, how much more than random heads (both with
            intervals, from the same resamples); and `censored`, whether even the largest share
            tried stays within the tolerance.
        """
        draws = torch.Generator().manual_seed(0)
        prompts = len(self.loss)
        drawn = torch.randint(prompts, (_RESAMPLES, prompts), generator=draws).numpy()
        share, asleep = (x.double().numpy() for x in (self.share_removed, self.loss_asleep))
        loss = self.loss.double().numpy()

        def reach(rows: np.ndarray) -> list[float]:
            limit = (1 + tolerance) * loss[rows].mean()
            means = share[..., rows].mean(-1), asleep[..., rows].mean(-1)
            return [
                last_within(x, y, loss[rows].mean(), limit) for x, y in zip(*means, strict=True)
            ]

        measured = np.array(reach(np.arange(prompts)))
        again = np.array([reach(rows) for rows in drawn])
        found = {}
        for index, score in enumerate(self.scores):
            over = again[:, index] - again[:, -1], measured[index] - measured[-1]
            found[score] = {
                "share": _estimate(measured[index], again[:, index], prompts),
                "over_random": _estimate(over[1], over[0], prompts),
                "censored": bool(measured[index] >= share[index].mean(-1).max()),
            }
        return found

    def frame(self) -> pd.DataFrame:
        """One row a score, threshold and prompt: score, share_removed, loss, prompt.

        `share_removed` is the mean over prompts, `share_of_prompt` that prompt's own; at a share of
        0 stands the untouched loss.
        """
        import pandas as pd

        quantiles = [0.0, *self.quantile.tolist()]
        prompts = range(len(self.loss))
        columns = _result.grid(score=self.scores, quantile=quantiles, prompt=prompts)
        none = torch.zeros_like(self.share_removed[:, :1])
        share = torch.cat([none, self.share_removed], dim=1)
        loss = torch.cat([self.loss.expand_as(none), self.loss_asleep], dim=1)
        mean = share.mean(dim=-1, keepdim=True).expand_as(share)
        columns |= {"share_removed": mean, "share_of_prompt": share, "loss": loss}
        return pd.DataFrame(
            {name: _result.flat(x) if isinstance(x, Tensor) else x for name, x in columns.items()}
        )

    def findings(self) -> dict[str, Any]:
        """The untouched loss, the largest share within 1 %, and what each share costs."""
        change = (self.loss_asleep - self.loss).mean(-1) / self.loss.mean()
        return {
            "loss": estimate(self.loss),
            "largest_share": self.largest_share(),
            "relative_loss_change": {
                score: dict(zip(map(str, self.asked["shares"]), row.tolist(), strict=True))
                for score, row in zip(self.scores, change, strict=True)
            },
        }

    def summary(self) -> str:
        """How many heads can sleep, score by score, best first."""
        found = self.largest_share()
        loss = estimate(self.loss)
        order = sorted(self.scores, key=lambda score: -found[score]["share"].mean)
        lines = [f"Heads that can sleep within 1 % of the loss ({loss} nat), per input:"]
        for score in order:
            figures = found[score]
            more = "at least " if figures["censored"] else ""
            line = f"  {score:<10} {more}{_percent(figures['share'])} of heads"
            if score != RANDOM:
                line += f" (over random {_percent(figures['over_random'])})"
            lines.append(line)
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Loss against the share of heads asleep, one line a score."""
        from sinkscope.plot import sleeping_heads

        return {"sleep": sleeping_heads(self.frame(), about=self.about)}


def last_within(shares: np.ndarray, losses: np.ndarray, untouched: float, limit: float) -> float:
    """Where a curve of loss against share first exceeds a limit, on straight lines between points.

    Args:
        shares: In rising order, none 0.
        losses: The loss at each.
        untouched: The loss at share 0.
        limit: What the loss may come to.

    Returns:
        The share; the largest one if the limit is never exceeded.
    """
    x, y = np.concatenate([[0.0], shares]), np.concatenate([[untouched], losses])
    beyond = np.flatnonzero(y > limit)
    if beyond.size == 0:
        return float(x[-1])
    at = beyond[0]
    part = (limit - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + part * (x[at] - x[at - 1]))


def _estimate(mean: float, again: np.ndarray, prompts: int) -> Estimate:
    low, high = np.quantile(again, [0.025, 0.975]) if prompts > 1 else (np.nan, np.nan)
    return Estimate(float(mean), float(low), float(high))


def _percent(share: Estimate) -> str:
    mean, low, high = (f"{100 * end:.1f}" for end in (share.mean, share.low, share.high))
    return f"{mean} %" if math.isnan(share.low) else f"{mean} % [{low}, {high}]"


SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
_METRICS = ("sink_attention", "values", "head_outputs", "entropy")

Scores = Mapping[str, Float[Tensor, "prompt layer head"]]


def sleep(
    model: Any,
    texts: Any,
    *,
    scores: Iterable[str] = tuple(INACTIVE_IF),
    shares: Iterable[float] = SHARES,
    draws: int = 3,
    thresholds: SinkReport | None = None,
    also: Scores | None = None,
    seed: int = 0,
    batch: int | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> Sleeping:
    """Put to sleep the heads that each score flags at each quantile, input by input.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts.
        scores: Names from `metrics.heads.INACTIVE_IF`.
        shares: Quantiles: which share of heads a threshold flags, over all prompts.
        draws: How often random heads are drawn; their losses are averaged.
        thresholds: A report to take thresholds from, as one would who has to choose them
            beforehand; by default the quantiles of these very prompts.
        also: Further scores of these prompts by name, a head being inactive where they are small,
            such as `Removal.loss_change`.
        seed: Of the random heads.
        batch: Prompts at once; by default what fills the device.
        file: A ``.nc`` file to keep the figures in as they come, and to continue from.
        progress: Whether to draw a progress bar.

    Raises:
        UnsupportedError: If the model has no loss or cannot show what the scores need, or there is
            no such score.
        TextError: If a prompt has a single token, or ends before a position that an intervention
            changes.
        ReportError: If the file was begun with other settings; or hooks or interventions are in
            force, which a file cannot tell apart.
    """
    model = load_model(model)
    file = _partial.kept_in(file, model)
    partway = Partway(model)
    prompts = with_predictions(as_texts(texts).tokenize(model).right_padded())
    refuse_short_prompts(model, prompts.mask)
    names, shares = tuple(scores), tuple(sorted(set(map(float, shares))))
    _check(names, shares, draws)
    further = dict(also or {})
    asked = _partial.asked_of(
        model,
        prompts,
        scores=[*names, *further],
        shares=list(shares),
        draws=draws,
        seed=seed,
        also={name: digest_of(score) for name, score in further.items()},
        thresholds=None if thresholds is None else _digest(thresholds, names),
    )
    shape = len(names) + len(further) + 1, len(shares), len(prompts)
    empty = Sleeping(
        about=_result.about(model, prompts),
        scores=[*names, *further, RANDOM],
        asked=asked,
        quantile=torch.tensor(shares),
        loss=torch.full(shape[2:], torch.nan),
        loss_asleep=torch.full(shape, torch.nan),
        share_removed=torch.full(shape, torch.nan),
    )
    growing = _partial.Growing(empty, file)
    if not growing.result.loss_asleep.isnan().any():
        return growing.result
    report = scan(model, prompts, metrics=_METRICS, progress=progress).to("cpu")
    choose = _Chooser(report, names, thresholds, further, draws, seed)
    with growing.kept(), partway.opened():
        _fill(growing, PromptLosses(partway, prompts, batch), choose, progress)
    return growing.result


def _digest(report: SinkReport, names: tuple[str, ...]) -> str:
    """A hash of the scores that thresholds are taken from."""
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
    """Says which heads of each prompt sleep, for a score and a quantile."""

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

    def __call__(self, name: str, quantile: float) -> list[Flags]:
        """The flags; of random heads, several draws."""
        if name == RANDOM:
            return [self._random(quantile, draw) for draw in range(self._draws)]
        score, source, inactive_if = self._scores[name]
        threshold = inactivity_threshold(source, quantile, inactive_if)
        return [score < threshold if inactive_if == "below" else score > threshold]

    def _random(self, quantile: float, draw: int) -> Flags:
        """The same number of heads of every prompt, drawn for each anew."""
        prompts, layers, heads = self._shape
        generator = torch.Generator().manual_seed(1000 * self._seed + draw)
        order = torch.rand(prompts, layers * heads, generator=generator).argsort(dim=1)
        chosen = order < round(quantile * layers * heads)
        return rearrange(chosen, "prompt (layer head) -> prompt layer head", layer=layers)


def _fill(
    growing: _partial.Growing, losses_of: PromptLosses, choose: _Chooser, progress: bool
) -> None:
    """Measure what is still nan."""
    found: Sleeping = growing.result
    missing = found.loss_asleep.isnan().any(dim=-1)
    if found.loss.isnan().any():
        found.loss[:] = losses_of()
    bar = tqdm(
        total=missing.numel(),
        initial=missing.numel() - int(missing.sum()),
        unit="threshold",
        disable=not progress,
        leave=False,
    )
    with bar:
        for score, quantile in missing.nonzero().tolist():
            flags = choose(found.scores[score], found.asked["shares"][quantile])
            losses = torch.stack([losses_of(one) for one in flags])
            shares = torch.stack([one.float().mean(dim=(1, 2)) for one in flags])
            found.loss_asleep[score, quantile] = losses.mean(dim=0)
            found.share_removed[score, quantile] = shares.mean(dim=0)
            bar.update()
            growing.grown()
