"""What a measurement costs beside a plain forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinkscope.plot import _frames as frames
from sinkscope.plot import _labels as labels
from sinkscope.plot._figure import finish
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd


def bench_ratios(frame: pd.DataFrame, *, about: labels.About, theme: Theme = None) -> go.Figure:
    """Bars: time of each way to measure over the plain forward pass of the same batch.

    The frame is tidy, one row a run:

    ============= ===== ==========================================================================
    column        type  meaning
    ============= ===== ==========================================================================
    shape         str   model shape, such as "llama-1b"
    batch, length int   prompts and positions of the batch
    way           str   what ran, such as "plain forward", "stock hooks", "streaming, everything"
    milliseconds  float median time; nan where it ran out of memory
    ratio         float milliseconds over the plain forward's; nan likewise
    peak_gib      float peak memory [GiB] (optional)
    ============= ===== ==========================================================================

    Args:
        frame: As above.
        about: A line that says device, dtype and versions.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a column is missing.
    """
    columns = ("shape", "batch", "length", "way", "milliseconds", "ratio")
    frames.need(frame, "bench_ratios", *columns)
    colours = palette(theme)
    memory = "peak_gib" in frame
    hover = "%{x}<br>%{customdata[0]:,.4~g} ms, %{y:.3~g} × the plain forward pass"
    hover += "<br>peak memory %{customdata[1]:.3~g} GiB" if memory else ""
    places = zip(frame["shape"], frame["batch"], frame["length"], strict=True)
    frame = frame.assign(
        place=[f"{labels.escape(str(shape))}<br>{b} × {length:,}" for shape, b, length in places]
    )
    figure = go.Figure()
    for index, (way, rows) in enumerate(frame.groupby("way", sort=False)):
        name = labels.escape(str(way))
        figure.add_bar(
            x=rows["place"], y=rows["ratio"], name=name,
            marker_color=colours.series[index % len(colours.series)],
            text=["out of memory" if r != r else f"{r:.2f}" for r in rows["ratio"]],
            textposition="outside", cliponaxis=False,
            customdata=rows[["milliseconds", *(["peak_gib"] if memory else [])]].to_numpy(),
            hovertemplate=f"{name}<br>{hover}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(1, line=dict(color=colours.faint, dash="dash", width=1))
    figure.update_xaxes(title_text="shape, batch × length")
    figure.update_yaxes(title_text="time over a plain forward pass [ratio]", rangemode="tozero")
    figure.update_layout(barmode="group", bargap=0.25)
    return finish(figure, "What measuring costs", about, theme, height=480)
