"""Panels of an intervention's conditions, side by side (Yan et al. 2407.01601, Figs. 3 and 4)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.errors import ReportError
from sinkscope.plot import frames
from sinkscope.plot.bins import bins
from sinkscope.plot.figure import finish, layer_ticks
from sinkscope.plot.labels import About, differences, escaped, heading
from sinkscope.plot.lines import band
from sinkscope.plot.positions import mean_over_heads
from sinkscope.plot.scales import y_scale
from sinkscope.plot.theme import Palette, Theme, palette
from sinkscope.plot.values import require_report

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.report.report import SinkReport

COLUMNS = ("condition", "prompt", "layer", "position", "metric", "value")
_ABREAST = 6  # conditions whose names fit side by side
_PANEL, _GAP = 190, 50  # pixels of a panel, and between two of them
_SHORT = 36  # characters of a panel's title that fit over it in a figure 640 pixels wide
LOG_METRICS = ("residual_norm", "residual_peak", "sink_residual_norm")


def before_after(
    frame: pd.DataFrame | Mapping[str, SinkReport],
    metric: str,
    *,
    about: About | None = None,
    by: Literal["position", "layer", "condition"] = "position",
    positions: Sequence[int] | None = None,
    log: bool | None = None,
    columns: int = 2,
    title: str | None = None,
    theme: Theme = None,
) -> go.Figure:
    """One panel per condition: the effect of an intervention on every sequence.

    The frame is tidy, one row per observation, and may hold several metrics:

    ========== ======= ===========================================================================
    column     type    meaning
    ========== ======= ===========================================================================
    condition  str     title of the panel, for example "special start · 255 designated"; panels are
                       in the order in which conditions first appear
    prompt     int     sequence; one colour each
    layer      int     block; -1 where the metric has none (a loss)
    position   int     position it was read at; -1 where the metric has none (a loss)
    metric     str     a field of the report ("received_attention", "value_norm", "residual_norm",
                       …), or "loss"; it determines the unit
    value      float   the value; heads already averaged
    ========== ======= ===========================================================================

    Args:
        frame: As above; or reports by the name of their condition, such as {"before": one,
            "after": other}, whose values by position are drawn, mean over prompts and heads.
        metric: Which metric's rows to draw.
        about: Settings of one of the reports, or a line with model, T, BOS and ε; for reports, by
            default what they share.
        by: What runs along x. "position": a dot per sequence and position, mean over the layers in
            the frame, as in the paper's scatter panels. "layer": mean over sequences with its 95 %
            interval, one line per position. "condition": one panel, one line per sequence through
            all conditions, and the mean with its interval; for metrics without layer and position.
        positions: The positions to highlight, such as (0, 255): labelled with by="position", the
            lines to draw with by="layer". By default those whose mean is largest in any condition.
        log: Whether y is logarithmic; by default for residual norms and peaks.
        columns: Panels in a row.
        title: What the figure shows; the metric and what runs along x by default. Use it to tell
            several figures of one metric apart.
        theme: "light", "dark", or the default.

    Returns:
        One panel per condition, with dots or lines as `by` says; one panel alone with
        by="condition".

    Raises:
        ReportError: If a column, the metric, or all rows are missing.
    """
    if isinstance(frame, Mapping):
        if not frame:
            raise ReportError("before_after was given no report.")
        for name, report in frame.items():
            require_report(f"the report {name!r}", report)
        about = differences(list(frame.values())) if about is None else about
        frame = _frame_of(frame, metric)
    if about is None:
        raise ReportError("A frame does not record what it was measured on; pass about=.")
    frames.need(frame, "before_after", *COLUMNS)
    rows = frames.pick(frame, "metric", metric)
    colours = palette(theme)
    marked = list(positions) if positions is not None else _prominent(rows)
    if by == "condition":
        figure = _conditions(rows, metric, colours)
        conditions = rows["condition"].nunique()
        height = 200 + 36 * conditions if conditions > _ABREAST else 440
    else:
        conditions = list(dict.fromkeys(rows["condition"]))
        columns = min(columns, len(conditions))
        lines = -(-len(conditions) // columns)
        figure = make_subplots(
            lines, columns, shared_xaxes="all", shared_yaxes="all",
            subplot_titles=[escaped(str(c)) for c in conditions],
            horizontal_spacing=0.04, vertical_spacing=_GAP / (_GAP + _PANEL) / lines,
        )  # fmt: skip
        draw = _positions if by == "position" else _layers
        for index, condition in enumerate(conditions):
            place = dict(row=index // columns + 1, col=index % columns + 1)
            draw(figure, rows[rows["condition"] == condition], metric, marked, place, colours)
        for column in range(columns):  # the lowest panel of each column
            lowest = (len(conditions) - 1 - column) // columns + 1
            figure.update_xaxes(title_text=by, showticklabels=True, row=lowest, col=column + 1)
        if by == "layer":
            figure.update_xaxes(**layer_ticks(rows["layer"].nunique()))
        figure.update_yaxes(title_text=frames.label_of(metric), row=(lines + 1) // 2, col=1)
        longest = max(len(str(condition)) for condition in conditions)
        figure.update_annotations(font_size=13 if longest <= _SHORT else 11)
        height = 170 + (_PANEL + _GAP) * lines
    if log if log is not None else metric in LOG_METRICS:
        downwards = figure.layout.yaxis.type == "category"
        (figure.update_xaxes if downwards else figure.update_yaxes)(**y_scale(True))
    title = f"{heading(metric)} by {by}" if title is None else title
    return finish(figure, escaped(title), about, theme, height=height)


def _frame_of(reports: Mapping[str, SinkReport], metric: str) -> pd.DataFrame:
    """Return the rows of reports: each layer and position, mean over prompts and heads."""
    import pandas as pd

    pieces = []
    for condition, report in reports.items():
        dims = report._require(metric).dims
        if dims[0] != "layer" or dims[-1] != "position":
            raise ReportError(
                f"{metric} has the dimensions {' '.join(dims)}; before_after draws reports' "
                "figures with layer and position, such as received_attention; by_layer draws those "
                "with prompt and layer."
            )
        values = mean_over_heads(report, metric)
        layer, position = np.indices(values.shape)
        columns = dict(layer=layer.ravel(), position=position.ravel(), value=values.ravel())
        pieces.append(pd.DataFrame(columns).assign(condition=condition, prompt=0, metric=metric))
    return pd.concat(pieces, ignore_index=True)


def _positions(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    marked: list[int],
    place: dict[str, int],
    colours: Palette,
) -> None:
    """Draw a dot per sequence and position, the prominent positions in the sink's colour."""
    table = rows.groupby(["prompt", "position"], as_index=False)["value"].mean()
    for index, (prompt, own) in enumerate(table.groupby("prompt")):
        at, values = own["position"].to_numpy(), own["value"].to_numpy()
        shown = bins(len(at), keep=[int(np.searchsorted(at, k)) for k in marked]).argmax(values)
        name = f"sequence {prompt}"
        figure.add_scatter(
            x=at[shown],
            y=values[shown],
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=place == dict(row=1, col=1),
            marker=dict(size=5, opacity=0.75, color=colours.series[index % len(colours.series)]),
            hovertemplate=f"{name}, position %{{x}}<br>{frames.label_of(metric)}: %{{y:.4~g}}"
            "<extra></extra>",
            **place,
        )
    for position in marked:
        at = table[table["position"] == position]["value"]
        if len(at):
            figure.add_scatter(
                x=[position], y=[at.max()], mode="text", text=f"<b>{position}</b>",
                textposition="top center", textfont_color=colours.sink, cliponaxis=False,
                showlegend=False, hoverinfo="skip", **place,
            )  # fmt: skip


def _layers(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    marked: list[int],
    place: dict[str, int],
    colours: Palette,
) -> None:
    """Draw the mean over sequences at each prominent position as a line over layers."""
    for index, position in enumerate(marked):
        own = rows[rows["position"] == position]
        if own.empty:
            continue
        curve = frames.over_prompts(own, "layer")
        band(
            figure,
            curve["layer"],
            (curve["mean"], curve["low"], curve["high"]),
            name=f"position {position}",
            colour=colours.series[index % len(colours.series)],
            label=frames.label_of(metric),
            along="layer",
            showlegend=place == dict(row=1, col=1),
            **place,
        )


def _conditions(rows: pd.DataFrame, metric: str, colours: Palette) -> go.Figure:
    """Draw one line per sequence across the conditions, and the mean; many conditions downwards."""
    order = list(dict.fromkeys(rows["condition"]))
    down = len(order) > _ABREAST
    table = rows.pivot_table(index="prompt", columns="condition", values="value")[order]
    wide = 48 if down else 20
    names = ["<br>".join(textwrap.wrap(escaped(str(c)), wide)) for c in order]
    label = frames.label_of(metric)
    hover = (
        f"%{{{'y' if down else 'x'}}}<br>{label}: %{{{'x' if down else 'y'}:.4~g}}<extra></extra>"
    )
    figure = go.Figure()

    def add(values: pd.Series, **how: object) -> None:
        places = dict(x=values, y=names) if down else dict(x=names, y=values)
        figure.add_scatter(**places, **how)

    for prompt, values in table.iterrows():
        add(
            values, mode="lines+markers", line=dict(width=1, color=colours.other), opacity=0.35,
            showlegend=False, hovertemplate=f"sequence {prompt}, {hover}",
        )  # fmt: skip
    mean = frames.over_prompts(rows, "condition").set_index("condition").loc[order]
    ends = dict(
        symmetric=False, array=mean["high"] - mean["mean"], arrayminus=mean["mean"] - mean["low"]
    )
    add(
        mean["mean"], mode="markers", name="mean and 95 % interval", hovertemplate=hover,
        marker=dict(size=11, symbol="diamond", color=colours.sink),
        **{"error_x" if down else "error_y": ends},
    )  # fmt: skip
    if down:
        figure.update_yaxes(autorange="reversed", type="category")
        figure.update_xaxes(title_text=label)
    else:
        figure.update_yaxes(title_text=label)
    return figure


def _prominent(rows: pd.DataFrame, at_most: int = 2) -> list[int]:
    """Return at most two positions whose mean is the largest in some condition."""
    with_position = rows[rows["position"] >= 0]
    if with_position.empty:
        return []
    means = (
        with_position.groupby(["condition", "position"])["value"].mean().groupby("position").max()
    )
    return sorted(means.nlargest(at_most).index.tolist())
