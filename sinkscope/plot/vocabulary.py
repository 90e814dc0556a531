"""Which tokens of a vocabulary make a sink at the first position: by class, block and token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.plot import frames
from sinkscope.plot.figure import finish, layer_ticks
from sinkscope.plot.labels import About, escaped, plotly_token
from sinkscope.plot.lines import band
from sinkscope.plot.scales import y_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd

_DOTS = 4000
"""Most tokens drawn in a map, since more overlap, and WebGL is not always available."""
_RATIO = "norm over a later token's [ratio]"


def vocabulary_shares(
    frame: pd.DataFrame, *, about: About, threshold: float, theme: Theme = None
) -> go.Figure:
    """Bars: the share of each class of tokens that makes a sink, by condition.

    Args:
        frame: One row per token and condition, with the columns condition, class and sink.
        about: Settings of a report, or a line with model, T, BOS and texts.
        threshold: Norm ratio above which a token makes a sink, for the title.
        theme: "light", "dark", or the default.

    Returns:
        One bar per class and condition, the largest class on top.

    Raises:
        ReportError: If a column is missing, or there is no row.
    """
    frames.need(frame, "vocabulary_shares", "condition", "class", "sink")
    colours = palette(theme)
    order = frame["class"].value_counts().index.tolist()
    figure = go.Figure()
    for index, (condition, rows) in enumerate(frame.groupby("condition", sort=False)):
        grouped = rows.groupby("class")["sink"]
        share, count = grouped.mean().reindex(order), grouped.size().reindex(order, fill_value=0)
        figure.add_bar(
            y=order, x=share, orientation="h", name=escaped(str(condition)),
            marker_color=colours.series[index % len(colours.series)], customdata=count,
            hovertemplate=f"%{{y}}, {escaped(str(condition))}<br>share that makes a sink: "
            "%{x:.4~f}<br>tokens: %{customdata:,}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="share that makes a sink [share]", range=[0, 1])
    figure.update_yaxes(autorange="reversed", type="category")
    title = f"Tokens that make a sink (norm above {threshold:g} × a later token's), by class"
    return finish(figure, title, about, theme, height=200 + 48 * len(order))


def vocabulary_norms(
    frame: pd.DataFrame, *, about: About, threshold: float, theme: Theme = None
) -> go.Figure:
    """Lines: the residual norm block by block, of tokens that make a sink and of the others.

    Args:
        frame: One row per condition, group and layer, with the columns condition, group, tokens,
            layer, low, median and high (quantiles over tokens).
        about: Settings of a report, or a line with model, T, BOS and texts.
        threshold: Drawn as a dotted line.
        theme: "light", "dark", or the default.

    Returns:
        A median line with a band per condition and group, on a logarithmic scale.

    Raises:
        ReportError: If a column is missing, or there is no row.
    """
    columns = ("condition", "group", "tokens", "layer", "low", "median", "high")
    frames.need(frame, "vocabulary_norms", *columns)
    colours = palette(theme)
    figure = go.Figure()
    for index, ((condition, group), rows) in enumerate(
        frame.groupby(["condition", "group"], sort=False)
    ):
        count = int(rows["tokens"].iloc[0])
        name = escaped(f"{condition}: {group}, {count:,} token{'' if count == 1 else 's'}")
        band(
            figure,
            rows["layer"],
            (rows["median"], rows["low"], rows["high"]),
            name=name,
            colour=colours.series[index % len(colours.series)],
            label=_RATIO,
            along="block",
        )
    figure.add_hline(y=threshold, line=dict(color=colours.faint, dash="dot", width=1.5))
    figure.update_xaxes(title_text="block", **layer_ticks(frame["layer"].nunique()))
    figure.update_yaxes(title_text=_RATIO, **y_scale(True))
    title = "Residual norm of a first token by block: median, and 5 to 95 % of the tokens"
    return finish(figure, title, about, theme, height=480)


def vocabulary_map(
    frame: pd.DataFrame, *, about: About, threshold: float, theme: Theme = None
) -> go.Figure:
    """A dot per token: its norm ratio against its id, coloured by class.

    With more than 4,000 tokens, up to half of the dots are exceptions, and the others are spaced
    evenly over the vocabulary; the title states how many are shown.

    Args:
        frame: One row per token of one condition, with the columns token, text, class, ratio and
            sink.
        about: Settings of a report, or a line with model, T, BOS and texts.
        threshold: Drawn as a dotted line.
        theme: "light", "dark", or the default.

    Returns:
        One trace of dots per class, on a logarithmic scale.

    Raises:
        ReportError: If a column is missing, or there is no row.
    """
    frames.need(frame, "vocabulary_map", "token", "text", "class", "ratio", "sink")
    colours = palette(theme)
    few = ~frame["sink"].to_numpy(dtype=bool)
    exceptions = _evenly(np.flatnonzero(few), _DOTS // 2)
    others = _evenly(np.flatnonzero(~few), _DOTS - len(exceptions))
    shown = frame.iloc[np.sort(np.concatenate([exceptions, others]))]
    figure = go.Figure()
    for index, kind in enumerate(frame["class"].value_counts().index):
        rows = shown[shown["class"] == kind]
        figure.add_scatter(
            x=rows["token"], y=rows["ratio"], mode="markers", name=escaped(str(kind)),
            text=[plotly_token(text) for text in rows["text"]],
            marker=dict(size=5, opacity=0.7, color=colours.series[index % len(colours.series)]),
            hovertemplate=f"%{{text}}, id %{{x}}, {escaped(str(kind))}<br>{_RATIO}: %{{y:.4~g}}"
            "<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=threshold, line=dict(color=colours.faint, dash="dot", width=1.5))
    figure.update_xaxes(title_text="token id")
    figure.update_yaxes(title_text=_RATIO, **y_scale(True))
    part = "" if len(shown) == len(frame) else f", {len(shown):,} of {len(frame):,}"
    title = f"Residual norm at the block of the peak, token by token{part}"
    return finish(figure, title, about, theme, height=520)


def _evenly(rows: np.ndarray, size: int) -> np.ndarray:
    """Return at most `size` of these rows, evenly spaced."""
    if len(rows) <= size:
        return rows
    return rows[np.linspace(0, len(rows) - 1, size).astype(int)]
