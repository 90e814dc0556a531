"""A long text, from its beginning to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinkscope.plot import _frames as frames
from sinkscope.plot import _labels as labels
from sinkscope.plot._figure import finish
from sinkscope.plot._scales import log_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd

_LEVEL = "everything"


def perplexity_along(frame: pd.DataFrame, *, about: labels.About, theme: Theme = None) -> go.Figure:
    """Perplexity block by block along a text, one line a set of kept positions.

    Where a model breaks down, this shows when: as soon as its window has left the sink behind, or
    beyond the trained context. (The shape of StreamingLLM's first figures, 2309.17453.)

    The frame is tidy, one row a setting and block of tokens:

    ========== ===== ==========================================================================
    column     type  meaning
    ========== ===== ==========================================================================
    kept       str   what stays visible beside the window; one line each, in the order of their
                     first appearance; "everything" is drawn dashed
    position   float middle of the block
    perplexity float of the block
    ========== ===== ==========================================================================

    Args:
        frame: As above.
        about: A line that says model, number of tokens, window and how positions were counted.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "perplexity_along", "kept", "position", "perplexity")
    colours = palette(theme)
    figure = go.Figure()
    index = 0
    for kept, rows in frame.groupby("kept", sort=False):
        name = labels.escape(str(kept))
        line: dict[str, object] = dict(color=colours.faint, dash="dash")
        if kept != _LEVEL:
            # The first lines are the widest, so that one that lies on another can be seen.
            width = max(1.5, 5.5 - index)
            line = dict(color=colours.series[index % len(colours.series)], width=width)
            index += 1
        figure.add_scatter(
            x=rows["position"], y=rows["perplexity"], mode="lines", name=name, line=line,
            hovertemplate=f"{name}, around token %{{x:,.0f}}<br>perplexity: %{{y:,.4~g}}"
            "<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="position in the text", tickformat=",d")
    figure.update_yaxes(
        title_text="perplexity of a block", **log_scale(frame["perplexity"].to_numpy())
    )
    return finish(figure, "Perplexity along a long text", about, theme, height=480)
