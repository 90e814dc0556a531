"""A prompt's tokens, coloured by a metric."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.bars import (
    FEW,
)
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import (
    axis_label,
    heading,
    isolated,
    plain_about,
    plotly_token,
    shown_token,
    token_at,
)
from sinkscope.plot.scales import (
    colour_scale,
    log_bar,
    log_colours,
    value_range,
)
from sinkscope.plot.theme import Palette, Theme, palette
from sinkscope.plot.values import checked_index, require_report

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


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
    """The tokens of a prompt in reading order, coloured by one value per token.

    Args:
        report: The report of a scan.
        prompt: Index of the prompt.
        metric: A field with the dimensions prompt and position: "received_peak" (attention
            received, mean over layers and heads) or "residual_outlier".
        start: First position to show.
        tokens: Number of tokens to show; the title states the shown range.
        columns: Tokens per line.
        log: Whether colours are logarithmic.
        theme: "light", "dark", or the default.

    Returns:
        A heatmap of token cells; the hover has the whole token, its position and value.

    Raises:
        ReportError: If the metric was not measured or is not one value per token, or there is no
            such prompt or position.
    """
    require_report("report", report)
    variable = report._require(metric)
    if variable.dims != ("prompt", "position"):
        raise ReportError(
            f"{metric} has the dimensions {' '.join(variable.dims)}; a token strip needs one value"
            f" per token, such as received_peak or residual_outlier."
        )
    checked_index(report, "prompt", prompt)
    length = int(report.mask[prompt].sum())
    if not 0 <= start < length:
        raise ReportError(
            f"Prompt {prompt} has no position {start}; its positions run from 0 to {length - 1}."
        )
    stop = min(start + tokens, length)
    values = report[metric][prompt, start:stop].float().cpu().numpy()
    words = [token_at(report, prompt, position) for position in range(start, stop)]
    z, low, high = _colours(values, log, variable.unit)
    rows = -(-len(values) // columns)
    label = axis_label(variable)
    # A strip may be low: the title says what it is, the bar the unit.
    colorbar: dict[str, Any] = dict(title=dict(text=variable.unit or "", side="right"))
    if log:
        colorbar |= log_bar(low, high, _ROW * rows)
    hovers = [
        f"position {start + i}: {plotly_token(word)}<br>{label}: {number(value)}"
        for i, (word, value) in enumerate(zip(words, values.tolist(), strict=True))
    ]
    lines = [f"{start + row * columns:,}" for row in range(rows)]  # what each row begins with
    figure = go.Figure(
        go.Heatmap(
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
        y=[index // columns for index in range(len(words))],
        text=[_short(word) for word in words], mode="text", hoverinfo="skip", showlegend=False,
        textfont=dict(size=11, color=_legible((z - low) / (high - low), palette(theme))),
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5])
    figure.update_yaxes(
        title_text="position",
        tickvals=list(range(rows)),
        ticktext=lines,
        range=[rows - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    part = "" if stop - start == length else f", positions {start} to {stop - 1} of {length:,}"
    title = f"{heading(metric)}: tokens of prompt {prompt}{part}"
    height = 190 + _ROW * rows
    about = plain_about(report.settings)
    few = length - length // 4
    if metric == "received_peak" and report.settings.causal and few < stop:
        about += f" · {FEW.format(few)}"
    return finish(figure, title, about, theme, height=height)


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
    """Return black or white, in contrast to the scale's colour; ink where there is none."""
    scale = colour_scale(False, colours)
    known = np.clip(np.nan_to_num(shares), 0, 1).tolist()
    rgb = np.array([unlabel_rgb(one) for one in sample_colorscale(scale, known)])
    bright = rgb @ (0.299, 0.587, 0.114) > _BRIGHT
    return np.where(np.isnan(shares), colours.ink, np.where(bright, "#000", "#fff")).tolist()


def _grid(items: list[Any], rows: int, columns: int, empty: Any) -> np.ndarray:
    """Arrange items in reading order [row column], with empty cells at the end."""
    filled = [*items, *[empty] * (rows * columns - len(items))]
    return np.array(filled, dtype=object).reshape(rows, columns)


def _short(token: str) -> str:
    shown = shown_token(token)
    cut = shown if len(shown) <= _CELL else shown[: _CELL - 1] + "…"
    return isolated(html.escape(cut, quote=False))
