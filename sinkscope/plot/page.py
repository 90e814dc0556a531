"""The one-file report: a page that needs no kernel and no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.plot.heads import head_map

if TYPE_CHECKING:
    from sinkscope.report import SinkReport


def to_html(report: SinkReport) -> str:
    """A self-contained HTML page of a report, Plotly's code included."""
    return head_map(report).to_html(include_plotlyjs=True, config=dict(displaylogo=False))
