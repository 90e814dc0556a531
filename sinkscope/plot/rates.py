"""The sink rate: the share of sink heads, at any threshold and any length of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
import torch

from sinkscope.errors import ReportError
from sinkscope.metrics.positions import uniform_received
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import differences, escaped
from sinkscope.plot.lines import band
from sinkscope.plot.theme import Theme, palette
from sinkscope.plot.values import (
    Interval,
    mean_of,
    remembered,
    require_report,
    sink_positions,
)
from sinkscope.statistics import bootstrap
from sinkscope.validation import shown

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


_OTHERS = 3  # further positions that get a line


def sink_rate(reports: SinkReport | Mapping[str, SinkReport], *, theme: Theme = None) -> go.Figure:
    """Sink rate against ε, exact at every ε, with its interval over prompts.

    For one report: the first sink, and thin lines for the other positions with the highest rates
    (in a causal model, of the first three quarters: the last keys are seen by few queries).
    For several: one line per report for its first sink, with its rate in the legend.

    Args:
        reports: A report, or reports by name.
        theme: "light", "dark", or the default.

    Returns:
        One line per position (or report) against ε, with a band for the 95 % interval.

    Raises:
        ReportError: If `sink_importance` was not measured.
    """
    named = reports if isinstance(reports, Mapping) else {"first sink": reports}
    first = next(iter(named.values()), None)
    if first is None:
        raise ReportError("sink_rate was given no report.")
    for name, report in named.items():
        require_report(f"the report {name!r}" if named is reports else "report", report)
    colours = palette(theme)
    epsilon, epsilons = first.settings.epsilon, np.linspace(0, 1, 101)
    figure = go.Figure()
    for index, (name, report) in enumerate(named.items()):
        name = escaped(name)
        rate = f"{report.sink_rate_at(epsilon):.1%} at {epsilon:g}"
        band(
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
    about = first.settings if len(named) == 1 else differences(list(named.values()))
    return finish(figure, title, about, theme)


def sink_rate_by_length(
    reports: Sequence[SinkReport], *, epsilon: float | None = None, theme: Theme = None
) -> go.Figure:
    """Sink rate of the first sink against T, one report per point, one line per model.

    Sink rates fall with length even for uniform attention: as ln T / T under a causal mask, as 1 /
    T for bidirectional models. A dotted line per model is the uniform attention to the first sink,
    mean over layers (with their windows) and prompts.

    Args:
        reports: Scans at several lengths, of one or more models.
        epsilon: Threshold; by default the first report's.
        theme: "light", "dark", or the default.

    Returns:
        One line per model against T, and one for uniform attention.

    Raises:
        ReportError: If there is no report, or `sink_importance` was not measured.
    """
    if not isinstance(reports, Sequence):
        raise ReportError(f"reports is {shown(reports)}; expected a list of reports.")
    if not reports:
        raise ReportError("sink_rate_by_length was given no report.")
    for index, report in enumerate(reports):
        require_report(f"report {index}", report)
    epsilon = reports[0].settings.epsilon if epsilon is None else epsilon
    colours = palette(theme)
    figure = go.Figure()
    for index, model in enumerate(dict.fromkeys(report.settings.model for report in reports)):
        own = sorted((r for r in reports if r.settings.model == model), key=_length)
        points = [_rate_at(report, np.array([epsilon])) for report in own]
        name, colour = escaped(model), colours.series[index % len(colours.series)]
        lengths = [_length(report) for report in own]
        band(
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
    return finish(figure, title, differences(list(reports)), theme, height=480)


def _rate_at(report: SinkReport, epsilons: np.ndarray) -> Interval:
    """Interval over prompts of each prompt's share of heads above ε."""
    importance = report["sink_importance"].float()[..., None]
    above = (importance > torch.as_tensor(epsilons, device=importance.device)).float()
    above = torch.where(importance.isnan(), torch.nan, above)
    rates = above.nanmean(dim=(1, 2))
    return remembered(report, ("rate", *epsilons), lambda: bootstrap(rates))


def _uniform(report: SinkReport) -> float:
    """Return the `sink_importance` of the first sink under uniform attention."""
    first = report.sink_mask & (report.sink_mask.cumsum(dim=1) == 1)
    layers = Counter(report.settings.windows_attended)
    levels = [
        float(uniform_received(report.mask, report.settings.causal, window)[first].mean())
        for window in layers
    ]
    return float(np.average(levels, weights=list(layers.values())))


def _other_positions(figure: go.Figure, report: SinkReport, colour: str) -> None:
    """Draw thin lines for the positions with the next highest rates that many queries see."""
    if report.sink_rate_curve is None:
        return
    curve, epsilons = mean_of(report, "sink_rate_curve"), mean_of(report, "epsilon")
    area = np.nan_to_num(curve.sum(axis=0))
    area[sink_positions(report)] = -1
    if report.settings.causal:  # the last keys are seen by few queries
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


def _length(report: SinkReport) -> int:
    return report.settings.length
