"""Intervals for a handful of seeds."""

from __future__ import annotations

import math

import numpy as np


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval of a few independent repetitions; NaN bounds for one value."""
    values = np.asarray(values, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, math.nan, math.nan
    half = student_quantile(0.5 + level / 2, count - 1) * values.std(ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution for probability >= 1/2, by bisection of its CDF.

    With t = sqrt(freedom) tan(angle), the CDF is 1/2 + c * integral of cos(angle)^(freedom - 1).
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = scale * np.cos(angles) ** (freedom - 1)
    steps = np.diff(angles) * (density[1:] + density[:-1]) / 2
    cdf = 0.5 + np.concatenate([[0.0], np.cumsum(steps)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability, cdf, angles)))
