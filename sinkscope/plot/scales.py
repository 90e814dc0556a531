"""Colour scales, and axes that are linear, logarithmic, or symmetric logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.colors

from sinkscope.plot.theme import SEQUENTIAL, Palette

Scale = list[list[Any]]
"""A Plotly colour scale: pairs of a share of the range and a colour."""


def value_range(figures: np.ndarray, unit: str | None) -> tuple[float, float]:
    """Ends of a colour scale: 0 to 1 for shares, symmetric for signed values, else the data's."""
    finite = figures[np.isfinite(figures)]
    if finite.size == 0 or unit in ("probability", "share"):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low < 0 or unit in _SIGNED:
        reach = max(-low, high) or 1.0
        return -reach, reach
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ratio_colours(ratios: np.ndarray) -> tuple[np.ndarray, float, float]:
    """log10 of ratios, and the ends of a diverging scale with 1 in the middle.

    The scale spans at most a factor of 100 either way; values beyond, and zero, have the colour of
    the end.
    """
    with np.errstate(divide="ignore"):
        z = np.log10(ratios)
    finite = np.abs(z[np.isfinite(z)])
    reach = min(max(float(finite.max(initial=0.0)), _LEAST_REACH), _RATIO_REACH)
    return np.clip(z, -reach, reach), -reach, reach


def log_bar(low: float, high: float, pixels: int = 250) -> dict[str, Any]:
    """Ticks of a colour bar of logarithms, labelled with the original values.

    Both ends, and between them 1, 2, 5 of each decade (only 1 for more than two decades), as far as
    the labels fit on so many pixels.
    """
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    gap = _LABEL / pixels * (high - low)
    ticks = [low]
    for tick in (decade + math.log10(step) for decade in decades for step in steps):
        if ticks[-1] + gap < tick < high - gap:
            ticks.append(tick)
    ticks.append(high)
    return dict(tickvals=ticks, ticktext=[_three_digits(10**tick) for tick in ticks])


def _three_digits(figure: float) -> str:
    """Format with three digits: 0.00123, 22,800, and powers of ten from a million or below 1e-4."""
    if 1e-4 <= figure < 1e6:
        return f"{float(f'{figure:.3g}'):,.10g}"
    digits, power = f"{figure:.2e}".split("e")
    return f"{float(digits):g} × 10<sup>{int(power)}</sup>".removeprefix("1 × ")


_LABEL = 18  # pixels of a label on a colour bar
_SIGNED = ("logit", "1")  # units of values of either sign
_RATIO_REACH, _LEAST_REACH = 2.0, 0.1  # decades on either side of 1 in a scale of ratios
_DECADES = 5  # most decades of a logarithmic scale


def log_colours(figures: np.ndarray) -> tuple[np.ndarray, float, float]:
    """log10 of non-negative values, and the ends of a scale for it.

    The scale spans at most five decades below the largest value; smaller values, and zero, have the
    colour of its lower end.
    """
    positive = figures[np.isfinite(figures) & (figures > 0)]
    if positive.size == 0:
        return np.full_like(figures, np.nan), -1.0, 0.0
    low, high = float(np.log10(positive.min())), float(np.log10(positive.max()))
    z = np.log10(np.maximum(figures, positive.min()))
    return z, max(low, high - _DECADES), high if high > low else low + 1


def colour_scale(signed: bool, colours: Palette) -> Scale:
    """A diverging scale for signed values, otherwise a sequential one, as Plotly's pairs."""
    if signed:
        return [list(stop) for stop in colours.diverging]
    return plotly.colors.get_colorscale(SEQUENTIAL)


def emptied(scale: Scale, cut: float, colours: Palette) -> Scale:
    """Return a colour scale with the background colour up to a share of its range."""
    if cut <= 0:
        return scale
    cut = min(cut, 1.0)
    empty = [[0.0, colours.muted[1]], [cut, colours.muted[1]]]
    if cut == 1:
        return empty
    points = np.linspace(cut, 1, 16).tolist()
    above = plotly.colors.sample_colorscale(scale, points)
    return empty + [list(stop) for stop in zip(points, above, strict=True)]


def log_switch(logarithmic: bool, ends: list[float] | None = None) -> dict[str, Any]:
    """Two buttons that make y linear or logarithmic, optionally with these ends."""
    ticks = {"linear": None, "log": _LOG_TICKS}
    ranges = {"linear": None, "log": ends}
    return dict(
        type="buttons",
        direction="right",
        active=int(logarithmic),
        x=1,
        xanchor="right",
        y=-0.16,
        yanchor="top",
        pad=dict(t=10),
        buttons=[
            dict(
                label=kind, method="relayout",
                args=[
                    {"yaxis.type": kind, "yaxis.dtick": tick, "yaxis.tickformat": WHOLE}
                    | ({"yaxis.range": at} if (at := ranges[kind]) else {"yaxis.autorange": True})
                ],
            )
            for kind, tick in ticks.items()
        ],
    )  # fmt: skip


WHOLE = ",~g"
"""Tick format: 20,000 rather than 20k, and 0.5 where Plotly writes a logarithmic axis's 5."""

_LOG_TICKS = "D2"  # 1, 2, 5 of each decade
_WIDE = 20.0
_ROOMY = 2.5  # decades within which the ticks 1, 2, 5 fit


def y_scale(logarithmic: bool) -> dict[str, str]:
    """Type and ticks of a y axis that `log_switch` changes."""
    scale = dict(type="log", dtick=_LOG_TICKS) if logarithmic else dict(type="linear")
    return scale | dict(tickformat=WHOLE)


def is_wide(figures: np.ndarray) -> bool:
    """Whether bars of these values need a logarithmic axis: the largest is 20 × the smallest."""
    positive = figures[np.isfinite(figures) & (figures > 0)]
    return bool(positive.size) and bool(positive.max() > _WIDE * positive.min())


def log_range(figures: np.ndarray) -> list[float] | None:
    """Ends of a logarithmic axis of bars: a decade below the smallest, so that its bar shows.

    None if no value is positive.
    """
    positive = figures[np.isfinite(figures) & (figures > 0)]
    if not positive.size:
        return None
    return [math.log10(float(positive.min())) - 1, math.log10(float(positive.max())) + 0.05]


def log_scale(figures: np.ndarray) -> dict[str, Any]:
    """Type and ticks of a logarithmic axis: 1, 2, 5 of each decade, as far as they fit.

    Within a decade Plotly adds more ticks; beyond two and a half decades only powers of ten remain.
    """
    positive = figures[np.isfinite(figures) & (figures > 0)]
    decades = float(np.log10(positive.max() / positive.min())) if positive.size else 0.0
    if decades > _ROOMY:
        return dict(type="log", dtick=1, exponentformat="power")
    ticks = dict(dtick=_LOG_TICKS) if decades >= 1 else {}
    return dict(type="log", tickformat=WHOLE) | ticks


# An axis for values of either sign over many decades: linear around zero, logarithmic beyond.
# The cost of ablating a head ranges from a gain of a hundredth to a loss of several nats; a linear
# axis shows only the largest, and a logarithmic one cannot show gains. Plotly has no such axis, so
# the data are transformed and the ticks labelled with the original values.

_MOST = 9  # ticks on either side of zero


def squeezed(figures: Any, unit: float) -> np.ndarray:
    """sign(x) log10(1 + |x| / unit): at one unit 0.3, at ten 1.04, at a hundred 2.00."""
    figures = np.asarray(figures, dtype=float)
    return np.asarray(np.sign(figures) * np.log10(1 + np.abs(figures) / unit))


def unit_for(figures: Any) -> float:
    """The power of ten at or below the median magnitude of these values; 1 if all are zero."""
    sizes = np.abs(np.asarray(figures, dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return 10.0 ** math.floor(math.log10(float(np.median(sizes)))) if sizes.size else 1.0


def ticks(
    figures: Any, unit: float, text: Callable[[float], str] = "{:+g}".format
) -> dict[str, Any]:
    """Ticks for squeezed values: zero, and every power of ten from the unit to beyond the data.

    Args:
        figures: All values drawn, not squeezed.
        unit: Unit of `squeezed`, a power of ten.
        text: Formats a value.
    """
    figures = np.asarray(figures, dtype=float)
    finite = figures[np.isfinite(figures)]
    values = [0.0]
    for sign, reach in ((1, finite.max(initial=0.0)), (-1, -finite.min(initial=0.0))):
        size = unit
        for _ in range(_MOST):
            if reach <= size / 10 or reach <= 0:
                break
            values.append(sign * size)
            size *= 10
    values.sort()
    return dict(
        tickmode="array",
        tickvals=squeezed(values, unit).tolist(),
        ticktext=["0" if value == 0 else text(value) for value in values],
    )
