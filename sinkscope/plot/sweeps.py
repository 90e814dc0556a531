"""Figures of many reports: a metric along the grid of a sweep, and small head maps side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.errors import ReportError
from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.heads import of_heads
from sinkscope.plot.labels import About, axis_label, escaped, heading, in_words
from sinkscope.plot.lines import band
from sinkscope.plot.scales import colour_scale, value_range
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.report.report import SinkReport

GRID = ("model", "checkpoint", "texts", "length", "intervention")
_AXES = {"checkpoint": "training step", "length": "T [tokens]"}
_MOST = 60  # head maps in one figure


def sweep_curves(
    frame: pd.DataFrame, along: str = "checkpoint", *, about: About, theme: Theme = None
) -> go.Figure:
    """A metric's mean with its interval against one column of a sweep; the others are lines.

    The frame is what `Cells.means` gives, one row per cell:

    ================ ===== ======================================================================
    column           type  meaning
    ================ ===== ======================================================================
    model, texts,    str   the grid; a line for each combination of those that vary, but `along`
    intervention
    checkpoint,      int
    length
    metric           str   the field; one alone
    mean, low, high  float over prompts, with the 95 % interval
    ================ ===== ======================================================================

    Args:
        frame: As above.
        along: The column on the x axis; checkpoints and lengths are drawn to scale.
        about: A line on the sweep.
        theme: "light", "dark", or the default.

    Returns:
        One line per combination of the other columns, with a band for the 95 % interval.

    Raises:
        ReportError: If a column is missing, or `along` is empty in every row.
    """
    frames.need(frame, "sweep_curves", along, "metric", "mean", "low", "high")
    frame = frame[frame[along].notna()]
    if frame.empty:
        raise ReportError(f"No cell has a {along}, so there is nothing to draw along it.")
    (metric,) = frame["metric"].unique() if frame["metric"].nunique() == 1 else (None,)
    if metric is None:
        raise ReportError("sweep_curves draws one metric; choose its rows of the frame first.")
    colours = palette(theme)
    others = [
        one
        for one in GRID
        if one != along and one in frame and frame[one].astype(str).nunique() > 1
    ]
    named = frame.assign(
        _line=[
            " · ".join(_said(one, value) for one, value in zip(others, row, strict=True))
            for row in frame[others].itertuples(index=False)
        ]
        if others
        else ""
    )
    figure = go.Figure()
    for index, (name, line) in enumerate(named.groupby("_line", sort=False)):
        line = line.sort_values(along) if along in _AXES else line
        x = line[along] if along in _AXES else line[along].map(lambda text: escaped(str(text)))
        band(
            figure, x, (line["mean"], line["low"], line["high"]),
            name=escaped(str(name)) or in_words(metric),
            colour=colours.series[index % len(colours.series)], label=frames.label_of(metric),
            along=in_words(along), showlegend=bool(others),
        )  # fmt: skip
    figure.update_xaxes(title_text=_AXES.get(along, in_words(along)))
    if along == "length":
        figure.update_xaxes(type="log", tickvals=sorted(frame[along].unique().tolist()))
    figure.update_yaxes(title_text=frames.label_of(metric))
    return finish(figure, f"{heading(metric)} by {in_words(along)}", about, theme)


def _said(column: str, value: object) -> str:
    if column == "length":
        return f"T = {value}"
    return f"step {value}" if column == "checkpoint" else str(value)


def head_maps(
    reports: Mapping[str, SinkReport],
    metric: str = "sink_attention",
    *,
    about: About,
    columns: int = 5,
    theme: Theme = None,
) -> go.Figure:
    """Head maps of several reports, small and in one colour scale.

    Args:
        reports: Reports by the titles of their maps.
        metric: A field with one value per head; see `head_map`.
        about: A line on the measurement.
        columns: Maps in a row.
        theme: "light", "dark", or the default.

    Returns:
        One panel per report, each a heatmap of layers × heads, in one scale of colours.

    Raises:
        ReportError: If there is none, there are more than 60, or a report lacks the metric.
    """
    if not 0 < len(reports) <= _MOST:
        raise ReportError(
            f"head_maps draws 1 to {_MOST} reports, and was given {len(reports)}; choose some, for "
            "all of them see `sinkscope atlas`."
        )
    maps = {name: of_heads(report, metric) for name, report in reports.items()}
    variable = next(iter(maps.values()))[0]
    values = [interval.mean for _, interval in maps.values()]
    low, high = value_range(np.concatenate([x.ravel() for x in values]), variable.unit)
    columns = min(columns, len(values))
    lines = -(-len(values) // columns)
    figure = make_subplots(
        lines, columns, subplot_titles=[escaped(name) for name in maps],
        horizontal_spacing=0.15 / columns, vertical_spacing=min(0.3, 0.35 / lines),
    )  # fmt: skip
    for index, mean in enumerate(values):
        place = dict(row=index // columns + 1, col=index % columns + 1)
        figure.add_heatmap(
            z=mean, coloraxis="coloraxis", **place,
            hovertemplate=f"layer %{{y}}, {in_words(variable.dims[-1])} %{{x}}<br>"
            f"{axis_label(variable)}: %{{z:,.4~r}}<extra></extra>",
        )  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.update_xaxes(showgrid=False, showticklabels=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, showticklabels=False, zeroline=False)
    figure.update_layout(
        coloraxis=dict(
            cmin=low, cmax=high, colorscale=colour_scale(low < 0, palette(theme)),
            colorbar=dict(title=dict(text=axis_label(variable), side="right")),
        )
    )  # fmt: skip
    title = f"{heading(metric)} of every head: rows are layers"
    return finish(figure, title, about, theme, height=150 + 170 * lines)
