"""The page of two reports of the same tokens: what changed, head by head and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinkscope.html import experiment_page
from sinkscope.plot import heads, layers
from sinkscope.plot.labels import differences
from sinkscope.report.headline import headline

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from sinkscope.report.comparison import Comparison

_MAPS = ("sink_attention", "sink_logit_gap", "value_drain", "honor")
_LINES = ("residual_peak", "sink_attention", "value_drain")


def to_html(comparison: Comparison) -> str:
    """A self-contained page of what changed from one report to another.

    Args:
        comparison: What `compare` gave.

    Returns:
        The page, in the look of an experiment's.
    """
    return experiment_page.to_html(_Changes(comparison))


@dataclass(frozen=True)
class _Changes:
    """Adapts a comparison to the page of an experiment."""

    comparison: Comparison
    QUESTION = "What changed?"

    @property
    def about(self) -> str:
        """The settings that both reports share."""
        return differences([self.comparison.before, self.comparison.after])

    def summary(self) -> str:
        """Both headlines and the table of changes."""
        both = {"Before": self.comparison.before, "After": self.comparison.after}
        said = [f"{name}: {headline(report)}" for name, report in both.items()]
        title, *table = repr(self.comparison).splitlines()
        return "\n".join([*said, title, *(f" {line}" for line in table)])

    def figures(self) -> dict[str, go.Figure]:
        """A map of the change in each shared metric, and curves of both reports over layers."""
        before, after = self.comparison.before, self.comparison.after
        drawn = {
            name: heads.head_change(before, after, name)
            for name in _MAPS
            if name in self.comparison.names
        }
        both = {"before": before, "after": after}
        for name in _LINES:
            if name in self.comparison.names:
                drawn[f"{name} by layer"] = layers.by_layer(both, name)
        return drawn
