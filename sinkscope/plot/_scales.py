"""Colour scales: which one suits a figure, where it ends, and how its lower part turns grey."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.colors

from sinkscope.plot.theme import SEQUENTIAL, Palette

Scale = list[list[Any]]
"""A Plotly colour scale: pairs of a share of the range and a colour."""

_GREY = ("#6f757d", "#b4b9c0")  # below a threshold: seen on white and on black


def value_range(figures: np.ndarray, unit: str | None) -> tuple[float, float]:
    """Ends of a colour scale: 0 to 1 for shares, about zero for signed figures, else the data's."""
    finite = figures[np.isfinite(figures)]
    if finite.size == 0 or unit in ("probability", "share"):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low < 0:
        reach = max(-low, high)
        return -reach, reach
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def colour_scale(low: float, colours: Palette) -> Scale:
    """Diverging where the range goes below zero, otherwise sequential; as Plotly's pairs."""
    if low < 0:
        return [list(stop) for stop in colours.diverging]
    return plotly.colors.get_colorscale(SEQUENTIAL)


def greyed(scale: Scale, cut: float) -> Scale:
    """A colour scale that is grey up to a share of its range."""
    if cut <= 0:
        return scale
    cut = min(cut, 1.0)
    grey = [[0.0, _GREY[0]], [cut, _GREY[1]]]
    if cut == 1:
        return grey
    points = np.linspace(cut, 1, 16).tolist()
    above = plotly.colors.sample_colorscale(scale, points)
    return grey + [list(stop) for stop in zip(points, above, strict=True)]
