"""Finish a figure: title, line with the settings of the measurement, theme."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from sinkscope.plot.labels import About, about_line
from sinkscope.plot.theme import Theme, template

ROOM = 76  # pixels above the plot for the title and the line under it
_WIDTH = 800  # pixels of a plot in a figure 900 wide, between its margins
_KEY, _LETTER, _SMALL = 45, 8, 6  # pixels of a legend's key, and of a letter there and in `about`
_ROW, LINE = 20, 15  # pixels of a row of the legend, and of a further line of `about`
_SWITCH = 44  # pixels of the buttons of `log_switch`, between the plot and a legend below it
_DOT = " · "


def finish(
    figure: go.Figure,
    title: str,
    about: About,
    theme: Theme = None,
    *,
    height: int = 440,
) -> go.Figure:
    """Set a figure's title, the line with the settings of the measurement, and the theme.

    Args:
        figure: with traces and axis titles.
        title: what it shows; Plotly text, in which user input has to be escaped.
        about: settings of the report, or a line of text.
        theme: "light", "dark" or the default.
        height: in pixels; the width follows the page.
    """
    line = _broken(about_line(about))
    figure.update_layout(
        template=template(theme), title=dict(text=title, subtitle=dict(text=line)), height=height
    )
    above = ROOM + LINE * line.count("<br>")
    rows, panels = _legend_rows(figure), _has_panels(figure)
    if rows > 1 or (rows and panels):  # no room between the title and what is below it
        switch = _SWITCH if figure.layout.updatemenus else 0
        figure.update_layout(
            legend=dict(yref="container", y=0.01),
            margin_b=76 + _ROW * rows + switch,
            height=height + _ROW * (rows - 1) + switch,
        )
    elif rows:
        above += 24
    return figure.update_layout(margin_t=above + (22 if panels else 0))


def _broken(line: str) -> str:
    """Break the line about a figure into Plotly lines of at most `_WIDTH`."""
    lines = [""]
    for part in line.split(_DOT):
        longer = f"{lines[-1]}{_DOT}{part}" if lines[-1] else part
        if len(longer) <= _WIDTH // _SMALL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(part)
    return "<br>".join(lines)


def _legend_rows(figure: go.Figure) -> int:
    """Rows of the legend in a figure of the width that `plot.save` writes; 0 without one.

    Plotly puts all entries in one row, or gives each as much room as the longest needs.
    """
    lines = [trace for trace in figure.data if trace.type in ("scatter", "bar")]
    names = {t.legendgroup or t.name: len(t.name or "") for t in lines if t.showlegend is not False}
    if len(lines) < 2 or not names:
        return 0
    widths = [_KEY + _LETTER * length for length in names.values()]
    if sum(widths) <= _WIDTH:
        return 1
    return -(-len(widths) // max(1, _WIDTH // max(widths)))


def _has_panels(figure: go.Figure) -> bool:
    """Whether the figure is divided into panels with their own titles."""
    return "xaxis2" in figure.layout


def tick_step(size: int) -> int:
    """Spacing of the ticks of an axis of indices, so that about twenty are drawn."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if size <= 20 * step)


def layer_ticks(size: int) -> dict[str, int]:
    """Ticks of an axis of layers: Plotly's own, but never between two layers."""
    return dict(dtick=1) if size <= 10 else {}


def layer_bar(size: int) -> dict[str, Any]:
    """Colour bar of dots coloured by layer."""
    return dict(title=dict(text="layer", side="top"), **layer_ticks(size))
