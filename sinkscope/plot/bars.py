"""Bars over positions: the sinks in one colour, everything else in another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope.metrics.positions import uniform_received
from sinkscope.plot.bins import Bins
from sinkscope.plot.labels import axis_label, hover_tokens
from sinkscope.plot.theme import Palette, Theme, faded, palette
from sinkscope.plot.values import nanmean, sink_positions
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport


_BARS = 128  # most bars drawn one by one


def bars(
    report: SinkReport | None,
    variable: Variable,
    places: Bins,
    values: np.ndarray,
    theme: Theme = None,
) -> go.Figure:
    """Draw a bar per bin; the first trace has the sinks, the second all others.

    Of more than 128 bins the others are one line, and the sinks are dots on it.

    Args:
        report: For its sinks and tokens; without one, position 0 is the sink and there are no
            tokens.
        variable: The quantity drawn, for its name and unit.
        places: The bins.
        values: Their heights [bin].
        theme: "light", "dark", or the default.
    """
    colours = palette(theme)
    sinks = [0] if report is None else sink_positions(report)
    first = "the first" if report is None else "sink"
    names = places.names() if report is None else hover_names(report, places)
    is_sink = np.isin(places.first, sinks)
    as_line = len(places.first) > _BARS
    figure = go.Figure()
    for chosen, name, colour, outline in (
        (is_sink, first, colours.sink, 2),  # visible where a bar is thinner than a pixel
        (~is_sink, "other positions", colours.other, 0),
    ):
        shown: dict[str, Any] = dict(
            x=places.first[chosen],
            y=values[chosen],
            name=name,
            text=[name for name, wanted in zip(names, chosen, strict=True) if wanted],
            hovertemplate=f"%{{text}}<br>{axis_label(variable)}: %{{y:,.4~r}}<extra></extra>",
        )
        if as_line:
            mode = "markers" if outline else "lines"
            figure.add_scatter(
                **shown, mode=mode, marker=dict(color=colour, size=9), line=dict(color=colour)
            )
            continue
        figure.add_bar(
            **shown,
            width=places.width()[chosen],
            offset=-0.5,
            marker=dict(color=colour, line=dict(width=outline, color=colour)),
            textposition="none",
        )
    figure.update_yaxes(rangemode="tozero")
    if as_line:  # the hover appears anywhere in a point's column
        figure.update_layout(hovermode="x", hoverdistance=5)
    figure.update_xaxes(
        title_text="position of the key" if "attention" in variable.name else "position",
        range=[-0.5 - 0.012 * places.size, places.size - 0.5],
        dtick=1 if places.size <= 10 else None,
    )
    figure.update_yaxes(title_text=axis_label(variable))
    return figure.update_layout(bargap=0, barmode="overlay")


def add_uniform(figure: go.Figure, places: Bins, level: np.ndarray, theme: Theme = None) -> None:
    """Add a dotted line at the level of uniform attention [position]."""
    figure.add_scatter(
        x=places.first, y=places.maximum(level), mode="lines", name="uniform attention",
        line=dict(color=palette(theme).faint, dash="dot", width=1.5), hoverinfo="skip",
    )  # fmt: skip


def mark_few(figure: go.Figure, report: SinkReport, colours: Palette) -> None:
    """Shade and label the last quarter of a causal text, whose keys few queries see."""
    if (start := few_from(report)) is not None:
        figure.add_vrect(
            x0=start - 0.5, x1=report.sizes["position"] - 0.5, layer="below", line_width=0,
            fillcolor=faded(colours.faint, 0.16),
        )  # fmt: skip
        figure.update_xaxes(title_text=f"position of the key; {FEW.format(start)}")


def few_from(report: SinkReport) -> int | None:
    """Return where the last quarter of a causal text begins; None for other or very short texts.

    The attention that its keys receive is an average over few queries.
    """
    size = report.sizes["position"]
    return size - size // 4 if report.settings.causal and size >= 4 else None


FEW = "from {:,} on seen by few queries"


def uniform_level(report: SinkReport, metric: str, layer: int) -> np.ndarray | None:
    """Uniform attention to each position, mean over prompts [position]; None for norms."""
    if metric == "uniform_ratio":
        return np.ones(report.sizes["position"])
    if metric != "received_attention":
        return None
    settings = report.settings
    window = settings.windows[layer] if settings.windows else None
    return nanmean(to_numpy(uniform_received(report.mask, settings.causal, window)), 0)


def hover_names(report: SinkReport, places: Bins) -> list[str]:
    """Name each bin in Plotly text, with the token of bins that are a single position."""
    alone = places.first == places.last
    tokens = iter(hover_tokens(report, places.first[alone].tolist()))
    return [
        f"{name}: {next(tokens)}" if single else name
        for name, single in zip(places.names(), alone, strict=True)
    ]
