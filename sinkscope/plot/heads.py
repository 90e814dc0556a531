"""Maps and scatter plots of the heads of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import torch

from sinkscope.errors import ReportError
from sinkscope.metrics.heads import INACTIVE_IF
from sinkscope.plot.figure import finish, layer_bar, tick_step
from sinkscope.plot.labels import axis_label, heading, in_words
from sinkscope.plot.scales import (
    colour_scale,
    emptied,
    log_bar,
    log_switch,
    ratio_colours,
    value_range,
)
from sinkscope.plot.theme import SEQUENTIAL, Palette, Theme, palette
from sinkscope.plot.values import interval_of, mean_of, nanmean, remembered, require_report
from sinkscope.report.labelled import Variable, to_numpy
from sinkscope.statistics import Interval, bootstrap, spearman
from sinkscope.validation import shown, text

if TYPE_CHECKING:
    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport
    from sinkscope.report.settings import Settings


_STEPS = 20
_LITTLE = 0.1  # attention to the rest below which the title of `recency_plane` counts a head


def head_map(
    report: SinkReport,
    metric: str = "sink_attention",
    *,
    threshold: float | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Layer × head map of any metric of heads, with a threshold slider.

    Heads at or below the threshold are empty and the title counts those above it; the slider works
    without a kernel.

    Args:
        report: The report of a scan.
        metric: A field with the dimensions layer and head (or kv_head), with or without prompts;
            or one of the thirteen inactivity scores, such as "AHON-LN".
        threshold: Initial threshold; by default ε for probabilities; otherwise below the smallest
            value, so that no cell is empty.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers, columns heads; the hover has the mean over prompts with its
        95 % interval.

    Raises:
        ReportError: If the metric is unknown, was not measured, or is not one value per head.
    """
    require_report("report", report)
    variable, figures = of_heads(report, metric)
    if threshold is None and variable.unit == "probability":
        threshold = report.settings.epsilon
    colours = palette(theme)
    steps, start = _thresholds(figures.mean, threshold, variable.unit)
    cells = heatmap(figures, variable)
    figure = empty_map(cells, variable, colours)
    changes = [_step(cells, figures.mean, variable, step, colours) for step in steps]
    figure.update_layout(sliders=[_slider(changes, steps, start, variable)])
    figure.update_traces(colorscale=changes[start][0]["colorscale"][0])
    mark_without_attention(figure, report.settings)
    rows = figures.mean.shape[0]
    finish(
        figure,
        changes[start][1]["title.text"],
        report.settings,
        theme,
        height=max(380, min(900, 230 + 18 * rows)),
    )
    return figure


def of_heads(report: SinkReport, metric: str) -> tuple[Variable, Interval]:
    """Return a metric's description and its value for every head, with intervals over prompts.

    Args:
        report: The report of a scan.
        metric: A field of `HEAD_DIMS`, or one of the thirteen inactivity scores.

    Raises:
        ReportError: If the metric is unknown, was not measured, or is not one value per head.
    """
    metric = text("metric", metric, error=ReportError)
    if metric in INACTIVE_IF:
        about = f"inactivity score of Sandoval-Segura et al.; inactive {INACTIVE_IF[metric]} τ"
        variable = Variable(metric, ("prompt", "layer", "head"), None, about, None)
        return variable, remembered(
            report, metric, lambda: bootstrap(report.inactivity_scores()[metric])
        )
    variable = report._require(metric)
    if variable.dims not in HEAD_DIMS:
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; a head map needs one value "
            f"per layer and head, such as {', '.join(head_metrics(report)[:3])}."
        )
    return variable, interval_of(report, metric)


HEAD_DIMS = (
    ("prompt", "layer", "head"),
    ("layer", "head"),
    ("prompt", "layer", "kv_head"),
    ("layer", "kv_head"),
)


def head_metrics(report: SinkReport) -> list[str]:
    """The fields of a report that `head_map` can draw."""
    return [name for name in report.measured() if report.variables()[name].dims in HEAD_DIMS]


def heatmap(figures: Interval, variable: Variable) -> go.Heatmap:
    """The cells of a head map, none of them empty."""
    unit = f" {variable.unit}" if variable.unit not in (None, "1") else ""
    hover = (
        f"layer %{{y}}, {in_words(variable.dims[-1])} %{{x}}<br>"
        f"{in_words(variable.name)}: %{{customdata[0]:,.4~r}}{unit}"
    )
    if not np.isnan(figures.low).all():
        hover += "<br>95 % interval: %{customdata[1]:,.4~r} to %{customdata[2]:,.4~r}"
    z, low, high = coloured(figures.mean, variable)
    return go.Heatmap(
        z=z,
        zmin=low,
        zmax=high,
        xgap=1,
        ygap=1,
        customdata=np.stack(figures, axis=-1),
        hovertemplate=f"{hover}<extra></extra>",
        colorbar=dict(title=dict(text=axis_label(variable), side="right"))
        | (log_bar(low, high) if is_ratio(variable) else {}),
    )


def is_ratio(variable: Variable) -> bool:
    """Whether a variable is a ratio, drawn on a logarithmic scale whose middle is 1."""
    return variable.unit == "ratio"


def coloured(values: np.ndarray, variable: Variable) -> tuple[np.ndarray, float, float]:
    """Return the values that a head map's colours encode, and the ends of the scale."""
    if is_ratio(variable):
        return ratio_colours(values)
    return values, *value_range(values, variable.unit)


def empty_map(cells: go.Heatmap, variable: Variable, colours: Palette) -> go.Figure:
    """Return a head map with axes and outlines, without threshold and title."""
    layers, columns = cells.z.shape
    plain = dict(
        showgrid=False, zeroline=False, showline=True, mirror=True, linecolor=colours.muted[0]
    )
    figure = go.Figure(cells)
    figure.update_layout(plot_bgcolor=colours.muted[0])  # visible between the cells
    figure.update_traces(colorbar=dict(outlinewidth=1, outlinecolor=colours.muted[0]))
    figure.update_xaxes(title_text=in_words(variable.dims[-1]), dtick=tick_step(columns), **plain)
    figure.update_yaxes(title_text="layer", autorange="reversed", dtick=tick_step(layers), **plain)
    return figure


def mark_without_attention(figure: go.Figure, settings: Settings) -> None:
    """Write "no attention" over the rows of layers that have none; their cells are undefined."""
    runs: list[list[int]] = []
    for layer in settings.without_attention:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for run in runs:
        figure.add_annotation(
            text="no attention",
            x=0.5,
            xref="x domain",
            y=(run[0] + run[-1]) / 2,
            yref="y",
            showarrow=False,
            font=dict(size=11),
        )


def _thresholds(
    figures: np.ndarray, threshold: float | None, unit: str | None
) -> tuple[list[float | None], int]:
    """Return the slider's steps, the first of which empties no cell, and the initial one."""
    finite = figures[np.isfinite(figures)]
    low, high = value_range(figures, unit)
    if unit not in ("probability", "share") and finite.size:
        low, high = float(finite.min()), float(finite.max())
    stops = [float(f"{x:.3g}") for x in np.linspace(low, high, _STEPS + 1)[:-1]]
    if threshold is not None:
        stops = sorted({*stops, float(threshold)})
    start = 0 if threshold is None else 1 + stops.index(float(threshold))
    return [None, *stops], start


def _step(
    cells: go.Heatmap,
    figures: np.ndarray,
    variable: Variable,
    threshold: float | None,
    colours: Palette,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what one step of the slider changes: the colours, and the count in the title."""
    scale = colour_scale(cells.zmin < 0, colours)
    name = heading(variable.name)
    kind = "KV heads" if variable.dims[-1] == "kv_head" else "heads"
    if threshold is None:
        return {"colorscale": [scale]}, {"title.text": f"{name} of every {kind[:-1]}"}
    defined = np.isfinite(figures)
    share = (figures > threshold)[defined].mean() if defined.any() else 0.0
    number = int(defined.sum())
    title = (
        f"{name}: {share:.0%} of {number} {kind if number != 1 else kind[:-1]} above {threshold:g}"
    )
    at = threshold if not is_ratio(variable) else np.log10(max(threshold, 1e-30))
    cut = float((at - cells.zmin) / (cells.zmax - cells.zmin))
    return {"colorscale": [emptied(scale, cut, colours)]}, {"title.text": title}


def _slider(
    changes: list[tuple[dict[str, Any], dict[str, Any]]],
    stops: list[float | None],
    start: int,
    variable: Variable,
) -> dict[str, Any]:
    unit = "" if variable.unit in (None, "1") else f" [{variable.unit}]"
    return dict(
        active=start,
        pad=dict(t=44),
        currentvalue=dict(prefix=f"threshold{unit}: ", font=dict(size=13)),
        steps=[
            dict(
                method="update",
                args=list(change),
                label="none" if stop is None else f"{stop:g}",
            )
            for change, stop in zip(changes, stops, strict=True)
        ],
    )


def head_scatter(
    report: SinkReport,
    x: str = "sink_attention",
    y: str = "head_output_norm_out",
    *,
    theme: Theme = None,
) -> go.Figure:
    """A dot per head: one metric against another, coloured by layer.

    Not all sink heads are inactive: a head may attend to the sink and still have a large output
    (Sandoval-Segura et al. 2504.03889). The title gives Spearman's rank correlation.

    Args:
        report: The report of a scan.
        x: Field along x, with the dimensions layer and head, or an inactivity score.
        y: Field along y, likewise; values per KV head are repeated for the heads that share it.
        theme: "light", "dark", or the default.

    Returns:
        A dot per head; the hover has its layer, its head and both values.

    Raises:
        ReportError: If a field was not measured or is not one value per head.
    """
    require_report("report", report)
    (across_is, across), (up_is, up) = (_per_head(report, name) for name in (x, y))
    layers, heads = across.shape
    where = _places(layers, heads)
    label_x, label_y = axis_label(across_is), axis_label(up_is)
    figure = go.Figure(
        go.Scatter(
            x=across.ravel(),
            y=up.ravel(),
            mode="markers",
            customdata=where,
            marker=_by_layer(where, palette(theme)),
            hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>"
            f"{label_x}: %{{x:.3~g}}<br>{label_y}: %{{y:.3~g}}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=label_x)
    figure.update_yaxes(title_text=label_y)
    figure.update_layout(updatemenus=[log_switch(False)])
    rank = _rank_correlation(across.ravel(), up.ravel())
    of = f"{across.size} head{'' if across.size == 1 else 's'}"
    title = f"{heading(x)} of {of} against {in_words(y)}: ρ = {rank:.2f}"
    return finish(figure, title, report.settings, theme, height=520)


def _places(layers: int, heads: int) -> np.ndarray:
    """Layer and head of every head, in the order of a flattened map."""
    return np.stack([axis.ravel() for axis in np.indices((layers, heads))], axis=-1)


def _by_layer(where: np.ndarray, colours: Palette) -> dict[str, Any]:
    """Markers of heads, coloured by layer."""
    return dict(
        size=8,
        opacity=0.85,
        color=where[:, 0],
        colorscale=SEQUENTIAL,
        colorbar=layer_bar(int(where[:, 0].max()) + 1),
        line=dict(width=0.5, color=colours.faint),
    )


def recency_plane(report: SinkReport, width: int = 16, *, theme: Theme = None) -> go.Figure:
    """A dot per head: attention to near keys against attention to the sink, and to the rest.

    The further a head lies below the line, the more it attends to keys that are neither: such a
    head needs the whole context. The dotted line is what uniform attention would pay to near keys.
    The operational definition is ours: the recency ratio by which RecurFormer (arXiv 2410.12850)
    chooses heads is not public.

    Args:
        report: The report of a scan with the metric "recency".
        width: Number of near keys, the query's own included; one of those measured.
        theme: "light", "dark", or the default.

    Returns:
        A scatter plot coloured by layer. A learned sink counts as the sink.

    Raises:
        ReportError: If recency was not measured, or not at this width, or no prompt is longer.
    """
    require_report("report", report)
    report._require("recent_attention")
    widths = mean_of(report, "width").astype(int).tolist()
    if width not in widths:
        raise ReportError(
            f"width is {shown(width)}; expected one of {', '.join(map(str, widths))}."
        )
    at = widths.index(width)
    recent, rest = (
        mean_of(report, name)[..., at] for name in ("recent_attention", "remaining_attention")
    )
    if np.isnan(recent).all():
        raise ReportError(
            f"No query sees keys beyond the last {width} and the sink, so there is nothing to "
            "draw; choose a smaller width, or scan longer prompts."
        )
    uniform = nanmean(mean_of(report, "recent_uniform")[:, at], axis=0)
    sink = 1 - recent - rest
    layers, heads = recent.shape
    where = _places(layers, heads)
    colours = palette(theme)
    figure = go.Figure(
        go.Scatter(
            x=sink.ravel(),
            y=recent.ravel(),
            mode="markers",
            customdata=np.column_stack([where, rest.ravel()]),
            marker=_by_layer(where, colours),
            hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>sink: %{x:.3f}<br>"
            f"last {width} keys: %{{y:.3f}}<br>the rest: %{{customdata[2]:.3f}}<extra></extra>",
        )
    )
    figure.add_shape(
        type="line", x0=0, y0=1, x1=1, y1=0, line=dict(color=colours.muted[0], width=1)
    )
    figure.add_annotation(
        x=0.5, y=0.5, text="nothing for the rest", textangle=0, showarrow=False,
        xanchor="left", yanchor="bottom", xshift=6,
    )  # fmt: skip
    figure.add_hline(
        y=float(uniform), line=dict(color=colours.muted[0], width=1, dash="dot"),
        annotation_text="uniform", annotation_position="top right",
    )  # fmt: skip
    figure.update_xaxes(title_text="attention to the sink [probability]", range=[-0.02, 1.02])
    figure.update_yaxes(
        title_text=f"attention to the last {width} keys [probability]", range=[-0.02, 1.02]
    )
    defined = np.isfinite(rest)
    share = (rest < _LITTLE)[defined].mean()
    number = int(defined.sum())
    title = (
        f"Sink, last {width} keys, the rest: {share:.0%} of {number} "
        f"head{'' if number == 1 else 's'} pay{'s' if number == 1 else ''} the rest under "
        f"{_LITTLE:g}"
    )
    return finish(figure, title, report.settings, theme, height=560)


def head_change(
    before: SinkReport,
    after: SinkReport,
    metric: str = "sink_attention",
    *,
    theme: Theme = None,
) -> go.Figure:
    """Layer × head map of what an intervention changed: after minus before.

    If both reports are of the same tokens, the hover has the 95 % interval of the paired
    difference; a dot marks the heads whose interval excludes zero.

    Args:
        before: The report of the unchanged model.
        after: The report under the intervention, with as many layers and heads.
        metric: A field with the dimensions layer and head (or kv_head).
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers, columns heads, on a scale whose middle is no change.

    Raises:
        ReportError: If the reports do not match, or lack the metric.
    """
    require_report("before", before)
    require_report("after", after)
    variable = before._require(metric)
    one, other = before[metric].float().cpu(), after[metric].float().cpu()
    if variable.dims not in HEAD_DIMS or one.shape[-2:] != other.shape[-2:]:
        raise ReportError(
            f"{metric} cannot be compared head by head: {tuple(one.shape)} and "
            f"{tuple(other.shape)} with the dimensions {' '.join(variable.dims)}."
        )
    paired = one.ndim == 3 and _same_tokens(before, after)
    if paired:
        change, low, high = (to_numpy(end) for end in bootstrap(other - one))
    else:
        change = mean_of(after, metric) - mean_of(before, metric)
        low = high = np.full_like(change, np.nan)
    reach = float(np.nanmax(np.abs(change), initial=0)) or 1.0
    colours = palette(theme)
    label = f"change of {axis_label(variable)}"
    figure = go.Figure(
        go.Heatmap(
            z=change, zmin=-reach, zmax=reach, xgap=1, ygap=1,
            colorscale=colour_scale(True, colours),
            customdata=np.stack([mean_of(before, metric), mean_of(after, metric),
                                 low, high], axis=-1),
            colorbar=dict(title=dict(text=label, side="right"), tickformat="~g"),
            hovertemplate=f"layer %{{y}}, {in_words(variable.dims[-1])} %{{x}}<br>{label}: "
            "%{z:.3~g}<br>before %{customdata[0]:.3~g}, after %{customdata[1]:.3~g}"
            "<br>95 % interval: %{customdata[2]:.3~g} to %{customdata[3]:.3~g}<extra></extra>",
        )
    )  # fmt: skip
    rows, columns = np.nonzero((low > 0) | (high < 0))
    figure.add_scatter(
        x=columns, y=rows, mode="markers", hoverinfo="skip", showlegend=False,
        marker=dict(size=4, color=colours.ink),
    )  # fmt: skip
    kind = in_words(variable.dims[-1])
    layers, heads = change.shape
    plain = dict(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text=kind, range=[-0.5, heads - 0.5], dtick=tick_step(heads), **plain)
    figure.update_yaxes(
        title_text="layer", range=[layers - 0.5, -0.5], dtick=tick_step(layers), **plain
    )
    sure = (
        f"; {len(rows)} of {change.size} intervals leave out 0" if paired and len(one) > 1 else ""
    )
    title = f"{heading(metric)}: after minus before{sure}"
    height = max(380, min(900, 200 + 18 * change.shape[0]))
    return finish(figure, title, after.settings, theme, height=height)


def _same_tokens(one: SinkReport, other: SinkReport) -> bool:
    """Whether prompts can be paired."""
    from sinkscope.report.comparison import compare

    try:
        compare(one, other)
    except ReportError:
        return False
    return True


def _per_head(report: SinkReport, metric: str) -> tuple[Variable, np.ndarray]:
    """Return a metric's variable and values [layer head]; values of kv_heads are repeated."""
    variable, figures = of_heads(report, metric)
    share = report.settings.n_heads // figures.mean.shape[1]
    return variable, np.repeat(figures.mean, share, axis=1)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's ρ over the pairs without nan."""
    defined = ~(np.isnan(x) | np.isnan(y))
    return float(spearman(torch.from_numpy(x[defined]), torch.from_numpy(y[defined])))
