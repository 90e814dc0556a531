"""Whether runs with different seeds have the same sink heads, checkpoint by checkpoint.

No pretraining study of sinks states more than one seed; PolyPythias (van der Wal et al. 2025, arXiv
2503.09543) and the Bigram-Backcopy toy models have several. Sink heads over training: Xu 2026
(arXiv 2606.02378).

1. Follow each run with `dynamics`, on the same tokens and at the same steps.
2. At every step, and for every pair of runs, take the heads whose mean sink attention exceeds ε
   and compute the overlap of the two sets: the Jaccard index of (layer, head) pairs, its value if
   the heads of each layer were renumbered at random, and that of the counts by layer.
3. A pair of runs that differ in their weights' seed has no head in common to begin with, since
   heads of a layer can be renumbered. An index at its chance level and a high one of layers say
   that runs agree on the layers only. Runs that begin from the same weights can do better.
4. The step at which each run's sink forms, and its spread over runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope.errors import ReportError
from sinkscope.experiments.dynamics import Dynamics
from sinkscope.experiments.result import Result, stacked, tidy
from sinkscope.metrics import turnover
from sinkscope.output import number
from sinkscope.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

OVERLAPS = {
    "jaccard": turnover.jaccard,
    "jaccard_by_chance": turnover.jaccard_by_chance,
    "jaccard_of_layers": turnover.jaccard_of_layers,
}
"""Measures of the overlap of two sets of sink heads."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SameHeads(Result):
    """Sink heads of several runs, step by step.

    Attributes:
        runs: Each run's checkpoints, by name.
    """

    QUESTION = "Do runs from different seeds have the same sink heads?"

    runs: dict[str, Dynamics]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that all runs have."""
        return next(iter(self.runs.values())).steps

    def to_frame(self) -> pd.DataFrame:
        """One row per pair of runs, step and kind of overlap: metric, step, run, other, value."""
        heads = {name: run.sink_heads() for name, run in self.runs.items()}
        pieces = []
        for one, other in itertools.combinations(self.runs, 2):
            for metric, overlap in OVERLAPS.items():
                pairs = zip(heads[one], heads[other], strict=True)
                values = np.array([overlap(mine, theirs) for mine, theirs in pairs])
                rows = tidy({"metric": [metric], "step": self.steps})
                pieces.append(rows.assign(run=one, other=other, value=values))
        return stacked(pieces)

    def formation_steps(self) -> dict[str, int | None]:
        """Each run's `Dynamics.formation_step`."""
        return {name: run.formation_step() for name, run in self.runs.items()}

    def statistics(self) -> dict[str, Any]:
        """Overlaps at the last step, mean over pairs of runs, and the steps of formation.

        Pairs share runs, so that an interval over pairs would be too narrow; none is given.
        """
        frame = self.to_frame()
        last = frame[frame["step"] == self.steps[-1]].groupby("metric", sort=False)["value"]
        known = [step for step in self.formation_steps().values() if step is not None]
        return {
            "step": list(self.steps),
            "runs": list(self.runs),
            "sink_heads": {
                n: run.sink_heads().sum((1, 2)).tolist() for n, run in self.runs.items()
            },
            "last": last.mean().to_dict(),
            "formation_step": self.formation_steps(),
            "mean_formation_step": mean_interval(np.array(known)) if known else None,
        }

    def summary(self) -> str:
        """Sink heads of each run, their overlap, and when each run's sink formed."""
        facts = self.statistics()
        counts = ", ".join(str(heads[-1]) for heads in facts["sink_heads"].values())
        last = {name: number(value) for name, value in facts["last"].items()}
        lines = [
            f"{len(self.runs)} runs at step {self.steps[-1]:,}: {counts} sink heads.",
            f"  overlap of two runs' sink heads (Jaccard) {last['jaccard']}; "
            f"{last['jaccard_by_chance']} if heads of a layer were renumbered at random",
            f"  overlap of the counts by layer {last['jaccard_of_layers']}",
        ]
        for name, step in facts["formation_step"].items():
            when = "has no sink head" if step is None else f"formed at step {step:,}"
            lines.append(f"  {name}: {when}")
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Each run's count of sink heads, and each pair's overlaps, against the step."""
        from sinkscope.plot import training_curves

        frame = self.to_frame().dropna(subset="value")
        counts = [
            tidy({"metric": ["sink_heads"], "step": run.steps}).assign(
                run=name, value=run.sink_heads().sum((1, 2)).numpy()
            )
            for name, run in self.runs.items()
        ]
        curves = frame.assign(run=frame["run"] + " and " + frame["other"])
        curves = stacked([*counts, curves]).drop(columns="other")
        figure = training_curves(curves, about=self.about, log_steps=False, columns=2)
        return {"seeds": figure}


def same_heads(runs: Mapping[str, Dynamics]) -> SameHeads:
    """Compare the sink heads of several training runs of one architecture.

    Args:
        runs: The result of `dynamics` for each run, by name; same texts, steps and ε.

    Returns:
        The overlaps of every pair of runs at every step.

    Raises:
        ReportError: With fewer than two runs, or where steps, layers, heads, tokens or ε differ.
    """
    if len(runs) < 2:
        raise ReportError(f"Comparing seeds takes at least two runs, not {len(runs)}.")
    (first, one), *others = runs.items()
    for name, run in others:
        mine, theirs = _compared(one), _compared(run)
        if differs := [key for key in mine if mine[key] != theirs[key]]:
            key = differs[0]
            raise ReportError(
                f"Runs {first!r} and {name!r} differ in their {key} ({mine[key]} and "
                f"{theirs[key]}); follow both at the same steps, on the same texts."
            )
        for ours, other in zip(one.reports.values(), run.reports.values(), strict=True):
            if not ours.tokens.equal(other.tokens) or not ours.mask.equal(other.mask):
                raise ReportError(
                    f"Runs {first!r} and {name!r} were scanned on different tokens; follow both on "
                    "the same texts."
                )
    return SameHeads(about=f"{one.about} · {len(runs)} runs", runs=dict(runs))


def _compared(run: Dynamics) -> dict[str, Any]:
    settings = next(iter(run.reports.values())).settings
    return {
        "steps": run.steps,
        "layers": settings.n_layers,
        "heads": settings.n_heads,
        "ε": settings.epsilon,
    }
