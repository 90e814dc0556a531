"""The sink from the embedding to the last layer, in one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.lines import band
from sinkscope.plot.scales import log_scale
from sinkscope.plot.theme import Palette, Theme, palette
from sinkscope.plot.trace import PART_WORDS

if TYPE_CHECKING:
    import pandas as pd

_PANELS = (
    "Residual norm over the others' median", "Added along the sink's direction",
    "Share of energy in one vector", "FFN input along the trigger",
    "Attention to the sink", "Loss without the writers",
)  # fmt: skip
_NOTHING = "nothing"


def sink_life(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Six panels: the sink's norm, its writers and erasers, the constant part, trigger and effects.

    The frame is tidy, one row per observation; it is what `experiments.life` gives:

    ======== ===== ===============================================================================
    column   type  meaning
    ======== ===== ===============================================================================
    metric   str   residual_peak, added (along the direction), constant_share, trigger (|x·s|),
                   sink_attention, loss
    part     str   of added: "attention", "ffn"; of constant_share: "sink", "control"; of
                   sink_attention and loss: what was set to zero, "nothing" first
    prompt   int   averaged, with a 95 % interval; -1 for constant_share
    layer    int   -1 for loss
    position int   of trigger; -1 for all others
    value    float the value
    ======== ===== ===============================================================================

    Args:
        frame: As above; a panel without rows (a model without a loss or a gated FFN) is labelled as
            such.
        about: Settings of the report, or a line with model, T, BOS and ε.
        theme: "light", "dark", or the default.

    Returns:
        Two columns of three panels; bars and lines of the sink have its colour.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "sink_life", "metric", "part", "prompt", "layer", "position", "value")
    colours = palette(theme)
    figure = make_subplots(
        3, 2, subplot_titles=_PANELS, horizontal_spacing=0.11, vertical_spacing=0.13
    )
    rows = {metric: part for metric, part in frame.groupby("metric", sort=False)}
    for index, (metric, draw) in enumerate(_DRAWN.items()):
        place = dict(row=index // 2 + 1, col=index % 2 + 1)
        if metric in rows:
            draw(figure, rows[metric], colours, place)
        else:
            figure.add_annotation(
                text="not measured on this model", showarrow=False, x=0.5, y=0.5,
                xref="x domain", yref="y domain", **place,
            )  # fmt: skip
            figure.update_xaxes(visible=False, **place)
            figure.update_yaxes(visible=False, **place)
    figure.update_annotations(font_size=13)
    return finish(figure, "The life of the sink", about, theme, height=940)


def _peak(figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]) -> None:
    curve = frames.over_prompts(rows, "layer")
    _line(figure, curve, "sink", colours.sink, "norm over the others' median", place)
    figure.update_yaxes(title_text="ratio", **log_scale(curve["mean"].to_numpy()), **place)
    figure.update_xaxes(title_text="after block", **place)


def _added(figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]) -> None:
    for part, colour in (("attention", colours.other), ("ffn", colours.sink)):
        curve = frames.over_prompts(rows[rows["part"] == part], "layer")
        figure.add_bar(
            x=curve["layer"], y=curve["mean"], name=PART_WORDS[part], marker_color=colour,
            customdata=curve[["low", "high"]].to_numpy(),
            hovertemplate=f"{PART_WORDS[part]} of block %{{x}}: %{{y:,.4~r}} [activation]<br>"
            "95 % interval: %{customdata[0]:,.4~r} to %{customdata[1]:,.4~r}<extra></extra>",
            **place,
        )  # fmt: skip
    figure.update_xaxes(title_text="block", **place)
    figure.update_yaxes(title_text="added [activation]", zeroline=True, **place)


def _constant(
    figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]
) -> None:
    names = {"sink": ("sink", colours.sink), "control": ("another position", colours.other)}
    for part, (name, colour) in names.items():
        curve = rows[rows["part"] == part].groupby("layer", as_index=False)["value"].mean()
        curve = curve.assign(mean=curve["value"], low=np.nan, high=np.nan)
        _line(figure, curve, name, colour, "share of energy", place, showlegend=part != "sink")
    figure.update_xaxes(title_text="after block", **place)
    figure.update_yaxes(title_text="share", range=[0, 1.05], **place)


def _trigger(
    figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]
) -> None:
    curve = frames.over_prompts(rows, "position")
    figure.add_bar(
        x=curve["position"], y=curve["mean"], showlegend=False, marker_color=colours.other,
        customdata=curve[["low", "high"]].to_numpy(),
        hovertemplate="position %{x}: %{y:,.4~r} [activation]<br>"
        "95 % interval: %{customdata[0]:,.4~r} to %{customdata[1]:,.4~r}<extra></extra>",
        **place,
    )  # fmt: skip
    figure.update_xaxes(title_text="position", **place)
    figure.update_yaxes(title_text="|input · trigger|", **place)


def _attention(
    figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]
) -> None:
    for name, colour in zip(rows["part"].unique(), _cycle(colours, rows), strict=True):
        curve = frames.over_prompts(rows[rows["part"] == name], "layer")
        label = "as it is" if name == _NOTHING else escaped(f"without {name}")
        _line(figure, curve, label, colour, "mean attention to the sink", place)
    figure.update_xaxes(title_text="block", **place)
    figure.update_yaxes(title_text="attention [probability]", rangemode="tozero", **place)


def _loss(figure: go.Figure, rows: pd.DataFrame, colours: Palette, place: dict[str, int]) -> None:
    names = list(rows["part"].unique())
    curves = [frames.over_prompts(rows[rows["part"] == name], "layer") for name in names]
    mean, low, high = (
        np.array([c[end].iloc[0] for c in curves]) for end in ("mean", "low", "high")
    )
    figure.add_bar(
        y=["as it is" if name == _NOTHING else escaped(name) for name in names],
        x=mean, orientation="h", showlegend=False, marker_color=_cycle(colours, rows),
        error_x=dict(
            type="data", symmetric=False, array=high - mean, arrayminus=mean - low,
            color=colours.ink, thickness=1.2,
        ),
        hovertemplate="%{y}: %{x:.3f} nat<extra></extra>", **place,
    )  # fmt: skip
    figure.update_xaxes(title_text="loss [nat]", rangemode="tozero", **place)
    figure.update_yaxes(autorange="reversed", showgrid=False, **place)


_DRAWN = {
    "residual_peak": _peak,
    "added": _added,
    "constant_share": _constant,
    "trigger": _trigger,
    "sink_attention": _attention,
    "loss": _loss,
}


def _cycle(colours: Palette, rows: pd.DataFrame) -> list[str]:
    """A colour for each case, the unchanged model's first."""
    size = rows["part"].nunique()
    return [colours.series[i % len(colours.series)] for i in range(size)]


def _line(
    figure: go.Figure,
    curve: pd.DataFrame,
    name: str,
    colour: str,
    label: str,
    place: dict[str, int],
    showlegend: bool = True,
) -> None:
    ends = curve["mean"], curve["low"], curve["high"]
    band(
        figure, curve[curve.columns[0]], ends, name=name, colour=colour, label=label,
        along="block", showlegend=showlegend, **place,
    )  # fmt: skip
