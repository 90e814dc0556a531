"""Spikes of a hybrid model: the sink's largest activation by layer, with the attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinkscope.plot import frames
from sinkscope.plot.figure import finish, layer_ticks
from sinkscope.plot.labels import About
from sinkscope.plot.lines import band
from sinkscope.plot.scales import log_switch, y_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd


def pre_attention_spikes(
    frame: pd.DataFrame, *, about: About, log: bool = False, theme: Theme = None
) -> go.Figure:
    """The largest |activation| at the sink after each layer, mean over prompts, with its interval.

    The frame is that of `experiments.spikes`: one row per prompt and layer, with the columns
    prompt, layer, value and attends. Attention layers are dashed lines: a spike is at the layer
    before one.

    Args:
        frame: As above.
        about: A line with model, T and BOS.
        log: Whether y is initially logarithmic; if all values are positive a button changes it.
        theme: "light", "dark", or the default.

    Returns:
        One line with its band, and a dashed line at each attention layer.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "pre_attention_spikes", "prompt", "layer", "value", "attends")
    table = frames.over_prompts(frame, "layer")
    layers = table["layer"].to_numpy()
    colours = palette(theme)
    figure = go.Figure()
    band(
        figure,
        layers,
        (table["mean"], table["low"], table["high"]),
        name="largest |a| at the sink",
        colour=colours.series[0],
        label="largest |a| [activation]",
        along="after layer",
        showlegend=False,
    )
    attending = sorted(set(frame.loc[frame["attends"], "layer"]))
    for layer in attending:
        figure.add_vline(
            x=layer, line=dict(color=colours.series[1], width=1.5, dash="dash"), layer="below"
        )
    figure.update_xaxes(title_text="after layer", **layer_ticks(len(layers)))
    figure.update_yaxes(title_text="largest |a| at the sink [activation]", **y_scale(log))
    if (frame["value"] > 0).all():
        figure.update_layout(updatemenus=[log_switch(log)])
    title = "Largest activation at the sink by layer; the layers that attend are dashed"
    return finish(figure, title, about, theme)
