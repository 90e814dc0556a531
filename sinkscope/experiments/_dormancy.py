"""What `dormancy` finds: tables, words and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope._bootstrap import bootstrap
from sinkscope.errors import ReportError
from sinkscope.experiments import _result
from sinkscope.experiments._removed import Removal
from sinkscope.experiments._result import Result
from sinkscope.experiments._statistics import max_t, rank_correlation
from sinkscope.metrics.heads import INACTIVE_IF, is_active_dormant, is_dormant
from sinkscope.report import SinkReport

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FIELDS = ("sink_attention", "attention_entropy", "head_output_norm", "honor")
"""Figures of the report that stand beside the thirteen scores."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dormancy(Result):
    """Heads on several kinds of text, and what removing them costs there.

    Attributes:
        reports: The scan of each domain.
        p_values: Of a difference in sink attention, by pair of domains, corrected for heads and
            pairs [layer head].
        removals: By mode, then domain; empty where nothing was removed.
        parked: Mean sink attention above which a head counts as dormant [probability].
        drop: How much less counts as active [probability].
        level: Probability of naming even one head wrongly.
    """

    QUESTION = "Which heads sleep on one kind of text and work on another?"

    reports: dict[str, SinkReport]
    p_values: dict[tuple[str, str], Tensor]
    removals: dict[str, dict[str, Removal]]
    parked: float
    drop: float
    level: float

    def dormant(self, domain: str) -> Tensor:
        """Heads whose mean sink attention on a domain is above `parked` [layer head]."""
        return is_dormant(self.reports[domain].mean("sink_attention"), self.parked)

    def differing(self) -> list[dict[str, Any]]:
        """The heads that are dormant on one domain and active on another, largest drop first.

        Returns:
            Records of layer, head, dormant_on, active_on, the sink attention on either with its
            interval, and p; after a removal, for each mode, on either domain the cost (mean change
            of the loss) and the effect (mean size of that change in a prompt: a head that helps
            here and harms there is at work), and p of a difference in effect, corrected for the
            heads of this list. `confirmed`: the effect is larger where the head is active. Effects
            are compared in units of each domain's `typical_effect`, or else a kind of text on which
            every head matters more would confirm them all.
        """
        found = []
        for (one, other), p in self.p_values.items():
            for here, there in ((one, other), (other, one)):
                found += self._parked(here, there, p)
        for mode, removed in self.removals.items():
            _add_costs(found, removed, mode, self)
        return sorted(found, key=lambda head: head["sink_attention"][1].mean - _parked_at(head))

    def _parked(self, here: str, there: str, p: Tensor) -> list[dict[str, Any]]:
        """Heads that are dormant here and active there."""
        one, other = (self.reports[name]["sink_attention"] for name in (here, there))
        heads = is_active_dormant(one, other, self.parked, self.drop) & (p < self.level)
        return [
            {
                "layer": layer,
                "head": head,
                "dormant_on": here,
                "active_on": there,
                "sink_attention": (
                    _result.estimate(one[:, layer, head]),
                    _result.estimate(other[:, layer, head]),
                ),
                "p": float(p[layer, head]),
            }
            for layer, head in heads.nonzero().tolist()
        ]

    def frame(self) -> pd.DataFrame:
        """One row a head and domain.

        Returns:
            domain, layer, head; sink_attention, attention_entropy, head_output_norm, honor and the
            thirteen inactivity scores, each with its 95 % interval in ``…_low`` and ``…_high``;
            dormant (on this domain); differs (dormant on one domain and active on another, the same
            in all rows of a head) and p (the smallest over pairs); after a removal
            ``loss_change_MODE`` with its interval.
        """
        return self._table({})

    def _table(self, prompts: Mapping[str, Any]) -> pd.DataFrame:
        """`frame`, of each domain on some of its prompts; on all where none are named."""
        import pandas as pd

        pieces = []
        p = torch.stack(list(self.p_values.values())).amin(dim=0)
        differs = torch.zeros_like(p, dtype=torch.bool)
        for head in self.differing():
            differs[head["layer"], head["head"]] = True
        for domain, report in self.reports.items():
            layers, heads = differs.shape
            some = prompts.get(domain, slice(None))
            columns = _result.grid(domain=[domain], layer=range(layers), head=range(heads))
            for name, figures in _per_head(report).items():
                columns |= _with_ends(name, figures[some])
            columns["dormant"] = self.dormant(domain).flatten().numpy()
            columns["differs"], columns["p"] = differs.flatten().numpy(), _result.flat(p)
            for mode, removed in self.removals.items():
                columns |= _with_ends(f"loss_change_{mode}", removed[domain].loss_change[some])
            pieces.append(pd.DataFrame(columns))
        return pd.concat(pieces, ignore_index=True)

    def removal_frame(self, mode: str) -> pd.DataFrame:
        """`frame`, with one mode's costs as loss_change, as `plot.removal_cost` takes it.

        Costs and figures are of the prompts on which every head was removed, as in `prediction`.

        Raises:
            ReportError: If heads were not removed in this mode.
        """
        prefix = f"loss_change_{mode}"
        names = {f"{prefix}{end}": f"loss_change{end}" for end in ("", "_low", "_high")}
        return self._table(self._whole(mode)).rename(columns=names).assign(mode=mode)

    def _whole(self, mode: str) -> dict[str, Bool[Tensor, "prompt"]]:
        """The prompts of each domain on which every head was removed."""
        return {
            domain: ~removed.loss_change.flatten(1).isnan().any(dim=1)
            for domain, removed in self._removed(mode).items()
        }

    def prediction(self, mode: str, of: str = "cost") -> pd.DataFrame:
        """How well each figure ranks heads by what their removal does.

        Args:
            mode: Of the removal.
            of: "cost", the mean change of the loss; or "effect", the mean size of that change in a
                prompt, whether the head helped or harmed.

        Returns:
            score, domain, Spearman's rho over heads with its 95 % interval over prompts (low,
            high), and `expected`, the sign it has if inactive heads are those that do little.

        Raises:
            ReportError: If heads were not removed in this mode, or there is no such figure.
        """
        import pandas as pd

        if of not in ("cost", "effect"):
            raise ReportError(f"There is no {of!r} of a removal; ask for its cost or its effect.")
        rows = []
        for domain, whole in self._whole(mode).items():
            change = self.removals[mode][domain].loss_change.flatten(1)
            change = change if of == "cost" else change.abs()
            for name, figures in _per_head(self.reports[domain]).items():
                if name in FIELDS[1:]:
                    continue
                rho = rank_correlation(figures.flatten(1)[whole], change[whole])
                sign = -1 if INACTIVE_IF.get(name, "above") == "above" else 1
                rows.append(
                    {"score": name, "domain": domain, "rho": rho.mean, "low": rho.low}
                    | {"high": rho.high, "expected": sign}
                )
        return pd.DataFrame(rows)

    def typical_effect(self, mode: str) -> dict[str, float]:
        """How far removing the median head moves a prompt's loss, by domain [nat].

        Mean over the prompts on which every head was removed; nan if there are none.

        Raises:
            ReportError: If heads were not removed in this mode.
        """
        found = {}
        for domain, whole in self._whole(mode).items():
            effect = self.removals[mode][domain].loss_change.flatten(1).abs()
            found[domain] = float(effect[whole].median(dim=1).values.mean())
        return found

    def _removed(self, mode: str) -> dict[str, Removal]:
        if mode not in self.removals:
            raise ReportError(
                f"No head was removed with mode {mode!r} here; ask dormancy(..., remove={mode!r})."
            )
        return self.removals[mode]

    def figures(self) -> dict[str, go.Figure]:
        """A domain against another, head by head; and cost against sink attention, by mode."""
        from sinkscope.plot import domain_scatter, removal_cost

        frame = self.frame()
        figures = {
            f"{one}-{other}": domain_scatter(frame, one, other, about=self.about)
            for one, other in self.p_values
        }
        for mode in self.removals:
            counts = {int(whole.sum()) for whole in self._whole(mode).values()}
            on = " or ".join(_result.counted(n, "prompt") for n in sorted(counts))
            line = f"{self.about} · removed: {mode}, on {on} of each"
            figures[f"removal-{mode}"] = removal_cost(self.removal_frame(mode), about=line)
        return figures

    def findings(self) -> dict[str, Any]:
        """Counts, the heads that differ, and how well figures predict what removal costs."""
        return {
            "heads": int(next(iter(self.p_values.values())).numel()),
            "dormant": {domain: int(self.dormant(domain).sum()) for domain in self.reports},
            "significant": {
                f"{one} / {other}": int((p < self.level).sum())
                for (one, other), p in self.p_values.items()
            },
            "differing": self.differing(),
            "prediction": {
                mode: {
                    of: self.prediction(mode, of).to_dict("records") for of in ("cost", "effect")
                }
                for mode in self.removals
            },
            "typical_effect": {mode: self.typical_effect(mode) for mode in self.removals},
            "untouched_loss": {
                mode: {domain: _result.estimate(one.loss) for domain, one in removed.items()}
                for mode, removed in self.removals.items()
            },
        }

    def summary(self) -> str:
        """What sleeps where, whether the loss agrees, and what predicts it."""
        from sinkscope.experiments._dormancy_words import summary

        return summary(self)


def _per_head(report: SinkReport) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """Everything that is kept of a head on a domain, by name."""
    return {name: report[name] for name in FIELDS} | report.inactivity_scores()


def _with_ends(name: str, figures: Float[Tensor, "prompt layer head"]) -> dict[str, Any]:
    mean, low, high = bootstrap(figures)
    columns = {name: mean, f"{name}_low": low, f"{name}_high": high}
    return {title: _result.flat(column) for title, column in columns.items()}


def _parked_at(head: Mapping[str, Any]) -> float:
    return head["sink_attention"][0].mean


def _add_costs(
    heads: list[dict[str, Any]], removed: Mapping[str, Removal], mode: str, found: Dormancy
) -> None:
    """Write into the records what removing each head does where it sleeps and where it works."""
    typical = found.typical_effect(mode).items()
    unit = {domain: effect if effect > 0 else 1.0 for domain, effect in typical}  # nan is not
    pairs = {(head["dormant_on"], head["active_on"]) for head in heads}
    for pair in pairs:
        own = [head for head in heads if (head["dormant_on"], head["active_on"]) == pair]
        layers, numbers = ([head[at] for head in own] for at in ("layer", "head"))
        asleep, awake = (removed[domain].loss_change[:, layers, numbers] for domain in pair)
        units = unit[pair[0]], unit[pair[1]]
        # Each pair and direction is a family of its own: Bonferroni over them.
        p = (max_t(awake.abs() / units[1], asleep.abs() / units[0]) * len(pairs)).clamp(max=1)
        for index, head in enumerate(own):
            changes = asleep[:, index], awake[:, index]
            effects = tuple(_result.estimate(change.abs()) for change in changes)
            more = effects[1].mean / units[1] > effects[0].mean / units[0]
            head[mode] = {
                "cost": tuple(_result.estimate(change) for change in changes),
                "effect": effects,
                "p": float(p[index]),
                "confirmed": bool(more and p[index] < found.level),
            }
