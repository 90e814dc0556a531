"""How many heads can sleep: zero the heads that a score calls inactive, and watch the loss.

As Sandoval-Segura et al. (2504.03889) do: whether a head is inactive is asked anew of every input.
A first pass scores the heads of a prompt, a second one runs that prompt with the flagged heads'
outputs zero at all positions. Thresholds are quantiles of a score over all prompts, layers and
heads, so that a prompt with sleepier heads loses more of them. The paper measures accuracy on MMLU;
here it is the loss, which feels a missing head long before an answer changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope._in_force import refuse_short_prompts
from sinkscope.errors import ReportError, SinkscopeError, UnsupportedError
from sinkscope.experiments import _partial, _result
from sinkscope.experiments._losses import Flags, PromptLosses
from sinkscope.experiments._partway import Partway, with_predictions
from sinkscope.experiments._sleeping import RANDOM, Sleeping
from sinkscope.metrics.heads import INACTIVE_IF, Direction, inactivity_threshold
from sinkscope.models import load_model
from sinkscope.report import SinkReport
from sinkscope.scan import scan
from sinkscope.texts import as_texts

__all__ = ["RANDOM", "SHARES", "Sleeping", "sleep"]

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
        also={name: _partial.digest_of(score) for name, score in further.items()},
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
    return _partial.digest_of(*(scores[name] for name in names))


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
