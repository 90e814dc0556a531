"""Fit the growth laws predicted by theory to measured curves.

Guo et al. predict that the sink's logit grows like ln t (its gradient shrinks as the attention
saturates) and that Adam grows the residual norm of BOS linearly in t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LAWS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "log": ("a + b ln t", np.log),
    "linear": ("a + b t", lambda t: t),
    "sqrt": ("a + b sqrt t", np.sqrt),
}
BLOCKS = 10  # of neighbouring measurements, which the bootstrap resamples together


@dataclass(frozen=True)
class Growth:
    """One law fitted to one curve by least squares.

    Attributes:
        law: a key of `LAWS`.
        intercept, slope: a and b.
        slope_low, slope_high: 95 % block-bootstrap interval of b over measurement times.
        r_squared: share of the curve's variance that the law explains.
    """

    law: str
    intercept: float
    slope: float
    slope_low: float
    slope_high: float
    r_squared: float

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Return the law's values at these steps."""
        return self.intercept + self.slope * LAWS[self.law][1](np.asarray(steps, dtype=float))


def fit_growth(
    steps: np.ndarray, values: np.ndarray, law: str, resamples: int = 1000, seed: int = 0
) -> Growth:
    """Fit one law to one curve.

    Args:
        steps: steps of the measurements, above 0, from the onset of the phenomenon on, since the
            laws are asymptotic.
        values: the curve.
        law: "log", "linear" or "sqrt".
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Returns:
        The coefficients, the interval of the slope, and R².
    """
    x = LAWS[law][1](np.asarray(steps, dtype=float))
    y = np.asarray(values, dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (intercept + slope * x)
    low, high = _slope_interval(x, intercept + slope * x, residual, resamples, seed)
    spread = ((y - y.mean()) ** 2).sum()
    r_squared = 1 - (residual**2).sum() / spread if spread > 0 else math.nan
    return Growth(law, float(intercept), float(slope), low, high, float(r_squared))


def _slope_interval(
    x: np.ndarray, fitted: np.ndarray, residual: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Resample the residuals in blocks of neighbours, since the curve's noise is autocorrelated."""
    count = len(x)
    size = max(1, count // BLOCKS)
    random = np.random.default_rng(seed)
    starts = random.integers(0, count - size + 1, (resamples, -(-count // size)))
    picked = (starts[..., None] + np.arange(size)).reshape(resamples, -1)[:, :count]
    curves = fitted + residual[picked]
    centred = x - x.mean()
    slopes = (curves * centred).sum(1) / (centred**2).sum()
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(high)


def growth_laws(
    log: pd.DataFrame,
    metrics: tuple[str, ...] = ("logit_gap", "residual_norm"),
    start: int = 200,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit every law to every curve of a run.

    Args:
        log: a run's tidy log, of one seed.
        metrics: metrics to fit.
        start: first step of the fits.

    Returns:
        the fits, one row per metric, layer, head and law, best first within a curve; and the best
        law's curve in the form that `plot.training_curves(laws=…)` takes.
    """
    import pandas as pd

    rows, curves = [], []
    chosen = log[log["metric"].isin(metrics) & (log["step"] >= start)]
    for place, curve in chosen.groupby(["metric", "layer", "head"], sort=False):
        steps, values = curve["step"].to_numpy(), curve["value"].to_numpy()
        fits = sorted((fit_growth(steps, values, law) for law in LAWS), key=lambda f: -f.r_squared)
        labels = dict(zip(("metric", "layer", "head"), cast("tuple", place), strict=True))
        rows += [{**labels, **vars(fit)} for fit in fits]
        shown = LAWS[fits[0].law][0]
        curves.append(
            pd.DataFrame({**labels, "step": steps, "value": fits[0].at(steps), "law": shown})
        )
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)
