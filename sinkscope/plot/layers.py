"""What changes from layer to layer, and how sure it is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import torch

from sinkscope.errors import ReportError
from sinkscope.metrics.positions import uniform_received
from sinkscope.output import number
from sinkscope.plot import figure as _figure
from sinkscope.plot import marks as _series
from sinkscope.plot.scales import log_switch, y_scale
from sinkscope.plot.theme import Theme, palette
from sinkscope.statistics import bootstrap

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


# --- The sink rate: the share of heads that park on a position, at any threshold and length.

_OTHERS = 3  # further positions that get a line


def sink_rate(reports: SinkReport | Mapping[str, SinkReport], *, theme: Theme = None) -> go.Figure:
    """Sink rate against ε, exact at every ε, with its interval over prompts.

    Of one report: the first sink, and thin lines for the other positions with the highest rates
    (in a causal model, of the first three quarters: the last keys are seen by few queries).
    Of several: one line a report, of its first sink; the legend has each one's rate.

    Args:
        reports: A report, or reports by name.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If `sink_importance` was not measured.
    """
    named = reports if isinstance(reports, Mapping) else {"first sink": reports}
    first = next(iter(named.values()), None)
    if first is None:
        raise ReportError("sink_rate was given no report.")
    colours = palette(theme)
    epsilon, epsilons = first.settings.epsilon, np.linspace(0, 1, 101)
    figure = go.Figure()
    for index, (name, report) in enumerate(named.items()):
        name = _figure.escape(name)
        rate = f"{report.sink_rate_at(epsilon):.1%} at {epsilon:g}"
        _series.band(
            figure, epsilons, _rate_at(report, epsilons), name=name,
            entry=f"{name}, {rate}" if isinstance(reports, Mapping) else name,
            colour=colours.series[index % len(colours.series)], label="sink rate [share]",
            along="ε =",
        )  # fmt: skip
    if not isinstance(reports, Mapping):
        _other_positions(figure, reports, colours.faint)
    figure.add_vline(
        epsilon, line=dict(color=colours.faint, dash="dot"), annotation_text=f"ε = {epsilon:g}"
    )
    figure.update_xaxes(title_text="threshold ε [probability]", range=[0, 1])
    figure.update_yaxes(title_text="sink rate [share of heads]", range=[0, 1.02], tickformat=".0%")
    title = "Sink rate against ε"
    if not isinstance(reports, Mapping):
        title += f" (at {epsilon:g}: first sink {first.sink_rate_at(epsilon):.1%})"
    about = first.settings if len(named) == 1 else _differences(list(named.values()))
    return _figure.finish(figure, title, about, theme)


def sink_rate_by_length(
    reports: Sequence[SinkReport], *, epsilon: float | None = None, theme: Theme = None
) -> go.Figure:
    """Sink rate of the first sink against T, one report a point, one line a model.

    The same text looks less of a sink the longer it is: causal attention that is uniform falls as
    ln T / T, bidirectional as 1 / T. A dotted line a model is what uniform attention would give the
    first sink, mean over layers (their windows count) and prompts.

    Args:
        reports: Scans at several lengths; of several models if you like.
        epsilon: Threshold; by default the first report's.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If there is no report, or `sink_importance` was not measured.
    """
    if not reports:
        raise ReportError("sink_rate_by_length was given no report.")
    epsilon = reports[0].settings.epsilon if epsilon is None else epsilon
    colours = palette(theme)
    figure = go.Figure()
    for index, model in enumerate(dict.fromkeys(report.settings.model for report in reports)):
        own = sorted((r for r in reports if r.settings.model == model), key=_length)
        points = [_rate_at(report, np.array([epsilon])) for report in own]
        name, colour = _figure.escape(model), colours.series[index % len(colours.series)]
        lengths = [_length(report) for report in own]
        _series.band(
            figure, lengths, tuple(np.concatenate(end) for end in zip(*points, strict=True)),
            name=name, colour=colour, label="sink rate [share]", along="T =",
        )  # fmt: skip
        figure.add_scatter(
            x=lengths, y=[_uniform(report) for report in own], mode="lines+markers",
            name=f"{name}, uniform attention",
            line=dict(color=colour, dash="dot"), marker=dict(symbol="square-open"),
            hovertemplate="T = %{x}<br>uniform attention: %{y:.3~g}<extra></extra>",
        )  # fmt: skip
    lengths = sorted({_length(report) for report in reports})
    figure.update_xaxes(title_text="T [positions]", type="log", tickvals=lengths, ticktext=lengths)
    figure.update_yaxes(title_text="sink rate [share of heads]", range=[0, 1.02], tickformat=".0%")
    title = f"Sink rate against the length of the text, ε = {epsilon:g}"
    return _figure.finish(figure, title, _differences(list(reports)), theme, height=480)


def _rate_at(report: SinkReport, epsilons: np.ndarray) -> _figure.Interval:
    """Interval over prompts of each prompt's share of heads above ε."""
    importance = report["sink_importance"].float()[..., None]
    above = (importance > torch.as_tensor(epsilons, device=importance.device)).float()
    above = torch.where(importance.isnan(), torch.nan, above)
    rates = above.nanmean(dim=(1, 2))
    return _figure.remembered(report, ("rate", *epsilons), lambda: bootstrap(rates))


def _uniform(report: SinkReport) -> float:
    """What the first sink would receive, as `sink_importance` counts it, of uniform attention."""
    first = report.sink_mask & (report.sink_mask.cumsum(dim=1) == 1)
    layers = Counter(report.settings.windows or (None,))
    levels = [
        float(uniform_received(report.mask, report.settings.causal, window)[first].mean())
        for window in layers
    ]
    return float(np.average(levels, weights=list(layers.values())))


def _other_positions(figure: go.Figure, report: SinkReport, colour: str) -> None:
    """Thin lines of the positions that come next after the sinks, of those that many see."""
    if report.sink_rate_curve is None:
        return
    curve, epsilons = _figure.mean(report, "sink_rate_curve"), _figure.mean(report, "epsilon")
    area = np.nan_to_num(curve.sum(axis=0))
    area[_figure.sink_positions(report)] = -1
    if report.settings.causal:  # the last keys are seen by few queries, above all by their own
        area[-(len(area) // 4) :] = -1
    for rank, position in enumerate(np.argsort(-area)[:_OTHERS].tolist()):
        if area[position] <= 0:
            break
        figure.add_scatter(
            x=epsilons, y=curve[:, position], mode="lines", name=f"position {position}",
            line=dict(color=colour, width=1, dash=("solid", "dash", "dot")[rank]),
            hovertemplate=f"position {position}, ε = %{{x:.2f}}<br>sink rate [share]: %{{y:.3~g}}"
            "<extra></extra>",
        )  # fmt: skip


def _differences(reports: list[SinkReport]) -> str:
    """The line under a title for several reports: what they share, and how many values else."""
    parts = []
    for name, prefix in (
        ("model", ""), ("length", "T = "), ("bos", "BOS: "), ("epsilon", "ε = "), ("source", ""),
    ):  # fmt: skip
        values = list(dict.fromkeys(str(getattr(report.settings, name)) for report in reports))
        parts.append(prefix + (", ".join(values) if len(values) < 4 else f"{len(values)} values"))
    return " · ".join(parts)


def _length(report: SinkReport) -> int:
    return report.settings.length


def by_layer(
    report: SinkReport,
    *metrics: str,
    log: bool = False,
    title: str | None = None,
    axis: str | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Lines over the layers: mean over prompts (and a layer's heads) with its 95 % interval.

    Args:
        report: What a scan gave.
        metrics: Fields of one unit that have a prompt and a layer, such as "sink_cosine" and
            "other_cosine".
        log: Whether y starts logarithmic; where nothing is negative a button changes it.
        title: Instead of the metrics' names.
        axis: Title of y, without the unit; by default the words that the metrics' names end in,
            or else the names.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a metric was not measured or has no prompt or layer, or units differ.
    """
    if not metrics:
        raise ReportError('by_layer needs the name of a field, such as "sink_attention".')
    variables = [report._require(name) for name in metrics]
    for variable in variables:
        if variable.dims[:2] != ("prompt", "layer") or "dim" in variable.dims:
            raise ReportError(
                f"{variable.name} has the dimensions {' '.join(variable.dims)}; expected prompt "
                "and layer, and perhaps head."
            )
        if variable.unit != variables[0].unit:
            raise ReportError(
                f"{variables[0].name} [{variables[0].unit}] and {variable.name} [{variable.unit}] "
                "cannot share an axis; draw them one by one."
            )
    colours = palette(theme)
    figure = go.Figure()
    for index, variable in enumerate(variables):
        _series.band(
            figure,
            np.arange(report.sizes["layer"]),
            _over_heads(report, variable.name),
            name=_figure.words(variable.name),
            colour=colours.series[index % len(colours.series)],
            label=_figure.axis_label(variable),
            along="layer",
        )
    axis = axis or _shared(metrics) or ", ".join(_figure.words(name) for name in metrics)
    figure.update_xaxes(title_text="layer", **_figure.layer_ticks(report.sizes["layer"]))
    figure.update_yaxes(
        title_text=_figure.with_unit(axis, variables[0].unit).strip(),
        **y_scale(log),
    )
    if all(np.nanmin(_over_heads(report, name).mean, initial=1) > 0 for name in metrics):
        figure.update_layout(updatemenus=[log_switch(log)])
    names = " and ".join(_figure.words(name) for name in metrics)
    return _figure.finish(
        figure, title or f"{_figure.heading(names)} by layer", report.settings, theme
    )


def _shared(metrics: tuple[str, ...]) -> str:
    """The words that names end in: "cosine" of sink_cosine and other_cosine."""
    names = [_figure.words(name).split() for name in metrics]
    last = zip(*(reversed(words) for words in names), strict=False)
    shared = itertools.takewhile(lambda words: len(set(words)) == 1, last)
    return " ".join(reversed([words[0] for words in shared]))


def residual_norms(report: SinkReport, *, theme: Theme = None) -> go.Figure:
    """Norm of the residual state after each block: the sink's and the median of the others.

    Raises:
        ReportError: If residual norms were not measured, or no prompt has another position.
    """
    _figure.require_known(report, "residual_peak")
    peak = _figure.mean(report, "residual_peak")
    lowest, highest = int(np.nanargmin(peak)), int(np.nanargmax(peak))
    ends = [f"{number(peak[layer])} ×" for layer in dict.fromkeys((lowest, highest))]
    title = (
        f"Residual norm: the sink's is {' to '.join(ends)} the others', most after layer {highest}"
    )
    return by_layer(
        report, "sink_residual_norm", "median_residual_norm", log=True, title=title,
        axis="residual norm", theme=theme,
    )  # fmt: skip


def value_drains(report: SinkReport, *, out: bool = False, theme: Theme = None) -> go.Figure:
    """Norm of the sink's value over the mean of the others: a dot a head, the layer's mean.

    Args:
        report: What a scan gave.
        out: Take the values through W_O (`value_drain_out`, per head) rather than as they are
            (`value_drain`, per KV head).
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If drains were not measured, or no prompt has another position.
    """
    metric = "value_drain_out" if out else "value_drain"
    _figure.require_known(report, metric)
    kind = _figure.words(report.variables()[metric].dims[-1])
    heads = _figure.interval(report, metric)
    colours = palette(theme)
    layers, per_layer = heads.mean.shape
    figure = go.Figure()
    figure.add_scatter(
        x=np.repeat(np.arange(layers), per_layer), y=heads.mean.ravel(), mode="markers",
        name=f"each {kind}", marker=dict(size=5, color=colours.other, opacity=0.6),
        customdata=np.stack(
            [np.tile(np.arange(per_layer), layers), heads.low.ravel(), heads.high.ravel()], axis=-1
        ),
        hovertemplate=f"layer %{{x}}, {kind} %{{customdata[0]}}"
        "<br>value drain [ratio]: %{y:,.3~r}"
        "<br>95 % interval: %{customdata[1]:,.3~r} to %{customdata[2]:,.3~r}<extra></extra>",
    )  # fmt: skip
    _series.band(
        figure, np.arange(layers), _over_heads(report, metric), name="mean of the layer",
        colour=colours.sink, label="value drain [ratio]", along="layer",
    )  # fmt: skip
    figure.add_hline(1, line=dict(color=colours.faint, dash="dot", width=1.5))
    figure.update_xaxes(title_text="layer", **_figure.layer_ticks(report.sizes["layer"]))
    figure.update_yaxes(title_text="value drain [ratio]", **y_scale(True))
    figure.update_layout(updatemenus=[log_switch(True)])
    drained = float((heads.mean < 0.5)[np.isfinite(heads.mean)].mean())
    where = " through W<sub>O</sub>" if out else ""
    title = f"Value drains{where}: in {drained:.0%} of {kind}s the sink's value is under half"
    return _figure.finish(figure, title, report.settings, theme)


def attention_by_query(
    report: SinkReport, layer: int | None = None, head: int | None = None, *, theme: Theme = None
) -> go.Figure:
    """Attention to the sink by how far into the text the query is.

    Args:
        report: What a scan gave.
        layer: Which layer; None draws every layer's mean over heads.
        head: Which head of that layer; None draws all of its heads.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If it was not measured, or there is no such layer or head.
    """
    figures = _figure.mean(report, "received_by_distance")
    buckets = _figure.mean(report, "bucket").astype(int)
    heads = _figure.choose(report, "head", head)
    if _figure.choose(report, "layer", layer) is None:
        lines = {f"layer {i}": _figure.nanmean(row, 0) for i, row in enumerate(figures)}
        where = "mean over each layer's heads"
    else:
        chosen = range(figures.shape[1]) if heads is None else [heads]
        lines = {f"layer {layer}, head {h}": figures[layer, h] for h in chosen}
        where = f"layer {layer}" + ("" if heads is None else f", head {heads}")
    scale = _series.graded(len(lines), palette(theme))
    figure = go.Figure()
    for (name, line), colour in zip(lines.items(), scale, strict=True):
        figure.add_scatter(
            x=buckets, y=line, mode="lines+markers", name=name, line=dict(color=colour),
            showlegend=len(lines) <= 8,
            hovertemplate=f"{name}, queries from %{{x}}<br>attention to the sink [probability]: "
            "%{y:,.3~r}<extra></extra>",
        )  # fmt: skip
    if len(lines) > 8:
        _key(figure, "layer" if layer is None else "head", scale)
    figure.update_xaxes(
        title_text="query position, lower edge of the bucket", type="log", tickvals=buckets
    )
    figure.update_yaxes(title_text="attention to the sink [probability]", rangemode="tozero")
    title = f"Attention to the sink by query position: {where}"
    return _figure.finish(figure, title, report.settings, theme)


def _key(figure: go.Figure, what: str, scale: list[str]) -> None:
    """A colour bar in place of a legend of many lines."""
    figure.add_scatter(
        x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip",
        marker=dict(
            color=[0], cmin=0, cmax=len(scale) - 1, colorscale=scale,
            colorbar=dict(title=dict(text=what, side="right")), showscale=True,
        ),
    )  # fmt: skip


def _over_heads(report: SinkReport, metric: str) -> _figure.Interval:
    """Interval over prompts of the mean over a layer's heads."""
    figures = report[metric].float()
    if figures.ndim == 3:
        figures = figures.nanmean(dim=2)
    return _figure.remembered(report, ("layer", metric), lambda: bootstrap(figures))
