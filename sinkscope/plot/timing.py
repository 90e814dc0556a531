"""Cost of a measurement relative to a bare forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd


BARE = "transformers"


def bench_ratios(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Bars: time of each configuration over the bare forward pass of the same batch.

    The frame has the rows of `sinkscope.bench`:

    ============= ===== ==========================================================================
    column        type  meaning
    ============= ===== ==========================================================================
    shape         str   model shape, such as "llama-1b"
    prompts       int   prompts of the batch
    length        int   positions of a prompt
    way           str   what ran; "transformers" is the bare model
    milliseconds  float median time; nan where it did not run
    ratio         float milliseconds over the bare model's; nan likewise
    memory        float peak memory beyond the loaded model [GiB] (optional)
    note          str   why it did not run (optional)
    ============= ===== ==========================================================================

    Args:
        frame: As above.
        about: A line with device, dtype and versions.
        theme: "light", "dark", or the default.

    Returns:
        Groups of bars, one group a shape of the batch, one colour per configuration.

    Raises:
        ReportError: If a column is missing.
    """
    columns = ("shape", "prompts", "length", "way", "milliseconds", "ratio")
    frames.need(frame, "bench_ratios", *columns)
    colours = palette(theme)
    memory = "memory" in frame and frame["memory"].notna().any()
    hover = "%{x}<br>%{customdata[0]:,.4~g} ms, %{y:.3~g} × the bare forward pass"
    hover += "<br>peak memory %{customdata[1]:.3~g} GiB" if memory else ""
    places = zip(frame["shape"], frame["prompts"], frame["length"], strict=True)
    frame = frame.assign(
        place=[f"{escaped(str(shape))}<br>{b} × {length:,}" for shape, b, length in places]
    )
    figure = go.Figure()
    for index, (way, rows) in enumerate(frame.groupby("way", sort=False)):
        name = escaped(str(way))
        figure.add_bar(
            x=rows["place"], y=rows["ratio"].fillna(0), name=name,
            marker_color=colours.faint if way == BARE else colours.series[index % 8],
            text=["did not run" if r != r else f"{r:.2f}" for r in rows["ratio"]],
            textposition="outside", cliponaxis=False,
            customdata=rows[["milliseconds", *(["memory"] if memory else [])]].to_numpy(),
            hovertemplate=f"{name}<br>{hover}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(1, line=dict(color=colours.faint, dash="dash", width=1))
    figure.update_xaxes(title_text="shape, prompts × length")
    figure.update_yaxes(title_text="time over the bare model's [ratio]", rangemode="tozero")
    figure.update_layout(barmode="group", bargap=0.25)
    return finish(figure, "What measuring costs", about, theme, height=480)
