"""What every position of the text receives and holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope._tidy import to_numpy
from sinkscope.errors import ReportError
from sinkscope.metrics.positions import uniform_received
from sinkscope.plot import _figure, _labels, _tokens
from sinkscope.plot import _series as series
from sinkscope.plot._scales import LOG_BAR, colour_scale, log_colours, value_range
from sinkscope.plot.theme import Palette, Theme, palette

if TYPE_CHECKING:
    from sinkscope._labelled import Variable
    from sinkscope.report import SinkReport

POSITION_DIMS = (
    ("layer", "head", "position"),
    ("layer", "kv_head", "position"),
    ("layer", "position"),
)
LOG_METRICS = ("residual_norm",)  # as bars
_LINEAR_MAPS = ("cosine_to_sink",)
_COLUMNS = 512  # of a map; more are binned


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

    Beyond 1,024 positions each bar is the largest of a few neighbours and the title says so; the
    first sixteen positions and the sinks are always drawn alone. A dotted line shows what uniform
    attention would give.

    Args:
        report: What a scan gave.
        metric: A field with the dimensions layer and position, with or without heads: "received_
            attention", "uniform_ratio", "value_norm", "value_norm_out", "residual_norm", ….
        layer: Which layer.
        head: Which head (or kv_head); None is the mean over the layer's heads.
        log: Whether y is logarithmic; by default for residual norms. A button changes it.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the metric was not measured or has no positions, or there is no such layer
            or head.
    """
    variable = _positional(report, metric)
    figures = _figure.mean(report, metric)[_figure.choose(report, "layer", layer)]
    where = f"layer {layer}"
    if figures.ndim == 2:
        dim = variable.dims[1]
        picked = _figure.choose(report, dim, head)
        where += f", mean of {len(figures)} {_labels.words(dim)}s" if picked is None else (
            f", {_labels.words(dim)} {picked}"
        )  # fmt: skip
        figures = _figure.nanmean(figures, 0) if picked is None else figures[picked]
    sinks = _figure.sink_positions(report)
    shown = series.thin(np.arange(len(figures)), figures, keep=sinks)
    colours = palette(theme)
    figure = go.Figure([_bars(report, variable, shown, sinks, sink, colours) for sink in (1, 0)])
    if metric in ("received_attention", "uniform_ratio"):
        level = (
            uniform_attention(report, layer)
            if metric == "received_attention"
            else np.ones(len(figures))
        )
        figure.add_scatter(
            x=shown.x, y=level[shown.x], mode="lines", name="uniform attention",
            line=dict(color=colours.faint, dash="dot", width=1.5), hoverinfo="skip",
        )  # fmt: skip
    figure.update_xaxes(
        title_text="position of the key" if "attention" in metric else "position",
        range=[-0.5 - 0.012 * len(figures), len(figures) - 0.5],
    )
    logarithmic = log if log is not None else metric in LOG_METRICS
    figure.update_yaxes(title_text=_labels.axis_label(variable), **y_scale(logarithmic))
    figure.update_layout(bargap=0, barmode="overlay", updatemenus=[log_switch(logarithmic)])
    note = f" (maxima of {len(shown.x):,} bins)" if shown.thinned else ""
    title = f"{_labels.heading(metric)}: {where}{note}"
    return _figure.finish(figure, title, report.settings, theme)


def position_map(
    report: SinkReport,
    metric: str = "received_attention",
    *,
    theme: Theme = None,
) -> go.Figure:
    """Layer × position map of what each position receives or holds, mean over a layer's heads.

    Args:
        report: What a scan gave.
        metric: A field with the dimensions layer and position, with or without heads.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the metric was not measured or has no positions.
    """
    variable = _positional(report, metric)
    figures = _figure.mean(report, metric)
    if figures.ndim == 3:
        figures = _figure.nanmean(figures, 1)
    starts = series.bin_starts(figures.shape[-1], _COLUMNS, _figure.sink_positions(report))
    binned = series.bin_max(figures, starts)
    logarithmic = metric not in _LINEAR_MAPS
    z, low, high = log_colours(binned) if logarithmic else (binned, *value_range(binned, None))
    label = _labels.axis_label(variable)
    colorbar: dict[str, Any] = dict(title=dict(text=label, side="right"))
    if logarithmic:
        colorbar |= LOG_BAR
    figure = go.Figure(
        go.Heatmap(
            x=starts,
            z=z,
            zmin=low,
            zmax=high,
            customdata=binned,
            colorscale=colour_scale(-1 if low < 0 and not logarithmic else 0, palette(theme)),
            colorbar=colorbar,
            text=np.broadcast_to(_spans(report, starts, figures.shape[-1]), z.shape),
            hovertemplate="layer %{y}, %{text}<br>"
            f"{label}: %{{customdata:.4~g}}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="position", showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="layer", autorange="reversed", showgrid=False, zeroline=False,
        dtick=_figure.tick(len(z)),
    )  # fmt: skip
    heads = "" if len(variable.dims) == 2 else f", mean over {_labels.words(variable.dims[1])}s"
    note = f", maxima of {len(starts)} bins" if len(starts) < figures.shape[-1] else ""
    title = f"{_labels.heading(metric)} by layer and position{heads}{note}"
    height = max(380, min(900, 210 + 16 * len(z)))
    return _figure.finish(figure, title, report.settings, theme, height=height)


def _spans(report: SinkReport, starts: np.ndarray, size: int) -> np.ndarray:
    """What each column of a map covers, for its hover [bin]."""
    ends = np.append(starts[1:], size) - 1
    tokens = _tokens.hover_tokens(report, starts.tolist())
    spans = [
        f"position {first}: {token}" if first == last else f"positions {first} to {last}"
        for first, last, token in zip(starts, ends, tokens, strict=True)
    ]
    return np.array(spans, dtype=object)


def position_embedding_norms(report: SinkReport, *, theme: Theme = None) -> go.Figure:
    """Norm of every learned position embedding (Yan et al. 2407.01601, Fig. 2).

    Args:
        report: Of a model with learned positions.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the model has no learned position embeddings.
    """
    variable = report._require("position_embedding_norm")
    norms = _figure.mean(report, "position_embedding_norm")
    shown = series.thin(np.arange(len(norms)), norms)
    colours = palette(theme)
    figure = go.Figure([_bars(None, variable, shown, [0], sink, colours) for sink in (1, 0)])
    median = float(np.median(norms[1:]))
    figure.add_hline(
        median, line=dict(color=colours.faint, dash="dot", width=1.5),
        annotation_text=f"median of the others: {_labels.number(median)}",
    )  # fmt: skip
    figure.update_xaxes(title_text="position", range=[-0.012 * len(norms), len(norms) - 0.5])
    figure.update_yaxes(title_text="norm of its embedding [activation]")
    figure.update_layout(bargap=0, barmode="overlay")
    title = f"Position embeddings: the first is {_labels.number(norms[0] / median)} × the median"
    return _figure.finish(figure, title, report.settings, theme)


def uniform_attention(report: SinkReport, layer: int) -> np.ndarray:
    """What each position would receive were attention uniform, mean over prompts [position]."""
    settings = report.settings
    window = settings.windows[layer] if settings.windows else None
    return _figure.nanmean(to_numpy(uniform_received(report.mask, settings.causal, window)), 0)


def log_switch(logarithmic: bool) -> dict[str, Any]:
    """Two buttons that make y linear or logarithmic."""
    ticks = {"linear": None, "log": "D2"}  # D2: 1, 2, 5 of each decade
    return dict(
        type="buttons",
        direction="right",
        active=int(logarithmic),
        x=1,
        xanchor="right",
        y=-0.16,
        yanchor="top",
        pad=dict(t=10),
        buttons=[
            dict(label=kind, method="relayout", args=[{"yaxis.type": kind, "yaxis.dtick": tick}])
            for kind, tick in ticks.items()
        ],
    )


def y_scale(logarithmic: bool) -> dict[str, str]:
    """Type and ticks of a y axis that `log_switch` changes."""
    return dict(type="log", dtick="D2") if logarithmic else dict(type="linear")


def _positional(report: SinkReport, metric: str) -> Variable:
    variable = report._require(metric)
    if variable.dims not in POSITION_DIMS:
        known = [n for n in report.measured() if report.variables()[n].dims in POSITION_DIMS]
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; expected a figure with layer "
            f"and position, such as {' or '.join(known[:3])}."
        )
    return variable


def _bars(
    report: SinkReport | None,
    variable: Variable,
    shown: series.Thinned,
    sinks: list[int],
    sink: int,
    colours: Palette,
) -> go.Bar:
    """The bars of the sinks, or of all other positions."""
    chosen = np.isin(shown.x, sinks) == bool(sink)
    spans = [
        f"position {x}" if a == b else f"positions {a} to {b}, largest at {x}"
        for x, a, b in zip(shown.x[chosen], shown.first[chosen], shown.last[chosen], strict=True)
    ]
    if report is not None:
        tokens = _tokens.hover_tokens(report, shown.x[chosen].tolist())
        spans = [f"{span}<br>{token}" for span, token in zip(spans, tokens, strict=True)]
    return go.Bar(
        # Each bin is as wide as what it stands for, and starts where it starts.
        x=shown.first[chosen],
        width=(shown.last - shown.first + 1)[chosen],
        offset=-0.5,
        y=shown.y[chosen],
        name="sink" if sink else "other positions",
        # The sink's outline keeps its bar visible where a bar is thinner than a pixel.
        marker=dict(
            color=colours.sink if sink else colours.other,
            line=dict(width=2 if sink else 0, color=colours.sink),
        ),
        text=spans,
        textposition="none",
        hovertemplate=f"%{{text}}<br>{_labels.axis_label(variable)}: %{{y:.4~g}}<extra></extra>",
    )
