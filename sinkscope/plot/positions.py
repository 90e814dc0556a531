"""What every position of the text receives and holds."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot import figure as _figure
from sinkscope.plot.marks import (
    FEW,
    add_uniform,
    bars,
    few_from,
    hover_names,
    mark_few,
    uniform_level,
)
from sinkscope.plot.scales import (
    Bins,
    bins,
    colour_scale,
    is_wide,
    log_bar,
    log_colours,
    log_range,
    log_switch,
    value_range,
    y_scale,
)
from sinkscope.plot.theme import Palette, Theme, palette
from sinkscope.report.fields import SinkFields
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from jaxtyping import Float

    from sinkscope.report.labelled import Variable
    from sinkscope.report.report import SinkReport


# --- A prompt's own tokens, each coloured by what it receives or holds.

_CELL = 8  # characters that fit a cell
_ROW = 30  # pixels
_BRIGHT = 100  # of 255: viridis that black is read on better than white


def token_strip(
    report: SinkReport,
    prompt: int = 0,
    metric: str = "received_peak",
    *,
    start: int = 0,
    tokens: int = 256,
    columns: int = 10,
    log: bool = True,
    theme: Theme = None,
) -> go.Figure:
    """The tokens of a prompt in reading order, coloured by one figure a token.

    Args:
        report: What a scan gave.
        prompt: Which prompt.
        metric: A field with the dimensions prompt and position: "received_peak" (attention
            received, mean over layers and heads) or "residual_outlier".
        start: First position to show.
        tokens: How many to show; the title says where the prompt goes on.
        columns: Tokens a line.
        log: Whether colours are logarithmic.
        theme: "light", "dark", or the default.

    Returns:
        A heatmap of token cells; the hover has the whole token, its position and figure.

    Raises:
        ReportError: If the metric was not measured or is not one figure a token, or there is no
            such prompt or position.
    """
    variable = report._require(metric)
    if variable.dims != ("prompt", "position"):
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; a token strip needs one "
            "figure a token, such as received_peak or residual_outlier."
        )
    _figure.choose(report, "prompt", prompt)
    length = int(report.mask[prompt].sum())
    if not 0 <= start < length:
        raise ReportError(
            f"Prompt {prompt} has no position {start}; its positions run from 0 to {length - 1}."
        )
    stop = min(start + tokens, length)
    values = report[metric][prompt, start:stop].float().cpu().numpy()
    words = [_figure.text_at(report, prompt, position) for position in range(start, stop)]
    z, low, high = _colours(values, log, variable.unit)
    rows = -(-len(values) // columns)
    label = _figure.axis_label(variable)
    # A strip may be low: the title says what it is, the bar the unit.
    colorbar: dict[str, Any] = dict(title=dict(text=variable.unit or "", side="right"))
    if log:
        colorbar |= log_bar(low, high, _ROW * rows)
    hovers = [
        f"position {start + i}: {_figure.plotly_token(word)}<br>{label}: {number(value)}"
        for i, (word, value) in enumerate(zip(words, values.tolist(), strict=True))
    ]
    lines = [str(start + row * columns) for row in range(rows)]
    figure = go.Figure(
        go.Heatmap(
            y=lines,
            z=_grid(z.tolist(), rows, columns, np.nan).astype(float),
            zmin=low, zmax=high, xgap=2, ygap=2, hoverongaps=False,
            customdata=_grid(hovers, rows, columns, ""),
            hovertemplate="%{customdata}<extra></extra>",
            colorbar=colorbar,
        )
    )  # fmt: skip
    # A heatmap writes all its cells in one colour, or in Plotly's grey.
    figure.add_scatter(
        x=[index % columns for index in range(len(words))],
        y=[lines[index // columns] for index in range(len(words))],
        text=[_short(word) for word in words], mode="text", hoverinfo="skip", showlegend=False,
        textfont=dict(size=11, color=_legible((z - low) / (high - low), palette(theme))),
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5])
    figure.update_yaxes(
        title_text="position", type="category", range=[rows - 0.5, -0.5], showgrid=False
    )
    part = "" if stop - start == length else f", positions {start} to {stop - 1} of {length:,}"
    title = f"{_figure.heading(metric)}: tokens of prompt {prompt}{part}"
    height = 190 + _ROW * rows
    about = _figure.plain_about(report.settings)
    few = length - length // 4
    if metric == "received_peak" and report.settings.causal and few < stop:
        about += f" · {FEW.format(few)}"
    return _figure.finish(figure, title, about, theme, height=height)


def _colours(
    values: np.ndarray, logarithmic: bool, unit: str | None
) -> tuple[np.ndarray, float, float]:
    """What is coloured, and the ends of the scale: from 0 to the data's largest where linear."""
    if logarithmic:
        return log_colours(values)
    finite = values[np.isfinite(values)]
    low, high = value_range(values, None)
    if unit in ("probability", "share"):
        low, high = 0.0, float(finite.max()) if finite.size else 1.0
    return values, low, high


def _legible(shares: np.ndarray, colours: Palette) -> list[str]:
    """Black or white, whichever is read on the scale's colour there; ink where there is none."""
    scale = colour_scale(False, colours)
    known = np.clip(np.nan_to_num(shares), 0, 1).tolist()
    rgb = np.array([unlabel_rgb(one) for one in sample_colorscale(scale, known)])
    bright = rgb @ (0.299, 0.587, 0.114) > _BRIGHT
    return np.where(np.isnan(shares), colours.ink, np.where(bright, "#000", "#fff")).tolist()


def _grid(items: list[Any], rows: int, columns: int, empty: Any) -> np.ndarray:
    """Items in reading order [row column]; empty cells at the end."""
    filled = [*items, *[empty] * (rows * columns - len(items))]
    return np.array(filled, dtype=object).reshape(rows, columns)


def _short(token: str) -> str:
    shown = _figure.shown_token(token)
    cut = shown if len(shown) <= _CELL else shown[: _CELL - 1] + "…"
    return _figure.isolated(html.escape(cut, quote=False))


POSITION_DIMS = (
    ("layer", "head", "position"),
    ("layer", "kv_head", "position"),
    ("layer", "position"),
)
LOG_METRICS = ("residual_norm",)  # as bars, where they differ widely
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
    attention would give. What the last quarter of a causal text receives is
    shaded: few queries see its keys, and an average over few is seldom small.

    Args:
        report: What a scan gave.
        metric: A field with the dimensions layer and position, with or without heads: "received_
            attention", "uniform_ratio", "value_norm", "value_norm_out", "residual_norm", ….
        layer: Which layer.
        head: Which head (or kv_head); None is the mean over the layer's heads.
        log: Whether y is logarithmic; by default for residual norms whose largest is more than 20
            times the smallest. A button changes it.
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
        where += f", mean of {len(figures)} {_figure.words(dim)}s" if picked is None else (
            f", {_figure.words(dim)} {picked}"
        )  # fmt: skip
        figures = _figure.nanmean(figures, 0) if picked is None else figures[picked]
    places = bins(len(figures), keep=_figure.sink_positions(report))
    figure = bars(report, variable, places, places.maximum(figures), theme)
    if (level := uniform_level(report, metric, layer)) is not None:
        add_uniform(figure, places, level, theme)
        mark_few(figure, report, palette(theme))
    logarithmic = log if log is not None else metric in LOG_METRICS and is_wide(figures)
    ends = log_range(figures if level is None else np.append(figures, level))
    figure.update_yaxes(**y_scale(logarithmic), range=ends if logarithmic else None)
    figure.update_layout(updatemenus=[log_switch(logarithmic, ends)])
    note = f" (maxima of {len(places.first):,} bins)" if places.binned else ""
    title = f"{_figure.heading(metric)}: {where}{note}"
    return _figure.finish(figure, title, report.settings, theme)


def position_map(
    report: SinkReport,
    metric: str = "received_attention",
    *,
    theme: Theme = None,
) -> go.Figure:
    """Layer × position map of what each position receives or holds, mean over a layer's heads.

    Beyond 512 positions each column is the largest of a few neighbours and the title says so; the
    first sixteen positions and the sinks have columns of their own, the sinks' wider than others.

    Args:
        report: What a scan gave.
        metric: A field with the dimensions layer and position, with or without heads.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the metric was not measured or has no positions.
    """
    variable = _positional(report, metric)
    places = map_bins(report)
    columns = places.columns(_figure.sink_positions(report))
    binned = places.maximum(mean_over_heads(report, metric))
    logarithmic = metric not in _LINEAR_MAPS
    z, low, high = (
        log_colours(binned) if logarithmic else (binned, *value_range(binned, variable.unit))
    )
    label = _figure.axis_label(variable)
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
        dtick=_figure.tick(len(z)),
    )  # fmt: skip
    heads = "" if len(variable.dims) == 2 else f", mean over {_figure.words(variable.dims[1])}s"
    note = f", maxima of {len(places.first)} columns" if places.binned else ""
    title = f"{_figure.heading(metric)} by layer and position{heads}{note}"
    height = max(380, min(900, 210 + 16 * len(z)))
    return _figure.finish(figure, title, report.settings, theme, height=height)


def map_bins(report: SinkReport) -> Bins:
    """The columns of `position_map`."""
    return bins(report.sizes["position"], _COLUMNS, keep=_figure.sink_positions(report))


def mean_over_heads(report: SinkReport, metric: str) -> np.ndarray:
    """A metric of positions, mean over prompts and heads [layer position]."""
    figures = _figure.mean(report, metric)
    return _figure.nanmean(figures, 1) if figures.ndim == 3 else figures


def position_embedding_norms(
    source: SinkReport | Float[Tensor, "position"],
    *,
    about: _figure.About | None = None,
    theme: Theme = None,
) -> go.Figure:
    """Norm of every learned position embedding (Yan et al. 2407.01601, Fig. 2).

    Args:
        source: A report of a model with learned positions, or the norms themselves [activation].
        about: For norms: which model's they are.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the model has no learned position embeddings, or norms come without a word
            on whose they are.
    """
    variable = SinkFields.variables()["position_embedding_norm"]
    if isinstance(source, Tensor):
        norms = to_numpy(source)
    else:
        about, norms = source.settings, _figure.mean(source, "position_embedding_norm")
    if about is None:
        raise ReportError("Norms alone do not say which model's they are; pass about=.")
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
    return _figure.finish(figure, title, about, theme)


def _positional(report: SinkReport, metric: str) -> Variable:
    variable = report._require(metric)
    if variable.dims not in POSITION_DIMS:
        known = [n for n in report.measured() if report.variables()[n].dims in POSITION_DIMS]
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; expected a figure with layer "
            f"and position, such as {' or '.join(known[:3])}."
        )
    return variable
