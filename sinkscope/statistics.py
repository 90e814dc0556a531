"""Means with intervals, tests corrected for the number of heads, and rank correlation.

* `Interval` is a mean with the ends of its interval, of a number or of a tensor.
  `bootstrap` computes it over prompts for tensors, `estimate` for one number, and `mean_interval`
  over a few repetitions of a run.
* `max_t` compares two kinds of text head by head, corrected for the number of heads; `chance`
  compares every head with draws of a null, corrected likewise.
* `rank_correlation` relates two measurements over heads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import ReportError, TextError
from sinkscope.output import number
from sinkscope.validation import probability, whole_number

# -- a mean and its interval -----------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean with the ends of its interval: floats, or tensors or arrays of one shape.

    Attributes:
        mean: The mean.
        low: The lower end; nan with too few repetitions for an interval.
        high: The upper end.
    """

    mean: Any
    low: Any
    high: Any

    def __repr__(self) -> str:
        """The numbers; of tensors and arrays the shape and the range of the means."""
        if isinstance(self.mean, float | int):
            parts = (f"{name}={number(x)}" for name, x in self._asdict().items())
            return f"Interval({', '.join(parts)})"
        mean = torch.as_tensor(self.mean).double()
        known = mean[~mean.isnan()].tolist()
        between = f"from {number(min(known))} to {number(max(known))}" if known else "all nan"
        return f"Interval(mean, low, high of shape {tuple(mean.shape)}; means {between})"

    def __str__(self) -> str:
        """``mean [low, high]`` of a number; only the mean if there is no interval."""
        if not isinstance(self.mean, float):
            return repr(self)
        ends = f" [{number(self.low)}, {number(self.high)}]"
        return number(self.mean) + ("" if math.isnan(self.low) else ends)

    def negated(self) -> Interval:
        """The interval with its sign flipped."""
        return Interval(-self.mean, -self.high, -self.low)

    def to_decimals(self, digits: int) -> str:
        """A number as text with a fixed number of decimals, for the columns of a table."""
        return self._written(f".{digits}f")

    def signed(self, digits: int = 3) -> str:
        """A difference as text, with the sign of each value."""
        return self._written(f"+.{digits}f")

    def in_percent(self, digits: int = 0) -> str:
        """A share as text, in percent."""
        return Interval(*(100 * value for value in self))._written(f".{digits}f", " %")

    def _written(self, spec: str, unit: str = "") -> str:
        mean, low, high = (format(value, spec) for value in self)
        interval = "" if math.isnan(self.low) else f" [{low}, {high}]"
        return f"{mean}{unit}{interval}"


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean and Student-t interval of a few independent repetitions; nan ends for one value."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + level / 2, count - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def estimate(x: Float[Tensor, "prompt"]) -> Interval:
    """Mean over prompts of one value per prompt, with its 95 % bootstrap interval."""
    return Interval(*(float(value) for value in bootstrap(x.float())))


def mean_over_prompts(x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "*rest"]:
    """Mean over the prompts in which the value is defined (not nan); nan where it never is."""
    return x.double().nanmean(0).to(x.dtype)


# Resampled means per chunk; torch.quantile also refuses more than 2^24 values.
_CHUNK = 4_000_000


def bootstrap(
    x: Float[Tensor, "prompt *rest"], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile-bootstrap interval of the mean over prompts (Efron 1979).

    Prompts are drawn with replacement, with the same draw for every entry of `x`. The means of all
    resamples are the matrix product of draw counts [resample prompt] and values. The draws are made
    on the CPU, so that the interval does not depend on the device.

    Args:
        x: One value per prompt [prompt ...]; nan where it is not defined in a prompt.
        level: Probability between `low` and `high`.
        resamples: The number of draws.
        seed: Seed of the draws.

    Returns:
        Mean, low and high [...]. The ends are nan where the value is defined in fewer than two
        prompts.

    Raises:
        ReportError: If the level is outside (0, 1), or there are no resamples.
    """
    level = probability("level", level, error=ReportError)
    resamples = whole_number("resamples", resamples, at_least=1, error=ReportError)
    seed = validation.seed(seed, error=ReportError)
    times = _times_drawn(x.shape[0], resamples, seed).to(x.device)

    values = rearrange(x.double(), "prompt ... -> prompt (...)")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=x.device)
    low_high = [
        _quantiles(_resampled_means(times, chunk), ends)
        for chunk in values.split(max(1, _CHUNK // resamples), dim=1)
    ]
    too_few = (~values.isnan()).sum(0) < 2
    low, high = torch.cat(low_high, dim=1).masked_fill(too_few, torch.nan).to(x.dtype)
    return Interval(mean_over_prompts(x), low.reshape(x.shape[1:]), high.reshape(x.shape[1:]))


def bootstrap_difference(
    one: Float[Tensor, "prompt *rest"],
    other: Float[Tensor, "other_prompt *rest"],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Difference of the means of two unpaired sets of prompts, with its percentile interval.

    Each set is resampled independently, with replacement (Efron & Tibshirani 1993, ch. 8).

    Args:
        one: One value per prompt [prompt ...]; nan where it is not defined in a prompt.
        other: The same for the other set of prompts.
        level: Probability between `low` and `high`.
        resamples: The number of draws.
        seed: Seed of the draws.

    Returns:
        Mean of the first minus mean of the second, low and high [...]. The ends are nan where
        either is defined in fewer than two prompts.

    Raises:
        ReportError: If the level is outside (0, 1), or there are no resamples.
    """
    level = probability("level", level, error=ReportError)
    resamples = whole_number("resamples", resamples, at_least=1, error=ReportError)
    seed = validation.seed(seed, error=ReportError)
    sides = [rearrange(x.double(), "prompt ... -> prompt (...)") for x in (one, other)]
    times = [_times_drawn(len(x), resamples, seed + i).to(x.device) for i, x in enumerate(sides)]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=one.device)
    width = max(1, _CHUNK // resamples)
    low_high = [
        _quantiles(_resampled_means(times[0], mine) - _resampled_means(times[1], theirs), ends)
        for mine, theirs in zip(*(x.split(width, dim=1) for x in sides), strict=True)
    ]
    too_few = torch.stack([(~x.isnan()).sum(0) < 2 for x in sides]).any(0)
    low, high = torch.cat(low_high, dim=1).masked_fill(too_few, torch.nan).to(one.dtype)
    mean = mean_over_prompts(one) - mean_over_prompts(other)
    return Interval(mean, low.reshape(mean.shape), high.reshape(mean.shape))


def _times_drawn(prompts: int, resamples: int, seed: int) -> Float[Tensor, "resample prompt"]:
    """Number of times each prompt is drawn in each resample, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    times = torch.zeros(resamples, prompts, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times))


def _quantiles(
    means: Float[Tensor, "resample value"], ends: Float[Tensor, "end"]
) -> Float[Tensor, "end value"]:
    linear = torch.nanquantile(means, ends, dim=0)
    if not means.isinf().any():
        return linear
    # Between two infinite means torch interpolates to nan.
    lower = torch.nanquantile(means, ends, dim=0, interpolation="lower")
    return torch.where(lower.isinf(), lower, linear)


def _resampled_means(
    times: Float[Tensor, "resample prompt"], values: Float[Tensor, "prompt value"]
) -> Float[Tensor, "resample value"]:
    """Mean of each resample over its prompts in which the value is defined."""
    defined = ~values.isnan()
    sums = times @ values.nan_to_num(0, 0, 0)
    for infinity in (torch.inf, -torch.inf):  # 0 × inf would be nan, also for a prompt not drawn
        drawn = times @ (values == infinity).double() > 0
        sums = torch.where(drawn, sums + infinity, sums)
    return sums / (times @ defined.double())


# -- tests corrected for the number of heads, and rank correlations with intervals over prompts ----

_PERMUTATION_CHUNK = 2**24  # prompts × heads × permutations per chunk


def max_t(
    one: Float[Tensor, "prompt *head"],
    other: Float[Tensor, "other_prompt *head"],
    permutations: int = 10_000,
    seed: int = 0,
) -> Float[Tensor, "*head"]:
    """Two-sided p-values for a difference of means, corrected for the number of heads.

    Welch's t of each head is compared with the distribution of the largest |t| over all heads when
    the prompts are assigned to the two sides at random (Westfall & Young 1993, single step). This
    controls the family-wise error rate whatever the correlation between heads. The control is
    exact if a head without a difference has the same distribution on both kinds of text, and
    asymptotic in the number of prompts if only its mean is the same, for which Welch's t is used
    (Janssen 1997). Prompts are assumed to be independent.

    Args:
        one: One value per prompt and head on one kind of text.
        other: The same on another kind of text, from other prompts.
        permutations: Number of random assignments; no p-value is below 1 / (permutations + 1).
        seed: Seed of the assignments.

    Returns:
        (1 + number of permutations whose largest |t| reaches the head's |t|) / (1 + permutations),
        on the CPU; nan for a head that is undefined in any prompt, as in a layer without attention,
        which is left out of the test.

    Raises:
        TextError: If a kind of text has fewer than two prompts.
    """
    sizes = len(one), len(other)
    if min(sizes) < 2:
        raise TextError(
            f"Comparing two kinds of text needs at least two prompts of each, not {sizes[0]} and "
            f"{sizes[1]}."
        )
    both = torch.cat([one.detach().cpu().double(), other.detach().cpu().double()])
    both = rearrange(both, "prompt ... -> prompt (...)")
    defined = ~both.isnan().any(dim=0)
    both = both[:, defined]
    both = both - both.mean(dim=0)  # avoids cancellation in the sums of squares below
    first = torch.zeros(1, len(both), dtype=torch.float64)
    first[:, : sizes[0]] = 1
    observed = _welch(both, first).abs()[0]
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones(both.shape[1], dtype=torch.float64)
    remaining = permutations if both.numel() else 0
    while remaining:
        count = min(remaining, max(1, _PERMUTATION_CHUNK // both.numel()))
        order = torch.rand(count, len(both), generator=generator).argsort(dim=1)
        largest = _welch(both, (order < sizes[0]).double()).abs().amax(dim=1)
        # A permutation that only exchanges equal prompts reproduces the data up to rounding.
        reached += (largest[:, None] >= observed * (1 - 1e-9)).sum(dim=0)
        remaining -= count
    p = torch.full(defined.shape, torch.nan, dtype=torch.float64)
    p[defined] = reached / (1 + permutations)
    return p.reshape(one.shape[1:])


def _welch(
    values: Float[Tensor, "prompt head"], first: Float[Tensor, "split prompt"]
) -> Float[Tensor, "split head"]:
    """Welch's t between the prompts marked 1 and the others, for each split of the prompts."""
    means, errors = [], []
    for side in (first, 1 - first):
        size = side.sum(dim=1, keepdim=True)
        mean = side @ values / size
        variance = (side @ values**2 - size * mean**2).clamp(min=0) / (size - 1)
        means.append(mean)
        errors.append(variance / size)
    difference, error = means[0] - means[1], (errors[0] + errors[1]).sqrt()
    # A head with the same value on every prompt has t = 0, or ±inf if the two means differ.
    return torch.where(difference == 0, 0, difference / error)


def chance(
    observed: Float[Tensor, "*head"], null: Float[Tensor, "draw *head"]
) -> Float[Tensor, "*head"]:
    """One-sided p-values against draws of a null, corrected for the number of heads.

    p = (1 + number of draws whose largest value over all heads reaches the observed one) /
    (1 + draws): a head is compared with the maximum over all heads (Westfall & Young 1993, single
    step), and the observation counts as one of the draws. If under the null the observation is
    exchangeable with the draws, the probability that any head has p ≤ α is at most α, whatever the
    correlation between heads.

    Args:
        observed: One value per head; nan where it is not defined.
        null: The same in each draw.

    Returns:
        p, from 1 / (1 + draws) to 1; nan where the observation or every draw is undefined.
    """
    observed, null = observed.detach().cpu().double(), null.detach().cpu().double()
    drawn = rearrange(null, "draw ... -> draw (...)")
    defined = ~drawn.isnan().all(dim=1)
    largest = drawn.nan_to_num(-torch.inf).amax(dim=1)[defined]
    if not len(largest):
        return torch.full_like(observed, torch.nan)
    reached = (largest.reshape(-1, *[1] * observed.ndim) >= observed).sum(dim=0)
    p = (1 + reached) / (1 + len(largest))
    return p.masked_fill(observed.isnan(), torch.nan)


def spearman(x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation along the last axis; nan where either input is constant."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(each.cpu().numpy(), axis=-1)) for each in (x, y)]
    one, other = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


def rank_correlation(
    x: Float[Tensor, "prompt head"],
    y: Float[Tensor, "prompt head"],
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Spearman's correlation over heads between two quantities, each averaged over prompts.

    The heads are the whole population and the prompts are the sample: the 95 % interval is the
    percentile bootstrap over prompts, with the same draws for both quantities. Noise in either
    pulls the resampled correlations towards zero, so the interval is conservative.

    Args:
        x: One value per prompt and head.
        y: Another value, on the same prompts.
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        Spearman's ρ with its interval; the ends are nan for a single prompt.
    """
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    rho = float(spearman(x.mean(dim=0), y.mean(dim=0)))
    if len(x) < 2:
        return Interval(rho, math.nan, math.nan)
    times = _times_drawn(len(x), resamples, seed)
    resampled = spearman(times @ x, times @ y)
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(rho, low, high)
