"""A transplanted sink: attention to it, loss and divergence, condition by condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.theme import Theme, palette
from sinkscope.statistics import bootstrap

if TYPE_CHECKING:
    import pandas as pd

_BASELINE = "baseline"
_WORDS = {
    "host": "no transplant",
    "both": "key and value",
    "key": "key, value zero",
    "value": "value, host's key",
    "slot": "slot: key and value",
    "slot key": "slot: key, value zero",
}
_PANELS = {
    "attention": ("Attention to it", "probability"),
    "loss_change": ("Loss, change", "nat"),
    "divergence": ("KL to baseline", "nat"),
}


def transplant_effects(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Bars: what a transplanted sink's key, value or both do, with 95 % intervals over prompts.

    The frame is tidy, one row an observation; it is what `experiments.transplant` gives:

    ========= ===== =============================================================================
    column    type  meaning
    ========= ===== =============================================================================
    condition str   "baseline" first, then "host" (no transplant), "both", "key", …
    prompt    int   averaged, with a 95 % interval
    metric    str   attention, loss, divergence; others are not drawn
    value     float the number
    ========= ===== =============================================================================

    Args:
        frame: As above.
        about: Settings of the report, or a line that says model, T, BOS and ε.
        theme: "light", "dark", or the default.

    Returns:
        Three panels: attention to the sink or the slot, the change of the loss from the baseline
        run prompt by prompt, and the divergence from its predictions.

    Raises:
        ReportError: If a column is missing, or the baseline run.
    """
    frames.need(frame, "transplant_effects", "condition", "prompt", "metric", "value")
    conditions = frame["condition"].replace("untouched", _BASELINE)  # in files of earlier versions
    frame = frame.assign(condition=conditions)
    frames.pick(frame, "condition", _BASELINE)
    colours = palette(theme)
    names = list(frame["condition"].unique())
    words = [escaped(_WORDS.get(name, name)) for name in names]
    figure = make_subplots(
        1, 3, shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=[title for title, _ in _PANELS.values()],
    )  # fmt: skip
    for col, (metric, (title, unit)) in enumerate(_PANELS.items(), start=1):
        mean, low, high = _intervals(frame, metric, names)
        figure.add_bar(
            y=words, x=mean, orientation="h", showlegend=False,
            marker_color=[
                colours.other if name == _BASELINE
                else colours.series[2] if name.startswith("slot") else colours.sink
                for name in names
            ],
            error_x=dict(
                type="data", symmetric=False, array=high - mean, arrayminus=mean - low,
                color=colours.ink, thickness=1.2,
            ),
            customdata=np.stack([low, high], axis=-1),
            hovertemplate=f"%{{y}}<br>{title} [{unit}]: %{{x:,.3~r}}"
            "<br>95 % interval: %{customdata[0]:,.3~r} to %{customdata[1]:,.3~r}<extra></extra>",
            row=1, col=col,
        )  # fmt: skip
        figure.update_xaxes(title_text=f"[{unit}]", rangemode="tozero", row=1, col=col)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_annotations(font_size=13)
    title = "A sink's key and value, given to prompts without a sink"
    return finish(figure, title, about, theme, height=220 + 34 * len(names))


def _intervals(
    frame: pd.DataFrame, metric: str, names: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95 % interval over prompts of each condition."""
    import torch

    rows = frames.pick(frame, "metric", "loss" if metric == "loss_change" else metric)
    table = rows.pivot_table(index="prompt", columns="condition", values="value")[names]
    if metric == "loss_change":
        table = table.sub(table[_BASELINE], axis=0)
    interval = bootstrap(torch.from_numpy(table.to_numpy(dtype="float64", copy=True)))
    return tuple(end.numpy() for end in interval)
