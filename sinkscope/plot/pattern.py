"""The attention pattern of one head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.plot.bins import Bins, bins
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped, plotly_token
from sinkscope.plot.scales import colour_scale, value_range
from sinkscope.plot.theme import Theme, palette
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_LARGEST = 512  # most rows and columns drawn one by one
_COARSE = 200  # bins of a larger pattern: wider than a pixel, so that a sink's column is visible
_LABELLED = 32  # positions whose tokens all fit on an axis


def attention_pattern(
    pattern: Float[Tensor, "query key"],
    tokens: Sequence[str] | None = None,
    *,
    about: About,
    title: str = "Attention pattern",
    theme: Theme = None,
) -> go.Figure:
    """Attention of each query to each key, in one head.

    More than 512 queries or keys are cut into 200 bins of neighbours whose maximum is drawn, so
    that sinks keep their strength; the title says so.

    Args:
        pattern: One head's attention [query key] [probability]; keys that a query does not see
            are 0 or nan.
        tokens: Text of each position, for axes and hover; not used for bins.
        about: Settings of a report, or a line with model, T, BOS and ε.
        title: Title such as "Layer 11, head 4"; plain text.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are queries, from the top, columns keys. The hover names both tokens.

    Raises:
        ReportError: If the pattern is not [query key], or the number of tokens differs.
    """
    figures = to_numpy(pattern)
    if figures.ndim != 2:
        raise ReportError(
            f"attention_pattern was given the shape {tuple(figures.shape)}; expected one head's "
            "[query key], for example pattern[prompt, head]."
        )
    if tokens is not None and len(tokens) < max(figures.shape):
        raise ReportError(
            f"attention_pattern was given {len(tokens)} tokens for a pattern of shape "
            f"{tuple(figures.shape)}."
        )
    queries, keys = (_bins(size) for size in figures.shape)
    drawn = keys.maximum(queries.maximum(figures, axis=0), axis=1)
    low, high = value_range(drawn, "probability" if np.nanmin(drawn) >= 0 else None)
    # Masked cells stay empty, to distinguish them from zero attention.
    unseen = (keys.first[None, :] > queries.last[:, None]) & (np.nan_to_num(drawn) == 0)
    figure = go.Figure(
        go.Heatmap(
            x=_places(keys, tokens),
            y=_places(queries, tokens),
            z=np.where(unseen, np.nan, drawn),
            zmin=low,
            zmax=high,
            colorscale=colour_scale(low < 0, palette(theme)),
            hoverongaps=False,
            colorbar=dict(title=dict(text="attention [probability]", side="right")),
            hovertemplate="query %{y}, key %{x}<br>attention [probability]: %{z:,.3~r}"
            "<extra></extra>",
        )
    )
    plain = dict(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="key", **plain, **_axis(keys, tokens))
    figure.update_yaxes(title_text="query", autorange="reversed", **plain, **_axis(queries, tokens))
    if queries.binned or keys.binned:
        title += f" (maxima of bins; {figures.shape[0]:,} × {figures.shape[1]:,} cells)"
    return finish(figure, escaped(title), about, theme, height=620)


def _bins(size: int) -> Bins:
    """Return single positions, or bins of equal width, since single ones would not be visible."""
    if size <= _LARGEST:
        return bins(size, _LARGEST)
    first = np.linspace(0, size, _COARSE, endpoint=False).astype(int)
    return Bins(first, np.append(first[1:], size) - 1)


def _places(positions: Bins, tokens: Sequence[str] | None) -> list[str] | list[int]:
    """Return the name of each row or column on axis and hover."""
    ends = zip(positions.first.tolist(), positions.last.tolist(), strict=True)
    if positions.binned:
        return [f"{first} to {last}" if first < last else str(first) for first, last in ends]
    if tokens is None:
        return positions.first.tolist()
    return [f"{first} {plotly_token(tokens[first])}" for first, _ in ends]


def _axis(positions: Bins, tokens: Sequence[str] | None) -> dict[str, Any]:
    """An axis of positions, of positions with their tokens, or of bins with round positions."""
    if positions.binned:
        columns = np.arange(len(positions.first) + 1) - 0.5
        return dict(type="category") | positions.ticks(columns)
    if tokens is None:
        return positions.ticks(positions.edges())
    size = len(positions.first)
    return dict(type="category", tickfont_size=11) | (
        dict(dtick=1) if size <= _LABELLED else dict(nticks=_LABELLED // 2)
    )
