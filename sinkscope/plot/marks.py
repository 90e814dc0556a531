"""Bars over positions: the sinks in one colour, everything else in another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from sinkscope.metrics.positions import uniform_received
from sinkscope.plot import figure as _figure
from sinkscope.plot.scales import Bins
from sinkscope.plot.theme import DARK, LIGHT, SEQUENTIAL, Palette, Theme, faded, palette
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport


# --- Lines with intervals, and their colours.

_POINTS = 80  # that are drawn as symbols
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "8px,2px", "2px,6px")


def band(
    figure: go.Figure,
    x: Any,
    interval: tuple[Any, Any, Any],
    *,
    name: str,
    colour: str,
    label: str,
    along: str,
    showlegend: bool = True,
    dash: str | None = None,
    entry: str | None = None,
    **place: int,
) -> None:
    """Add a line with its 95 % interval as a band behind it.

    Each colour of the palette has a symbol of its own, or a dash where there are too many points
    for symbols, so that lines are told apart without colours too.

    Args:
        figure: to add to.
        x: where [point].
        interval: (mean, low, high) over prompts [point]; nan ends draw no band.
        name: of the line, for legend and hover; Plotly text.
        colour: "#rrggbb".
        label: of y, with its unit, for the hover.
        along: word for x in the hover.
        showlegend: whether the line is in the legend.
        dash: Plotly's name of a dash, instead of the colour's own.
        entry: name in the legend, where it is not the hover's.
        place: row and col of a subplot.
    """
    entry = name if entry is None else entry
    few = len(x) <= _POINTS
    index = next((s.index(colour) for s in (LIGHT.series, DARK.series) if colour in s), 0)
    dash = dash or (None if few else _DASHES[index])
    x = np.asarray(x)
    middle, low, high = (np.asarray(end, dtype=float) for end in interval)
    known = np.isfinite(low) & np.isfinite(high)
    hover = f"{name}, {along} %{{x}}<br>{label}: %{{y:,.4~r}}"
    shown: dict[str, Any] = dict(hovertemplate=f"{hover}<extra></extra>")
    if known.any():
        figure.add_scatter(
            x=np.concatenate([x[known], x[known][::-1]]),
            y=np.concatenate([high[known], low[known][::-1]]),
            fill="toself", fillcolor=faded(colour, 0.18), mode="lines", line_width=0,
            hoverinfo="skip", showlegend=False, legendgroup=entry, **place,
        )  # fmt: skip
        ends = "<br>95 % interval: %{customdata[0]:,.4~r} to %{customdata[1]:,.4~r}"
        shown = dict(
            customdata=np.stack([low, high], axis=-1), hovertemplate=f"{hover}{ends}<extra></extra>"
        )
    figure.add_scatter(
        x=x, y=middle, mode="lines+markers" if few else "lines", name=entry,
        legendgroup=entry, showlegend=showlegend, marker=dict(size=6, symbol=_SYMBOLS[index]),
        line=dict(color=colour, width=2, dash=dash), **shown, **place,
    )  # fmt: skip


def graded(size: int, colours: Palette) -> list[str]:
    """Colours of as many lines in an order, first to last: viridis without the paper's end."""
    ends = (0.0, 0.9) if colours is LIGHT else (0.25, 1.0)
    points = np.linspace(*ends, max(size, 2)).tolist()
    return plotly.colors.sample_colorscale(plotly.colors.get_colorscale(SEQUENTIAL), points)[:size]


def bars(
    report: SinkReport | None,
    variable: Variable,
    places: Bins,
    values: np.ndarray,
    theme: Theme = None,
) -> go.Figure:
    """A bar a bin; the first trace holds the sinks, the second all others.

    Args:
        report: Whose sinks and tokens; without one, position 0 stands out and there are no tokens.
        variable: What is drawn, for its name and unit.
        places: The bins.
        values: Their heights [bin].
        theme: "light", "dark", or the default.
    """
    colours = palette(theme)
    sinks = [0] if report is None else _figure.sink_positions(report)
    first = "the first" if report is None else "sink"
    names = places.names() if report is None else hover_names(report, places)
    is_sink = np.isin(places.first, sinks)
    figure = go.Figure()
    for chosen, name, colour, outline in (
        (is_sink, first, colours.sink, 2),  # seen where a bar is thinner than a pixel
        (~is_sink, "other positions", colours.other, 0),
    ):
        figure.add_bar(
            x=places.first[chosen],
            width=places.width()[chosen],
            offset=-0.5,
            y=values[chosen],
            name=name,
            marker=dict(color=colour, line=dict(width=outline, color=colour)),
            text=[name for name, wanted in zip(names, chosen, strict=True) if wanted],
            textposition="none",
            hovertemplate=f"%{{text}}<br>{_figure.axis_label(variable)}: %{{y:,.4~r}}"
            "<extra></extra>",
        )
    figure.update_xaxes(
        title_text="position of the key" if "attention" in variable.name else "position",
        range=[-0.5 - 0.012 * places.size, places.size - 0.5],
        dtick=1 if places.size <= 10 else None,
    )
    figure.update_yaxes(title_text=_figure.axis_label(variable))
    return figure.update_layout(bargap=0, barmode="overlay")


def add_uniform(figure: go.Figure, places: Bins, level: np.ndarray, theme: Theme = None) -> None:
    """A dotted line where uniform attention would be [position]."""
    figure.add_scatter(
        x=places.first, y=places.maximum(level), mode="lines", name="uniform attention",
        line=dict(color=palette(theme).faint, dash="dot", width=1.5), hoverinfo="skip",
    )  # fmt: skip


def mark_few(figure: go.Figure, report: SinkReport, colours: Palette) -> None:
    """Shade the last quarter of a causal text, whose keys few queries see, and say so."""
    if (start := few_from(report)) is not None:
        figure.add_vrect(
            x0=start - 0.5, x1=report.sizes["position"] - 0.5, layer="below", line_width=0,
            fillcolor=faded(colours.faint, 0.16),
        )  # fmt: skip
        figure.update_xaxes(title_text=f"position of the key; {FEW.format(start)}")


def few_from(report: SinkReport) -> int | None:
    """Where the last quarter of a causal text begins; None of another, or of a very short one.

    What its keys receive is an average over few queries, above all their own.
    """
    size = report.sizes["position"]
    return size - size // 4 if report.settings.causal and size >= 4 else None


FEW = "from {:,} on seen by few queries"


def uniform_level(report: SinkReport, metric: str, layer: int) -> np.ndarray | None:
    """What uniform attention gives each position, mean over prompts [position]; None for norms."""
    if metric == "uniform_ratio":
        return np.ones(report.sizes["position"])
    if metric != "received_attention":
        return None
    settings = report.settings
    window = settings.windows[layer] if settings.windows else None
    return _figure.nanmean(to_numpy(uniform_received(report.mask, settings.causal, window)), 0)


def hover_names(report: SinkReport, places: Bins) -> list[str]:
    """Each bin in words, and the tokens of the bins that are one position; Plotly text."""
    alone = places.first == places.last
    tokens = iter(_figure.hover_tokens(report, places.first[alone].tolist()))
    return [
        f"{name}: {next(tokens)}" if single else name
        for name, single in zip(places.names(), alone, strict=True)
    ]
