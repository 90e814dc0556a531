"""The Bigram-Backcopy laboratory: which cure removes which phenomenon, and which part does what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.plot import _frames as frames
from sinkscope.plot import _labels as labels
from sinkscope.plot._figure import finish
from sinkscope.plot.theme import Theme, faded, palette

if TYPE_CHECKING:
    import pandas as pd

_RISKS = ("backcopy_excess", "bigram_excess")


def cures(frame: pd.DataFrame, *, about: labels.About, theme: Theme = None) -> go.Figure:
    """A cell a run and phenomenon: whether it is there, its mean and interval over seeds.

    The frame is what `sinkscope.bb.summarise` gives, one row a cell:

    ==================== ===== ===================================================================
    column               type  meaning
    ==================== ===== ===================================================================
    attention, optimizer str   what was trained; together the row's name
    phenomenon           str   such as "sink", "drain", "peak"; one column each
    mean, low, high      float over seeds, with the 95 % interval (nan for one seed)
    present              str   "yes", "no" or "unclear"; with a question mark for one seed
    ==================== ===== ===================================================================

    Args:
        frame: As above.
        about: What was trained: layers, steps, seeds.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a column is missing.
    """
    columns = ("attention", "optimizer", "phenomenon", "mean", "low", "high", "present")
    frames.need(frame, "cures", *columns)
    colours = palette(theme)
    runs = list(dict.fromkeys(zip(frame["attention"], frame["optimizer"], strict=True)))
    kinds = list(dict.fromkeys(frame["phenomenon"]))
    level = np.full((len(runs), len(kinds)), np.nan)
    text = np.full(level.shape, "", dtype=object)
    for row in frame.itertuples():
        place = runs.index((row.attention, row.optimizer)), kinds.index(row.phenomenon)
        level[place] = {"yes": 1.0, "no": 0.0}.get(row.present.rstrip("?"), 0.5)
        interval = "" if np.isnan(row.low) else f"<br>{row.low:.3g} to {row.high:.3g}"
        text[place] = f"<b>{labels.escape(row.present)}</b>, {row.mean:.3g}{interval}"
    scale = [[0, faded(colours.other, 0.35)], [0.5, faded(colours.faint, 0.25)]]
    figure = go.Figure(
        go.Heatmap(
            x=[labels.escape(kind) for kind in kinds],
            y=[labels.escape(" · ".join(run)) for run in runs],
            z=level, zmin=0, zmax=1, colorscale=[*scale, [1, faded(colours.sink, 0.55)]],
            showscale=False, xgap=2, ygap=2, text=text, texttemplate="%{text}",
            textfont=dict(color=colours.ink, size=12),
            hovertemplate="%{y}<br>%{x}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(side="top", showgrid=False, title_text="phenomenon")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    title = "Which attention and optimiser grow which phenomenon"
    finish(figure, title, about, theme, height=180 + 52 * len(runs))
    return figure.update_layout(margin_t=130)


def knockout_risks(frame: pd.DataFrame, *, about: labels.About, theme: Theme = None) -> go.Figure:
    """Bars: both risks of a trained model as it is and under every intervention.

    The frame is what `sinkscope.bb.knockouts` gives, one row an intervention:

    ============================== ===== =========================================================
    column                         type  meaning
    ============================== ===== =========================================================
    intervention                   str   such as "none", "zero attention", "zero feed-forward"
    layer, head                    int   where; -1 where it has none
    backcopy_excess, bigram_excess float risk over the Bayes optimum [nat]
    ============================== ===== =========================================================

    Args:
        frame: As above.
        about: What was trained.
        theme: "light", "dark", or the default.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "knockout_risks", "intervention", "layer", "head", *_RISKS)
    colours = palette(theme)
    names = [_where(*row) for row in frame[["intervention", "layer", "head"]].itertuples(False)]
    figure = go.Figure()
    for risk, colour in zip(_RISKS, (colours.sink, colours.other), strict=True):
        figure.add_bar(
            y=names, x=frame[risk], orientation="h", name=labels.words(risk), marker_color=colour,
            hovertemplate=f"%{{y}}<br>{labels.words(risk)} [nat]: %{{x:.4~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="excess risk [nat]")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return finish(figure, "What each part carries", about, theme, height=160 + 40 * len(names))


def _where(intervention: str, layer: int, head: int) -> str:
    parts = [str(intervention)]
    parts += [f"layer {layer}"] if layer >= 0 else []
    parts += [f"head {head}"] if head >= 0 else []
    return labels.escape(", ".join(parts))
