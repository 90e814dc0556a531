"""What shifted rotary positions change in low precision (Wang et al. 2411.13476)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.lines import band
from sinkscope.plot.scales import log_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd


def shift_errors(
    frame: pd.DataFrame, shift: int | None = None, *, about: About, theme: Theme = None
) -> go.Figure:
    """How much of a query's attention a shift of all positions moves, along the text.

    Args:
        frame: One row per arithmetic, shift and bucket of queries: `RotaryPrecision.by_query`.
        shift: Which shift; the largest by default.
        about: A line with model, number of tokens and texts.
        theme: "light", "dark", or the default.

    Returns:
        One line per arithmetic against the position of the query, with a band for the 95 %
        interval.

    Raises:
        ReportError: If a column is missing, or there is no such shift.
    """
    columns = ("arithmetic", "shift", "query", "error", "error_low", "error_high")
    frames.need(frame, "shift_errors", *columns)
    rows, shift = _of_shift(frame, "shift_errors", shift)
    colours, figure = palette(theme), go.Figure()
    for index, (name, line) in enumerate(rows.groupby("arithmetic", sort=False)):
        ends = tuple(line[column].to_numpy() for column in columns[3:])
        band(
            figure, line["query"], ends, name=escaped(str(name)),
            colour=colours.series[index % len(colours.series)],
            label="Σ|ΔA|", along="from query",
        )  # fmt: skip
    edges = sorted(rows["query"].unique().tolist())
    figure.update_xaxes(
        title_text="query position, lower edge of the bucket", type="log",
        tickvals=edges, ticktext=[f"{edge:,}" for edge in edges],
    )  # fmt: skip
    figure.update_yaxes(
        title_text="Σ|ΔA| of a query [probability]", **log_scale(rows["error"].to_numpy())
    )
    title = f"Attention that a shift of {shift:,} positions moves"
    return finish(figure, title, about, theme, height=480)


def shift_errors_by_key(
    frame: pd.DataFrame, shift: int | None = None, *, about: About, theme: Theme = None
) -> go.Figure:
    """Where a shift of all positions changes attention: the mean error at every key.

    Args:
        frame: One row per arithmetic, shift and key: `RotaryPrecision.by_key`.
        shift: Which shift; the largest by default.
        about: A line with model, number of tokens and texts.
        theme: "light", "dark", or the default.

    Returns:
        One line per arithmetic against the position of the key.

    Raises:
        ReportError: If a column is missing, or there is no such shift.
    """
    frames.need(frame, "shift_errors_by_key", "arithmetic", "shift", "key", "error")
    rows, shift = _of_shift(frame, "shift_errors_by_key", shift)
    colours, figure = palette(theme), go.Figure()
    for index, (name, line) in enumerate(rows.groupby("arithmetic", sort=False)):
        name = escaped(str(name))
        figure.add_scatter(
            x=line["key"] + 1, y=line["error"], mode="lines", name=name,
            line=dict(color=colours.series[index % len(colours.series)], width=1.5),
            customdata=line["key"],
            hovertemplate=f"{name}, key %{{customdata:,}}<br>|ΔA|: %{{y:.3~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="key position + 1", **log_scale(rows["key"].to_numpy() + 1))
    figure.update_yaxes(
        title_text="mean |ΔA| at the key [probability]", **log_scale(rows["error"].to_numpy())
    )
    title = f"Where a shift of {shift:,} positions changes attention"
    return finish(figure, title, about, theme, height=480)


def _of_shift(frame: pd.DataFrame, figure: str, shift: int | None) -> tuple[pd.DataFrame, int]:
    """The rows of a shift that have an error above 0, as a logarithmic axis needs."""
    there = sorted(frame["shift"].unique().tolist())
    chosen = there[-1] if shift is None else shift
    if chosen not in there:
        raise ReportError(
            f"{figure}: shift is {chosen}; expected one of {', '.join(map(str, there))}."
        )
    rows = frame[(frame["shift"] == chosen) & np.isfinite(frame["error"]) & (frame["error"] > 0)]
    return rows, int(chosen)
