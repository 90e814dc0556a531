"""Quantities by layer, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.figure import finish, layer_ticks
from sinkscope.plot.labels import axis_label, differences, escaped, heading, in_words, with_unit
from sinkscope.plot.lines import band, graded
from sinkscope.plot.scales import log_switch, y_scale
from sinkscope.plot.theme import Theme, palette
from sinkscope.plot.values import (
    Interval,
    checked_index,
    interval_of,
    mean_of,
    nanmean,
    remembered,
    require_known,
    require_report,
)
from sinkscope.report.chance import ALPHA, NULLS, SMALL, p_values
from sinkscope.statistics import bootstrap

if TYPE_CHECKING:
    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport


def by_layer(
    report: SinkReport | Mapping[str, SinkReport],
    *metrics: str,
    log: bool = False,
    title: str | None = None,
    axis: str | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Lines over the layers: mean over prompts (and a layer's heads) with its 95 % interval.

    Args:
        report: The report of a scan; or several reports by name, such as {"before": one, "after":
            other}, whose lines are then drawn together.
        metrics: Fields of one unit that have a prompt and a layer, such as "sink_cosine" and
            "other_cosine".
        log: Whether y is initially logarithmic; if no value is negative, a button changes it.
        title: Title, instead of the metrics' names.
        axis: Title of y, without the unit; by default the last words that the metrics' names share,
            or else the names.
        theme: "light", "dark", or the default.

    Returns:
        One line per metric (or report), with a band for its 95 % interval where there is one.

    Raises:
        ReportError: If a metric was not measured or has no prompt or layer, or units differ.
    """
    if not metrics:
        raise ReportError('by_layer needs the name of a field, such as "sink_attention".')
    named = dict(report) if isinstance(report, Mapping) else {"": report}
    if not named:
        raise ReportError("by_layer was given no report.")
    for name, one in named.items():
        require_report(f"the report {name!r}" if name else "report", one)
    first = next(iter(named.values()))
    variables = [_checked(one, name) for one in named.values() for name in metrics]
    for variable in variables:
        if variable.unit != variables[0].unit:
            raise ReportError(
                f"{variables[0].name} [{variables[0].unit}] and {variable.name} [{variable.unit}] "
                "cannot share an axis; draw them one by one."
            )
    colours = palette(theme)
    figure = go.Figure()
    lines = [(name, one, metric) for name, one in named.items() for metric in metrics]
    for index, (name, one, metric) in enumerate(lines):
        own = in_words(metric) if len(metrics) > 1 or not name else ""
        band(
            figure,
            np.arange(one.sizes["layer"]),
            _over_heads(one, metric),
            name=", ".join(filter(None, [escaped(name), own])),
            colour=colours.series[index % len(colours.series)],
            label=axis_label(one.variables()[metric]),
            along="layer",
        )
    axis = axis or _shared(metrics) or ", ".join(in_words(name) for name in metrics)
    figure.update_xaxes(title_text="layer", **layer_ticks(first.sizes["layer"]))
    figure.update_yaxes(
        title_text=with_unit(axis, variables[0].unit).strip(),
        **y_scale(log),
    )
    if all(np.nanmin(_over_heads(one, metric).mean, initial=1) > 0 for _, one, metric in lines):
        figure.update_layout(updatemenus=[log_switch(log)])
    names = " and ".join(in_words(name) for name in metrics)
    about = first.settings if len(named) == 1 else differences(list(named.values()))
    return finish(figure, title or f"{heading(names)} by layer", about, theme)


def _checked(report: SinkReport, name: str) -> Variable:
    """Return the variable of a metric that has a prompt and a layer."""
    variable = report._require(name)
    if variable.dims[:2] != ("prompt", "layer") or "dim" in variable.dims:
        raise ReportError(
            f"{variable.name} has the dimensions {' '.join(variable.dims)}; expected prompt and "
            "layer, and perhaps head."
        )
    return variable


def _shared(metrics: tuple[str, ...]) -> str:
    """Return the last words that names share: "cosine" of sink_cosine and other_cosine."""
    names = [in_words(name).split() for name in metrics]
    last = zip(*(reversed(words) for words in names), strict=False)
    shared = itertools.takewhile(lambda words: len(set(words)) == 1, last)
    return " ".join(reversed([words[0] for words in shared]))


def residual_norms(report: SinkReport, *, theme: Theme = None) -> go.Figure:
    """Norm of the residual state after each block: the sink's and the median of the others.

    Args:
        report: A report with the metric "residual".
        theme: "light", "dark", or the default.

    Returns:
        Two lines, the sink's norm and the median of the others, with bands for 95 % intervals, and
        buttons for a linear and a logarithmic axis.

    Raises:
        ReportError: If residual norms were not measured, or no prompt has another position.
    """
    require_report("report", report)
    require_known(report, "residual_peak")
    peak = mean_of(report, "residual_peak")
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
    """Norm of the sink's value over the mean of the others: a dot per head, a line for the mean.

    Args:
        report: The report of a scan.
        out: Whether values are taken after W_O (`value_drain_out`, per head) or before
            (`value_drain`, per KV head).
        theme: "light", "dark", or the default.

    Returns:
        A dot a KV head and layer, a line for the mean of the layer, and buttons for a linear and a
        logarithmic axis.

    Raises:
        ReportError: If drains were not measured, or no prompt has another position.
    """
    require_report("report", report)
    metric = "value_drain_out" if out else "value_drain"
    require_known(report, metric)
    kind = in_words(report.variables()[metric].dims[-1])
    heads = interval_of(report, metric)
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
    band(
        figure, np.arange(layers), _over_heads(report, metric), name="mean of the layer",
        colour=colours.sink, label="value drain [ratio]", along="layer",
    )  # fmt: skip
    figure.add_hline(1, line=dict(color=colours.faint, dash="dot", width=1.5))
    figure.update_xaxes(title_text="layer", **layer_ticks(report.sizes["layer"]))
    figure.update_yaxes(title_text="value drain [ratio]", **y_scale(True))
    figure.update_layout(updatemenus=[log_switch(True)])
    drained = float((heads.mean < 0.5)[np.isfinite(heads.mean)].mean())
    where = " through W<sub>O</sub>" if out else ""
    title = f"Value drains{where}: in {drained:.0%} of {kind}s the sink's value is under half"
    return finish(figure, title, report.settings, theme)


def chance_levels(
    report: SinkReport, quantity: str = "sink_attention", *, theme: Theme = None
) -> go.Figure:
    """A quantity of every head (KV head, layer) beside that of the strongest under each null.

    Args:
        report: The report of a scan with ``nulls=``.
        quantity: "sink_attention", "residual_peak" or "value_drain"; a drain is strong if small.
        theme: "light", "dark", or the default.

    Returns:
        A dot per head and layer, and a band per null: the middle 95 % of its draws of the strongest
        value over all heads; buttons for a linear and a logarithmic axis.

    Raises:
        ReportError: If no null was drawn of it.
    """
    require_report("report", report)
    records = report.chance_levels(quantity)
    variable = report.variables()[quantity]
    mean = mean_of(report, quantity).reshape(report.sizes["layer"], -1)
    found = p_values(report, quantity)
    p = np.stack([found[one["null"]].cpu().numpy().ravel() for one in records], axis=-1)
    kind = {"head": "head", "kv_head": "KV head"}.get(variable.dims[-1], "layer")
    strongest = {
        "head": "strongest head", "KV head": "smallest drain", "layer": "largest peak"
    }[kind]  # fmt: skip
    label = axis_label(variable)
    colours = palette(theme)
    layers, per_layer = mean.shape
    figure = go.Figure()
    ends = np.array([-0.5, layers - 0.5])
    for one, colour in zip(records, colours.series, strict=False):
        level = np.full(2, one["median"])
        words = f"{NULLS[one['null']]}, {strongest}"
        band(
            figure, ends, (level, np.full(2, one["low"]), np.full(2, one["high"])),
            name=words, colour=colour, label=label, along="layer",
        )  # fmt: skip
    which = "" if kind == "layer" else f", {kind} %{{customdata[0]}}"
    figure.add_scatter(
        x=np.repeat(np.arange(layers), per_layer), y=mean.ravel(), mode="markers",
        name=f"each {kind}", marker=dict(size=5, color=colours.ink, opacity=0.55),
        customdata=np.column_stack([np.tile(np.arange(per_layer), layers), p]),
        hovertemplate=f"layer %{{x}}{which}<br>{label}: %{{y:,.3~r}}" + "".join(
            f"<br>p against {NULLS[one['null']]}: %{{customdata[{index}]:,.3~r}}"
            for index, one in enumerate(records, start=1)
            if one["tested"]
        ) + "<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title_text="layer", **layer_ticks(layers))
    figure.update_yaxes(title_text=label, **y_scale(True))
    figure.update_layout(updatemenus=[log_switch(True)])
    tested = [one["tested"] > 0 for one in records]
    every = (p[:, tested] <= ALPHA).all(axis=1).sum()
    differ = "are below" if quantity in SMALL else "exceed"
    what = {"head": "heads", "KV head": "KV heads' drains", "layer": "layers' peaks"}[kind]
    names = [NULLS[one["null"]] for one in records if one["tested"]]
    against = names[0] if len(names) == 1 else "every null"
    title = f"Chance levels: {every} of {records[0]['tested']} {what} {differ} {against}"
    return finish(figure, title, report.settings, theme)


def attention_by_query(
    report: SinkReport, layer: int | None = None, head: int | None = None, *, theme: Theme = None
) -> go.Figure:
    """Attention to the sink by the position of the query.

    Args:
        report: The report of a scan.
        layer: The layer; None draws every layer's mean over heads.
        head: The head of that layer; None draws all of its heads.
        theme: "light", "dark", or the default.

    Returns:
        One line per layer (or head) against the position of the query, in buckets.

    Raises:
        ReportError: If it was not measured, or there is no such layer or head.
    """
    require_report("report", report)
    figures = mean_of(report, "received_by_distance")
    buckets = mean_of(report, "bucket").astype(int)
    heads = checked_index(report, "head", head)
    if checked_index(report, "layer", layer) is None:
        lines = {f"layer {i}": nanmean(row, 0) for i, row in enumerate(figures)}
        where = "mean over each layer's heads"
    else:
        chosen = range(figures.shape[1]) if heads is None else [heads]
        lines = {f"layer {layer}, head {h}": figures[layer, h] for h in chosen}
        where = f"layer {layer}" + ("" if heads is None else f", head {heads}")
    scale = graded(len(lines))
    figure = go.Figure()
    for (name, line), colour in zip(lines.items(), scale, strict=True):
        figure.add_scatter(
            x=buckets, y=line, mode="lines+markers", name=name, line=dict(color=colour),
            showlegend=len(lines) <= 8,
            hovertemplate=f"{name}, queries from %{{x}}<br>attention to the sink [probability]: "
            "%{y:,.3~r}<extra></extra>",
        )  # fmt: skip
    if len(lines) > 8:
        _label_strongest(figure, buckets, lines, scale)
    figure.update_xaxes(
        title_text="query position, lower edge of the bucket", type="log", tickvals=buckets
    )
    figure.update_yaxes(title_text="attention to the sink [probability]", rangemode="tozero")
    title = f"Attention to the sink by query position: {where}"
    return finish(figure, title, report.settings, theme)


_NAMED = 5  # of many lines, those with the largest means are labelled
_APART = 0.055  # distance between labels, as a share of the plot's height


def _label_strongest(
    figure: go.Figure, x: np.ndarray, lines: dict[str, np.ndarray], scale: list[str]
) -> None:
    """Label the strongest lines at their right ends, one below the other, instead of a legend."""
    means = {name: nanmean(line, 0) for name, line in lines.items() if np.isfinite(line).any()}
    strongest = sorted(means, key=lambda name: float(means[name]), reverse=True)[:_NAMED]
    colours = dict(zip(lines, scale, strict=True))
    last = {name: int(np.flatnonzero(np.isfinite(lines[name]))[-1]) for name in strongest}
    top = max(float(np.nanmax(line)) for line in lines.values() if np.isfinite(line).any())
    ceiling = np.inf
    for name in sorted(strongest, key=lambda name: -lines[name][last[name]]):
        at = float(lines[name][last[name]])
        ceiling = min(at, ceiling - _APART * top)
        figure.add_annotation(
            x=float(np.log10(x[last[name]])), y=ceiling, xanchor="left", xshift=6, showarrow=False,
            text=f"<span style='color:{colours[name]}'>●</span> {name.replace('layer ', 'L')}",
            font_size=11,
        )  # fmt: skip


def _over_heads(report: SinkReport, metric: str) -> Interval:
    """Interval over prompts of the mean over a layer's heads."""
    figures = report[metric].float()
    if figures.ndim == 3:
        figures = figures.nanmean(dim=2)
    return remembered(report, ("layer", metric), lambda: bootstrap(figures))
