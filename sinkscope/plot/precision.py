"""What low precision costs: what keeping a few tokens gains, and which tensor of which layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.errors import ReportError
from sinkscope.plot import frames
from sinkscope.plot.figure import finish, tick_step
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.scales import colour_scale, log_bar, log_colours
from sinkscope.plot.theme import Theme, palette
from sinkscope.statistics import estimate

if TYPE_CHECKING:
    import pandas as pd

_NOTHING = "nothing"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")


def kept_tokens(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """By how much keeping some tokens in full precision lowers the loss, scheme by scheme.

    The frame is that of `experiments.precision`; rows whose `what` is "all" are drawn:

    ============= ===== ==========================================================================
    column        type  meaning
    ============= ===== ==========================================================================
    what          str   "all": every tensor is quantised
    scheme        str   how, along x
    kept          str   the rule whose tokens are kept, one symbol each, or "nothing"
    prompt        int   the prompt
    loss          float its mean loss [nat]
    destroyed     bool  whether the run is destroyed; then there is no dot but a word
    ============= ===== ==========================================================================

    Args:
        frame: As above.
        about: A line with model, T and BOS.
        theme: "light", "dark", or the default.

    Returns:
        Dots with 95 % intervals over prompts.

    Raises:
        ReportError: If a column is missing, or no run has nothing kept.
    """
    needed = "what", "scheme", "kept", "prompt", "loss", "destroyed"
    frames.need(frame, "kept_tokens", *needed)
    runs = frames.pick(frame, "what", "all")
    schemes = list(dict.fromkeys(runs["scheme"]))
    rules = [rule for rule in dict.fromkeys(runs["kept"]) if rule != _NOTHING]
    bare = frames.pick(runs, "kept", _NOTHING)
    colours = palette(theme)
    figure = go.Figure()
    lost: set[str] = set(bare.loc[bare["destroyed"], "scheme"])
    for index, rule in enumerate(rules):
        own = runs[runs["kept"] == rule]
        offset = 0.16 * (index - (len(rules) - 1) / 2)
        x, gains = [], []
        for at, scheme in enumerate(schemes):
            before, after = (
                each[each["scheme"] == scheme].set_index("prompt") for each in (bare, own)
            )
            if after.empty or before["destroyed"].any() or after["destroyed"].any():
                continue
            x.append(at + offset)
            gains.append(_gain(before, after))
        mean, low, high = np.array(gains, dtype=float).reshape(-1, 3).T
        figure.add_scatter(
            x=x, y=mean, mode="markers", name=f"{escaped(rule)} kept",
            marker=dict(
                size=9, symbol=_SYMBOLS[index % len(_SYMBOLS)],
                color=colours.series[index % len(colours.series)],
            ),
            error_y=dict(
                symmetric=False, array=high - mean, arrayminus=mean - low, thickness=1.5, width=3
            ),
            text=[escaped(schemes[round(each)]) for each in x],
            hovertemplate=f"%{{text}}, {escaped(rule)} kept<br>D: %{{y:.4~r}} nat<extra></extra>",
        )  # fmt: skip
    for at, scheme in enumerate(schemes):
        if scheme in lost:
            figure.add_annotation(
                x=at, y=0, text="destroyed", showarrow=False, yshift=12, font_color=colours.faint
            )
    figure.add_hline(y=0, line=dict(color=colours.faint, width=1), layer="below")
    figure.update_xaxes(
        title_text="scheme", tickvals=list(range(len(schemes))),
        ticktext=[escaped(scheme) for scheme in schemes],
        range=[-0.5, len(schemes) - 0.5], showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(title_text="reduction of the loss [nat]")
    title = "What keeping a few tokens in full precision gains"
    return finish(figure, title, about, theme)


def _gain(before: pd.DataFrame, after: pd.DataFrame) -> tuple[float, float, float]:
    import torch

    gain = (before["loss"] - after["loss"]).to_numpy(dtype="float64", copy=True)
    return tuple(estimate(torch.from_numpy(gain)))


def damage_map(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Layer × tensor map of the damage that quantising one tensor of one layer does.

    The frame is that of `experiments.precision`; rows whose `what` is "cell" are drawn, a panel for
    each `kept`, in one logarithmic scale.

    Args:
        frame: With the columns what, kept, layer, tensor and divergence.
        about: A line with model, T, BOS and scheme.
        theme: "light", "dark", or the default.

    Returns:
        Heatmaps: rows are layers, columns tensors.

    Raises:
        ReportError: If a column is missing, or there is no map.
    """
    frames.need(frame, "damage_map", "what", "kept", "layer", "tensor", "divergence")
    cells = frames.pick(frame, "what", "cell")
    kept = list(dict.fromkeys(cells["kept"]))
    tensors = list(dict.fromkeys(cells["tensor"]))
    tables = [
        cells[cells["kept"] == rule]
        .pivot_table(index="layer", columns="tensor", values="divergence", aggfunc="mean")
        .reindex(columns=tensors)
        for rule in kept
    ]
    values = np.stack([table.to_numpy(dtype="float64") for table in tables])
    if not np.isfinite(values).any():
        raise ReportError("damage_map was given a map without a number; measure it first.")
    z, low, high = log_colours(values)
    if not np.isfinite(z).any():  # nothing is damaged
        z = np.full_like(values, low)
    figure = make_subplots(
        1, len(kept), subplot_titles=[f"{escaped(rule)} kept" for rule in kept],
        shared_yaxes=True, horizontal_spacing=0.06,
    )  # fmt: skip
    for column, (table, colour, figures) in enumerate(zip(tables, z, values, strict=True), 1):
        figure.add_heatmap(
            x=tensors, y=table.index.map(str), z=colour, coloraxis="coloraxis", xgap=1,
            customdata=figures, row=1, col=column,
            hovertemplate="layer %{y}, %{x}<br>KL: %{customdata:.3~g} nat<extra></extra>",
        )  # fmt: skip
    layers = len(tables[0])
    figure.update_xaxes(showgrid=False, tickangle=-40)
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, dtick=tick_step(layers)
    )
    figure.update_yaxes(title_text="layer", col=1)
    bar = dict(title=dict(text="KL to full precision [nat]", side="right")) | log_bar(low, high)
    figure.update_layout(
        coloraxis=dict(
            cmin=low, cmax=high, colorscale=colour_scale(False, palette(theme)), colorbar=bar
        )
    )
    figure.update_annotations(font_size=13)
    height = max(420, min(900, 230 + 16 * layers))
    title = "Damage by one quantised tensor of one layer"
    return finish(figure, title, about, theme, height=height)
