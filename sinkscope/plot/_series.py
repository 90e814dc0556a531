"""Lines with intervals, and their colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from sinkscope.plot.theme import LIGHT, SEQUENTIAL, Palette, faded


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

    Args:
        figure: to add to.
        x: where [point].
        interval: (mean, low, high) over prompts [point]; nan ends draw no band.
        name: of the line, for legend and hover; Plotly text.
        colour: "#rrggbb".
        label: of y, with its unit, for the hover.
        along: word for x in the hover.
        showlegend: whether the line is in the legend.
        dash: Plotly's name of a dash.
        entry: name in the legend, where it is not the hover's.
        place: row and col of a subplot.
    """
    entry = name if entry is None else entry
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
        x=x, y=middle, mode="lines+markers" if len(x) <= 80 else "lines", name=entry,
        legendgroup=entry, showlegend=showlegend, marker_size=5,
        line=dict(color=colour, width=2, dash=dash), **shown, **place,
    )  # fmt: skip


def graded(size: int, colours: Palette) -> list[str]:
    """Colours of as many lines in an order, first to last: viridis without the paper's end."""
    ends = (0.0, 0.9) if colours is LIGHT else (0.25, 1.0)
    points = np.linspace(*ends, max(size, 2)).tolist()
    return plotly.colors.sample_colorscale(plotly.colors.get_colorscale(SEQUENTIAL), points)[:size]
