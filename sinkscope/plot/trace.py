"""Where a residual peak is written: what is left of it when a part of a block is replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.plot import frames
from sinkscope.plot.figure import finish, tick_step
from sinkscope.plot.labels import About, heading
from sinkscope.plot.scales import colour_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd

_MOST = 2  # upper end of the colours of shares, so that 1, "nothing lost", is in the middle
COLUMNS = ("removed", "part", "mode", "layer", "metric", "value")


def peak_trace(
    frame: pd.DataFrame,
    metric: str = "sink_residual_norm",
    *,
    about: About,
    mode: str = "zero",
    relative: bool = True,
    theme: Theme = None,
) -> go.Figure:
    """Matrix [removed block × part × read layer]: which blocks write the peak.

    The frame is tidy, one row per observation:

    ======== ===== ===============================================================================
    column   type  meaning
    ======== ===== ===============================================================================
    removed  int   block whose part was removed at the sink; -1 for the unchanged model
    part     str   "attention", "ffn" or "both"; "none" for the unchanged model
    mode     str   the replacement, such as "zero"; "none" for the unchanged model
    layer    int   block in which the value was read; after it, for residual norms
    metric   str   "sink_residual_norm", "residual_peak", "sink_attention", …
    value    float the value; several rows of one cell (prompts) are averaged
    ======== ===== ===============================================================================

    Args:
        frame: As above; the rows of the unchanged model are needed where `relative`.
        metric: The metric to draw.
        about: Settings of the report, or a line with model, T, BOS and ε.
        mode: The replacement to draw.
        relative: Whether to show each value as a share of the unchanged model's at that layer,
            where 1 is "nothing lost"; otherwise the values themselves.
        theme: "light", "dark", or the default.

    Returns:
        One panel per part; rows are removed blocks, columns read layers. The colours of shares end
        at 2, which is labelled if some are above it.

    Raises:
        ReportError: If a column or the requested rows are missing.
    """
    frames.need(frame, "peak_trace", *COLUMNS)
    rows = frames.pick(frame, "metric", metric)
    removed = frames.pick(rows, "mode", mode)
    parts = [part for part in PART_WORDS if part in set(removed["part"])]
    baseline = rows[rows["removed"] == -1].groupby("layer")["value"].mean()
    if relative:
        frames.need(baseline.reset_index(), "peak_trace(relative=True)", "layer", "value")
    tables = {part: _matrix(removed[removed["part"] == part]) for part in parts}
    if relative:
        tables = {part: table / baseline[table.columns] for part, table in tables.items()}

    read = f"read {'after' if 'residual' in metric else 'in'} block"
    label = "share that is left" if relative else frames.label_of(metric)
    figure = make_subplots(
        1, len(parts), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[PART_WORDS[part] for part in parts],
    )  # fmt: skip
    for column, (part, table) in enumerate(tables.items(), start=1):
        unchanged = np.broadcast_to(baseline.reindex(table.columns).to_numpy(), table.shape)
        figure.add_heatmap(
            x=table.columns, y=table.index.map(str), z=table.to_numpy(), customdata=unchanged,
            coloraxis="coloraxis", row=1, col=column,
            hovertemplate=f"without the {PART_WORDS[part]} of block %{{y}}, {read} %{{x}}<br>"
            f"{label}: %{{z:.3~g}}<br>"
            "unchanged: %{customdata:.4~g}<extra></extra>",
        )  # fmt: skip
    rows_drawn = max(len(table) for table in tables.values())
    figure.update_xaxes(title_text=read, showgrid=False)
    # Names rather than numbers, since some blocks may not have been removed.
    figure.update_yaxes(
        type="category", autorange="reversed", dtick=tick_step(rows_drawn), showgrid=False
    )
    figure.update_yaxes(title_text="removed block", col=1)
    # 1 is "nothing lost", the colour of the page; what is lost is blue, what grows is orange.
    scale = dict(cmin=0, cmid=1, cmax=_MOST, colorscale=colour_scale(True, palette(theme)))
    bar = dict(title=dict(text=label, side="right"))
    if relative and any((table > _MOST).any(axis=None) for table in tables.values()):
        bar |= dict(tickvals=[0, 0.5, 1, 1.5, _MOST], ticktext=["0", "0.5", "1", "1.5", "≥ 2"])
    figure.update_layout(coloraxis=dict(colorbar=bar, **(scale if relative else {})))
    title = f"{heading(metric)} without one block's part, set to {_set_to(mode)}"
    height = max(380, min(900, 210 + 16 * rows_drawn))
    return finish(figure, title, about, theme, height=height)


def _matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the matrix [removed block, read layer], averaged over everything else."""
    return rows.pivot_table(index="removed", columns="layer", values="value", aggfunc="mean")


PART_WORDS = {"attention": "attention", "ffn": "FFN", "both": "attention and FFN"}


def _set_to(mode: str) -> str:
    names = {"mean": "its mean at the sink", "typical": "its mean at other positions"}
    return names.get(mode, mode)
