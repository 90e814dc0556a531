"""The attention pattern of one head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope._tidy import to_numpy
from sinkscope.errors import ReportError
from sinkscope.plot import _figure, _labels
from sinkscope.plot._bins import Bins, bins
from sinkscope.plot._scales import colour_scale, value_range
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST = 512
"""Rows and columns that are drawn; larger patterns are cut into bins, the maximum of each shown."""
_LABELLED = 32  # positions whose tokens still fit on an axis


def attention_pattern(
    pattern: Float[Tensor, "query key"],
    tokens: Sequence[str] | None = None,
    *,
    about: _labels.About,
    title: str = "Attention pattern",
    theme: Theme = None,
) -> go.Figure:
    """Which key each query attends to, in one head.

    Above 512 queries or keys, cells are cut into bins of neighbours whose maximum is drawn, so that
    a sink stays as strong as it is; the title says so.

    Args:
        pattern: One head's attention [query key] [probability]; keys that a query does not see
            are 0 or nan.
        tokens: Text of each position, for axes and hover.
        about: Settings of a report, or a line that says model, T, BOS and ε.
        title: Such as "Layer 11, head 4"; plain text.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If the pattern is not [query key], or tokens do not fit it.
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
    queries, keys = (bins(size, LARGEST) for size in figures.shape)
    drawn = keys.maximum(queries.maximum(figures, axis=0), axis=1)
    low, high = value_range(drawn, "probability" if np.nanmin(drawn) >= 0 else None)
    # Cells nobody may see stay empty: the triangle is the mask's, not a row of zeros.
    unseen = (keys.first[None, :] > queries.last[:, None]) & (np.nan_to_num(drawn) == 0)
    near = "about " if queries.binned or keys.binned else ""
    figure = go.Figure(
        go.Heatmap(
            x=keys.edges(),
            y=queries.edges(),
            z=np.where(unseen, np.nan, drawn),
            zmin=low,
            zmax=high,
            colorscale=colour_scale(low < 0, palette(theme)),
            hoverongaps=False,
            colorbar=dict(title=dict(text="attention [probability]", side="right")),
            hovertemplate=f"query {near}%{{y}}, key {near}%{{x}}<br>"
            "attention [probability]: %{z:.3~g}"
            "<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="key", showgrid=False, zeroline=False, **_axis(keys, tokens))
    figure.update_yaxes(
        title_text="query", autorange="reversed", showgrid=False, zeroline=False,
        **_axis(queries, tokens),
    )  # fmt: skip
    if near:
        title += f" (maxima of bins; {figures.shape[0]:,} × {figures.shape[1]:,} cells)"
    return _figure.finish(figure, _labels.escape(title), about, theme, height=620)


def _axis(positions: Bins, tokens: Sequence[str] | None) -> dict[str, Any]:
    """Tokens as ticks, where they fit."""
    at = positions.first
    if tokens is None or positions.binned or len(at) > _LABELLED:
        return {}
    names = [f"{i} {_labels.plotly_token(tokens[i])}" for i in at]
    return dict(tickvals=at, ticktext=names, tickfont_size=11)
