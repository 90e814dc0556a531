"""Maps of the experts of a routed model: one cell per layer and expert."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.plot import frames
from sinkscope.plot.figure import finish, tick_step
from sinkscope.plot.labels import About
from sinkscope.plot.scales import colour_scale, log_bar, log_colours
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd

_WORDS = {
    "largest": "largest |output| of each expert",
    "norm": "mean norm of each expert's output",
    "sink_norm": "norm of each expert's output at the sink",
    "weight": "router's mean weight, tokens other than sinks",
    "sink_weight": "router's mean weight at the sink",
    "chosen": "share of the tokens sent to each expert",
    "sink_chosen": "share of the sinks sent to each expert",
}
_LOGARITHMIC = ("largest", "norm", "sink_norm")


def expert_map(
    frame: pd.DataFrame,
    metric: str = "largest",
    *,
    about: About,
    marked: Iterable[tuple[int, int]] = (),
    theme: Theme = None,
) -> go.Figure:
    """Layer × expert map of one metric of every expert of a routed model.

    The frame is that of `experiments.experts`: one row per prompt, layer and expert, with the
    columns prompt, layer, expert and the metric. Outputs have a logarithmic colour scale. A cell is
    empty where no token is sent to the expert.

    Args:
        frame: As above.
        metric: The column to draw: "largest" (its maximum over prompts), "norm", "sink_norm",
            "weight", "sink_weight", "chosen" or "sink_chosen" (their means).
        about: A line with model, T and BOS.
        marked: (layer, expert) pairs to mark, such as the super experts.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers that route, columns experts.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "expert_map", "layer", "expert", metric)
    how = "max" if metric == "largest" else "mean"
    table = frame.pivot_table(
        index="layer", columns="expert", values=metric, aggfunc=how, dropna=False
    )
    figures = table.to_numpy(dtype="float64")
    unit = " [activation]" if metric in _LOGARITHMIC else ""
    bar = dict(title=dict(text=metric.replace("_", " ") + unit, side="right"))
    if metric in _LOGARITHMIC:
        z, low, high = log_colours(figures)
        bar |= log_bar(low, high)
    else:
        z, low, high = figures, 0.0, float(np.nanmax(figures, initial=0.0)) or 1.0
    colours = palette(theme)
    figure = go.Figure()
    figure.add_heatmap(
        x=table.columns, y=table.index.map(str), z=z, zmin=low, zmax=high, customdata=figures,
        colorscale=colour_scale(False, colours), colorbar=bar,
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata:.4~g}<extra></extra>",
    )  # fmt: skip
    pairs = list(marked)
    if pairs:
        figure.add_scatter(
            x=[expert for _, expert in pairs], y=[str(layer) for layer, _ in pairs], mode="markers",
            marker=dict(symbol="square-open", size=14, color=colours.series[1], line_width=2),
            name="super experts", hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    figure.update_xaxes(title_text="expert", dtick=tick_step(figures.shape[1]), showgrid=False)
    figure.update_yaxes(
        title_text="layer", type="category", autorange="reversed", showgrid=False,
        dtick=tick_step(len(table)),
    )  # fmt: skip
    words = _WORDS.get(metric, metric)
    title = words[0].upper() + words[1:] + (" (super experts outlined)" if pairs else "")
    height = max(380, min(900, 230 + 18 * len(table)))
    return finish(figure, title, about, theme, height=height)
