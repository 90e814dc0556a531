"""Metrics by position in the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.bars import (
    FEW,
    add_uniform,
    bars,
    few_from,
    hover_names,
    mark_few,
    uniform_level,
)
from sinkscope.plot.bins import Bins, bins
from sinkscope.plot.figure import finish, tick_step
from sinkscope.plot.labels import (
    About,
    axis_label,
    heading,
    in_words,
)
from sinkscope.plot.scales import (
    colour_scale,
    is_wide,
    log_bar,
    log_colours,
    log_range,
    log_switch,
    value_range,
    y_scale,
)
from sinkscope.plot.theme import Theme, palette
from sinkscope.plot.values import checked_index, mean_of, nanmean, require_report, sink_positions
from sinkscope.report.fields import SinkFields
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from jaxtyping import Float

    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport


POSITION_DIMS = (
    ("layer", "head", "position"),
    ("layer", "kv_head", "position"),
    ("layer", "position"),
)
LOG_METRICS = ("residual_norm",)  # logarithmic bars if values differ widely
_LINEAR_MAPS = ("cosine_to_sink",)
_COLUMNS = 512  # most columns of a map; more are binned
_NAMED = 3  # secondary sinks labelled above a map


def by_position(
    report: SinkReport,
    metric: str = "received_attention",
    *,
    layer: int,
    head: int | None = None,
    log: bool | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Bars over the positions of the text, in one head or the mean of a layer's heads.

    Beyond 128 positions the sinks are dots and the others a line; beyond 1,024 each point is the
    largest of a few neighbours and the title says so. The first sixteen positions and the sinks are
    always drawn alone. A dotted line shows what uniform attention would give. The last quarter of a
    causal text is shaded for received attention, which there is an average over few queries and
    tends to be large.

    Args:
        report: The report of a scan.
        metric: A field with the dimensions layer and position, with or without heads: "received_
            attention", "uniform_ratio", "value_norm", "value_norm_out", "residual_norm", ….
        layer: The layer.
        head: The head (or kv_head); None for the mean over the layer's heads.
        log: Whether y is logarithmic; by default for residual norms whose largest is more than 20
            times the smallest. A button changes it.
        theme: "light", "dark", or the default.

    Returns:
        Bars (a line for long texts), the sink in its own colour, and for attention a dotted line at
        the uniform level.

    Raises:
        ReportError: If the metric was not measured or has no positions, or there is no such layer
            or head.
    """
    require_report("report", report)
    variable = _positional(report, metric)
    figures = mean_of(report, metric)[checked_index(report, "layer", layer)]
    where = f"layer {layer}"
    if figures.ndim == 2:
        dim = variable.dims[1]
        picked = checked_index(report, dim, head)
        where += f", mean of {len(figures)} {in_words(dim)}s" if picked is None else (
            f", {in_words(dim)} {picked}"
        )  # fmt: skip
        figures = nanmean(figures, 0) if picked is None else figures[picked]
    places = bins(len(figures), keep=sink_positions(report))
    figure = bars(report, variable, places, places.maximum(figures), theme)
    if (level := uniform_level(report, metric, layer)) is not None:
        add_uniform(figure, places, level, theme)
        mark_few(figure, report, palette(theme))
    logarithmic = log if log is not None else metric in LOG_METRICS and is_wide(figures)
    ends = log_range(figures if level is None else np.append(figures, level))
    figure.update_yaxes(**y_scale(logarithmic), range=ends if logarithmic else None)
    figure.update_layout(updatemenus=[log_switch(logarithmic, ends)])
    note = f" (maxima of {len(places.first):,} bins)" if places.binned else ""
    title = f"{heading(metric)}: {where}{note}"
    return finish(figure, title, report.settings, theme)


def position_map(
    report: SinkReport,
    metric: str = "received_attention",
    *,
    theme: Theme = None,
) -> go.Figure:
    """Layer × position map of a metric, mean over a layer's heads.

    Beyond 512 positions each column is the largest of a few neighbours and the title says so; the
    first sixteen positions and the sinks have their own columns, the sinks' wider than others.

    Args:
        report: The report of a scan.
        metric: A field with the dimensions layer and position, with or without heads.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers, columns positions, binned by maximum where the text is long.

    Raises:
        ReportError: If the metric was not measured or has no positions.
    """
    require_report("report", report)
    variable = _positional(report, metric)
    places = map_bins(report)
    columns = places.columns(sink_positions(report))
    binned = places.maximum(mean_over_heads(report, metric))
    logarithmic = metric not in _LINEAR_MAPS
    z, low, high = (
        log_colours(binned) if logarithmic else (binned, *value_range(binned, variable.unit))
    )
    label = axis_label(variable)
    colorbar: dict[str, Any] = dict(title=dict(text=label, side="right"))
    if logarithmic:
        colorbar |= log_bar(low, high)
    figure = go.Figure(
        go.Heatmap(
            x=columns,
            z=z,
            zmin=low,
            zmax=high,
            customdata=binned,
            colorscale=colour_scale(low < 0 and not logarithmic, palette(theme)),
            colorbar=colorbar,
            text=np.broadcast_to(np.array(hover_names(report, places), dtype=object), z.shape),
            hovertemplate="layer %{y}, %{text}<br>"
            f"{label}: %{{customdata:,.4~r}}<extra></extra>",
        )
    )
    start = few_from(report) if "attention" in metric or metric == "uniform_ratio" else None
    title = "position" if start is None else f"position; {FEW.format(start)}"
    figure.update_xaxes(title_text=title, showgrid=False, zeroline=False, **places.ticks(columns))
    figure.update_yaxes(
        title_text="layer", autorange="reversed", showgrid=False, zeroline=False,
        dtick=tick_step(len(z)),
    )  # fmt: skip
    _name_secondary(figure, report, metric, places, columns)
    heads = "" if len(variable.dims) == 2 else f", mean over {in_words(variable.dims[1])}s"
    note = f", maxima of {len(places.first)} columns" if places.binned else ""
    title = f"{heading(metric)} by layer and position{heads}{note}"
    height = max(380, min(900, 210 + 16 * len(z)))
    return finish(figure, title, report.settings, theme, height=height)


def _name_secondary(
    figure: go.Figure, report: SinkReport, metric: str, places: Bins, columns: np.ndarray
) -> None:
    """Label secondary sinks above the map: other positions that receive as much in some layer."""
    if metric != "received_attention":
        return
    largest = np.nan_to_num(mean_over_heads(report, metric)).max(axis=0)
    largest[sink_positions(report)] = 0
    if (start := few_from(report)) is not None:
        largest[start:] = 0
    for position in np.argsort(-largest)[:_NAMED].tolist():
        if largest[position] <= report.settings.epsilon:
            break
        x = float(np.interp(position, places.edges(), columns))
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", showarrow=False, font_size=11,
            text=f"secondary: {position}",
        )  # fmt: skip


def map_bins(report: SinkReport) -> Bins:
    """The columns of `position_map`."""
    return bins(report.sizes["position"], _COLUMNS, keep=sink_positions(report))


def mean_over_heads(report: SinkReport, metric: str) -> np.ndarray:
    """A metric of positions, mean over prompts and heads [layer position]."""
    figures = mean_of(report, metric)
    return nanmean(figures, 1) if figures.ndim == 3 else figures


def position_embedding_norms(
    source: SinkReport | Float[Tensor, "position"],
    *,
    about: About | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Norm of every learned position embedding (Yan et al. 2407.01601, Fig. 2).

    Args:
        source: A report of a model with learned positions, or the norms [activation].
        about: For norms: the name of their model.
        theme: "light", "dark", or the default.

    Returns:
        A bar per position, the first in its own colour, and a line for the median of the
        others.

    Raises:
        ReportError: If the model has no learned position embeddings, or norms are given without
            `about`.
    """
    variable = SinkFields.variables()["position_embedding_norm"]
    if isinstance(source, Tensor):
        norms = to_numpy(source)
    else:
        require_report("source", source)
        about, norms = source.settings, mean_of(source, "position_embedding_norm")
    if about is None:
        raise ReportError("Norms alone do not record their model; pass about=.")
    places = bins(len(norms))
    figure = bars(None, variable, places, places.maximum(norms), theme)
    median = float(np.median(norms[1:]))
    figure.add_scatter(
        x=[0, len(norms) - 1], y=[median] * 2, mode="lines", hoverinfo="skip",
        name=f"median of the others: {number(median)}",
        line=dict(color=palette(theme).ink, dash="dot", width=1.5),
    )  # fmt: skip
    figure.update_yaxes(title_text="norm of its embedding [activation]")
    title = f"Position embeddings: the first is {number(norms[0] / median)} × the median"
    return finish(figure, title, about, theme)


def _positional(report: SinkReport, metric: str) -> Variable:
    variable = report._require(metric)
    if variable.dims not in POSITION_DIMS:
        known = [n for n in report.measured() if report.variables()[n].dims in POSITION_DIMS]
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; expected a metric with layer "
            f"and position, such as {' or '.join(known[:3])}."
        )
    return variable
