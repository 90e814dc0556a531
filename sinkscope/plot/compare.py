"""Two figures a head against each other, and one report against another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope._bootstrap import bootstrap
from sinkscope._tidy import to_numpy
from sinkscope.errors import ReportError
from sinkscope.plot import _figure, _labels
from sinkscope.plot._scales import colour_scale, log_switch
from sinkscope.plot.heads import HEAD_DIMS, of_heads
from sinkscope.plot.theme import SEQUENTIAL, Theme, palette

if TYPE_CHECKING:
    from sinkscope._labelled import Variable
    from sinkscope.report import SinkReport


def head_scatter(
    report: SinkReport,
    x: str = "sink_attention",
    y: str = "head_output_norm_out",
    *,
    theme: Theme = None,
) -> go.Figure:
    """A dot a head: one figure of it against another, coloured by layer.

    A head may attend to the sink and still write: sink heads are not all inactive
    (Sandoval-Segura et al. 2504.03889). The title gives Spearman's rank correlation.

    Args:
        report: What a scan gave.
        x: Field along x, with the dimensions layer and head, or an inactivity score.
        y: Field along y, likewise; per-KV-head figures are repeated for the heads that share them.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a field was not measured or is not one figure a head.
    """
    (across_is, across), (up_is, up) = (_per_head(report, name) for name in (x, y))
    layers, heads = across.shape
    where = np.stack([axis.ravel() for axis in np.indices((layers, heads))], axis=-1)
    label_x, label_y = _labels.axis_label(across_is), _labels.axis_label(up_is)
    figure = go.Figure(
        go.Scatter(
            x=across.ravel(),
            y=up.ravel(),
            mode="markers",
            customdata=where,
            marker=dict(
                size=8,
                opacity=0.85,
                color=where[:, 0],
                colorscale=SEQUENTIAL,
                colorbar=dict(title=dict(text="layer", side="right")),
                line=dict(width=0.5, color=palette(theme).faint),
            ),
            hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>"
            f"{label_x}: %{{x:.3~g}}<br>{label_y}: %{{y:.3~g}}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=label_x)
    figure.update_yaxes(title_text=label_y)
    figure.update_layout(updatemenus=[log_switch(False)])
    rank = _rank_correlation(across.ravel(), up.ravel())
    of = f"{across.size} head{'' if across.size == 1 else 's'}"
    title = f"{_labels.heading(x)} and {_labels.words(y)} of {of}: ρ = {rank:.2f}"
    return _figure.finish(figure, title, report.settings, theme, height=520)


def head_change(
    before: SinkReport,
    after: SinkReport,
    metric: str = "sink_attention",
    *,
    theme: Theme = None,
) -> go.Figure:
    """Layer × head map of what an intervention changed: after less before.

    Where both reports hold the same tokens, the hover has the 95 % interval of the paired
    difference; a dot marks the heads whose interval leaves out zero.

    Args:
        before: The untouched model's report.
        after: The report under the intervention, of as many layers and heads.
        metric: A field with the dimensions layer and head (or kv_head).
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the reports do not fit together, or lack the metric.
    """
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
        change = _figure.mean(after, metric) - _figure.mean(before, metric)
        low = high = np.full_like(change, np.nan)
    reach = float(np.nanmax(np.abs(change), initial=0)) or 1.0
    colours = palette(theme)
    label = f"change of {_labels.axis_label(variable)}"
    figure = go.Figure(
        go.Heatmap(
            z=change, zmin=-reach, zmax=reach, xgap=1, ygap=1,
            colorscale=colour_scale(True, colours),
            customdata=np.stack([_figure.mean(before, metric), _figure.mean(after, metric),
                                 low, high], axis=-1),
            colorbar=dict(title=dict(text=label, side="right")),
            hovertemplate=f"layer %{{y}}, {_labels.words(variable.dims[-1])} %{{x}}<br>{label}: "
            "%{z:.3~g}<br>before %{customdata[0]:.3~g}, after %{customdata[1]:.3~g}"
            "<br>95 % interval: %{customdata[2]:.3~g} to %{customdata[3]:.3~g}<extra></extra>",
        )
    )  # fmt: skip
    rows, columns = np.nonzero((low > 0) | (high < 0))
    figure.add_scatter(
        x=columns, y=rows, mode="markers", hoverinfo="skip", showlegend=False,
        marker=dict(size=4, color=colours.ink),
    )  # fmt: skip
    kind = _labels.words(variable.dims[-1])
    layers, heads = change.shape
    plain = dict(showgrid=False, zeroline=False)
    figure.update_xaxes(
        title_text=kind, range=[-0.5, heads - 0.5], dtick=_figure.tick(heads), **plain
    )
    figure.update_yaxes(
        title_text="layer", range=[layers - 0.5, -0.5], dtick=_figure.tick(layers), **plain
    )
    sure = (
        f"; {len(rows)} of {change.size} intervals leave out 0" if paired and len(one) > 1 else ""
    )
    title = f"{_labels.heading(metric)}: after less before{sure}"
    height = max(380, min(900, 200 + 18 * change.shape[0]))
    return _figure.finish(figure, title, after.settings, theme, height=height)


def _same_tokens(one: SinkReport, other: SinkReport) -> bool:
    """Whether prompts can be paired."""
    from sinkscope.compare import compare

    try:
        compare(one, other)
    except ReportError:
        return False
    return True


def _per_head(report: SinkReport, metric: str) -> tuple[Variable, np.ndarray]:
    """A metric and its figure of every head [layer head]; heads of one kv_head share theirs."""
    variable, figures = of_heads(report, metric)
    share = report.settings.n_heads // figures.mean.shape[1]
    return variable, np.repeat(figures.mean, share, axis=1)


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's ρ over the pairs that are both numbers."""
    import pandas as pd

    pairs = pd.DataFrame({"x": x, "y": y}).dropna().rank()
    return float(pairs["x"].corr(pairs["y"]))
