"""Lines with 95 % intervals, distinguished by colour, symbol and dash."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from sinkscope.plot.theme import DARK, LIGHT, SEQUENTIAL, faded

_POINTS = 80  # most points drawn as symbols
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

    Each colour of the palette has its own symbol, or its own dash if there are too many points for
    symbols, so that lines can be distinguished without colour.

    Args:
        figure: to add to.
        x: where [point].
        interval: (mean, low, high) over prompts [point]; nan ends draw no band.
        name: name of the line, for legend and hover; Plotly text.
        colour: "#rrggbb".
        label: label of y with its unit, for the hover.
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


def graded(size: int) -> list[str]:
    """Return colours for an ordered set of lines: viridis, visible on light and dark."""
    points = np.linspace(0.2, 0.9, max(size, 2)).tolist()
    return plotly.colors.sample_colorscale(plotly.colors.get_colorscale(SEQUENTIAL), points)[:size]
