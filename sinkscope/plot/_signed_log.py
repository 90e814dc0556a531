"""An axis for figures of either sign over many decades: linear about zero, logarithmic beyond.

What removing a head costs runs from a gain of a hundredth to a loss of several nats; a linear axis
shows the largest only, and a logarithmic one has no place for gains. Plotly has no such axis, so
the data are squeezed and the ticks say what they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

_MOST = 9  # ticks on either side of zero


def squeezed(figures: Any, unit: float) -> np.ndarray:
    """sign(x) log10(1 + |x| / unit): at one unit 0.3, at ten 1.04, at a hundred 2.00."""
    figures = np.asarray(figures, dtype=float)
    return np.asarray(np.sign(figures) * np.log10(1 + np.abs(figures) / unit))


def unit_for(figures: Any) -> float:
    """The power of ten at or below the median size of these figures; 1 where all are zero."""
    sizes = np.abs(np.asarray(figures, dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return 10.0 ** math.floor(math.log10(float(np.median(sizes)))) if sizes.size else 1.0


def ticks(
    figures: Any, unit: float, text: Callable[[float], str] = "{:+g}".format
) -> dict[str, Any]:
    """Ticks for squeezed figures: zero, and every power of ten from the unit to beyond the data.

    Args:
        figures: All that is drawn, not squeezed.
        unit: Of the squeezing, a power of ten.
        text: What is written at a figure.
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
