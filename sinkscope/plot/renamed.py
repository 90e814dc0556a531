"""Names of the release before: they work, and warn with the new one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sinkscope.plot.dormancy import ablation_effect, loss_by_share_ablated
from sinkscope.plot.training import mitigations

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from sinkscope.plot.labels import About
    from sinkscope.plot.theme import Theme


def cures(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Deprecated: the old name of `mitigations`."""
    _warn("cures", "mitigations")
    return mitigations(frame, about=about, theme=theme)


def removal_cost(
    frame: pd.DataFrame,
    metric: str = "sink_attention",
    *,
    about: About,
    theme: Theme = None,
) -> go.Figure:
    """Deprecated: the old name of `ablation_effect`."""
    _warn("removal_cost", "ablation_effect")
    return ablation_effect(frame, metric, about=about, theme=theme)


def sleeping_heads(
    frame: pd.DataFrame, *, about: About, tolerance: float = 0.01, theme: Theme = None
) -> go.Figure:
    """Deprecated: the old name of `loss_by_share_ablated`, whose column was `share_removed`."""
    _warn("sleeping_heads", "loss_by_share_ablated")
    frame = frame.rename(columns={"share_removed": "share_ablated"})
    return loss_by_share_ablated(frame, about=about, tolerance=tolerance, theme=theme)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"plot.{old} is now plot.{new}; the old name will go in the release after this one.",
        DeprecationWarning,
        stacklevel=3,
    )
