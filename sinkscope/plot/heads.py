"""The heads of a model at a glance: one cell a head, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope._bootstrap import bootstrap
from sinkscope._labelled import Variable
from sinkscope.errors import ReportError
from sinkscope.metrics.heads import INACTIVE_IF
from sinkscope.plot import _labels as labels
from sinkscope.plot._figure import Interval, finish, interval, remembered, tick
from sinkscope.plot._scales import colour_scale, emptied, value_range
from sinkscope.plot.theme import Palette, Theme, palette

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

_STEPS = 20


def head_map(
    report: SinkReport,
    metric: str = "sink_attention",
    *,
    threshold: float | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Layer × head map of any figure that each head has, with a threshold to slide.

    Heads at or below the threshold are empty and the title counts those above it; the slider works
    wherever the figure is shown, with no kernel behind it.

    Args:
        report: What a scan gave.
        metric: A field with the dimensions layer and head (or kv_head), with or without prompts;
            or one of the thirteen inactivity scores, such as "AHON-LN".
        threshold: Where the slider starts; by default ε for probabilities, and below the smallest
            value, so that nothing is empty, for everything else.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers, columns heads; the hover has the mean over prompts with its
        95 % interval.

    Raises:
        ReportError: If the metric is unknown, was not measured, or is not one figure a head.
    """
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
    """What a metric is and its figure of every head, with intervals over prompts.

    Args:
        report: What a scan gave.
        metric: A field of `HEAD_DIMS`, or one of the thirteen inactivity scores.

    Raises:
        ReportError: If the metric is unknown, was not measured, or is not one figure a head.
    """
    if metric in INACTIVE_IF:
        about = f"inactivity score of Sandoval-Segura et al.; inactive {INACTIVE_IF[metric]} τ"
        variable = Variable(metric, ("prompt", "layer", "head"), None, about, None)
        return variable, remembered(
            report, metric, lambda: bootstrap(report.inactivity_scores()[metric])
        )
    variable = report._require(metric)
    if variable.dims not in HEAD_DIMS:
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; a head map needs one figure a "
            f"layer and head, such as {', '.join(head_metrics(report)[:3])}."
        )
    return variable, interval(report, metric)


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
        f"layer %{{y}}, {labels.words(variable.dims[-1])} %{{x}}<br>"
        f"{labels.words(variable.name)}: %{{z:,.4~r}}{unit}"
    )
    shown: dict[str, Any] = dict(hovertemplate=f"{hover}<extra></extra>")
    if not np.isnan(figures.low).all():
        shown["customdata"] = np.stack([figures.low, figures.high], axis=-1)
        interval_text = "<br>95 % interval: %{customdata[0]:,.4~r} to %{customdata[1]:,.4~r}"
        shown["hovertemplate"] = f"{hover}{interval_text}<extra></extra>"
    low, high = value_range(figures.mean, variable.unit)
    return go.Heatmap(
        z=figures.mean,
        zmin=low,
        zmax=high,
        xgap=1,
        ygap=1,
        colorbar=dict(title=dict(text=labels.axis_label(variable), side="right")),
        **shown,
    )


def empty_map(cells: go.Heatmap, variable: Variable, colours: Palette) -> go.Figure:
    """A head map with its axes and outlines, as yet without threshold and title."""
    layers, columns = cells.z.shape
    plain = dict(
        showgrid=False, zeroline=False, showline=True, mirror=True, linecolor=colours.muted[0]
    )
    figure = go.Figure(cells)
    figure.update_layout(plot_bgcolor=colours.muted[0])  # seen between the cells
    figure.update_traces(colorbar=dict(outlinewidth=1, outlinecolor=colours.muted[0]))
    figure.update_xaxes(title_text=labels.words(variable.dims[-1]), dtick=tick(columns), **plain)
    figure.update_yaxes(title_text="layer", autorange="reversed", dtick=tick(layers), **plain)
    return figure


def _thresholds(
    figures: np.ndarray, threshold: float | None, unit: str | None
) -> tuple[list[float | None], int]:
    """The slider's stops, the first of which empties nothing, and where it starts."""
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
    """What one stop of the slider changes: the colours, and the title with its count."""
    scale = colour_scale(cells.zmin < 0, colours)
    name = labels.heading(variable.name)
    kind = "KV heads" if variable.dims[-1] == "kv_head" else "heads"
    if threshold is None:
        return {"colorscale": [scale]}, {"title.text": f"{name} of every {kind[:-1]}"}
    defined = np.isfinite(figures)
    share = (figures > threshold)[defined].mean() if defined.any() else 0.0
    number = int(defined.sum())
    title = (
        f"{name}: {share:.0%} of {number} {kind if number != 1 else kind[:-1]} above {threshold:g}"
    )
    cut = (threshold - cells.zmin) / (cells.zmax - cells.zmin)
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
