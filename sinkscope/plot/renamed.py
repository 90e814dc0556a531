"""Deprecated names of the previous release, which warn with the new name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.plot.dormancy import ablation_effect, loss_by_share_ablated
from sinkscope.plot.training import mitigations
from sinkscope.renamed import warn

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from sinkscope.plot.labels import About
    from sinkscope.plot.theme import Theme


def cures(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Deprecated: the old name of `mitigations`."""
    warn("plot.cures", "plot.mitigations")
    return mitigations(frame, about=about, theme=theme)


def removal_cost(
    frame: pd.DataFrame,
    metric: str = "sink_attention",
    *,
    about: About,
    theme: Theme = None,
) -> go.Figure:
    """Deprecated: the old name of `ablation_effect`."""
    warn("plot.removal_cost", "plot.ablation_effect")
    return ablation_effect(frame, metric, about=about, theme=theme)


def sleeping_heads(
    frame: pd.DataFrame, *, about: About, tolerance: float = 0.01, theme: Theme = None
) -> go.Figure:
    """Deprecated: the old name of `loss_by_share_ablated`, whose column was `share_removed`."""
    warn("plot.sleeping_heads", "plot.loss_by_share_ablated")
    frame = frame.rename(columns={"share_removed": "share_ablated"})
    return loss_by_share_ablated(frame, about=about, tolerance=tolerance, theme=theme)
