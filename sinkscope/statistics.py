"""Means with their intervals, tests that hold for many heads at once, and rank correlation.

`bootstrap` gives the interval of means over prompts as tensors, `estimate` that of one number;
`mean_interval` is for a few repetitions. `max_t` compares two kinds of text head by head, and
`rank_correlation` relates two measurements over heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import ReportError, TextError
from sinkscope.output import number
from sinkscope.validation import probability, whole_number

# -- intervals for a handful of seeds --------------------------------------------------------------


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t interval of a few independent repetitions; nan bounds for one value."""
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.5 + level / 2, count - 1) * stats.sem(values))
    return mean, mean - half, mean + half


# Resampled means held at once; torch.quantile also refuses more than 2^24 values.
_CHUNK = 4_000_000


class Interval(NamedTuple):
    """A mean over prompts with the ends of its interval, each without the prompt dimension."""

    mean: Tensor
    low: Tensor
    high: Tensor


def mean_over_prompts(x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "*rest"]:
    """Mean over the prompts in which the figure is defined (not nan); nan where it never is."""
    return x.double().nanmean(0).to(x.dtype)


def bootstrap(
    x: Float[Tensor, "prompt *rest"], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile-bootstrap interval of the mean over prompts (Efron 1979).

    Prompts are drawn with replacement, the same draw for every figure, and the mean is taken anew:
    resampled means are one matrix product of how often each prompt was drawn with the figures. The
    draw comes from the CPU, so that the interval does not depend on the device.

    Args:
        x: one figure a prompt [prompt ...]; nan where a prompt does not define it.
        level: probability between `low` and `high`.
        resamples: how many draws.
        seed: of the draws.

    Returns:
        Mean, low and high [...]. The ends are nan where fewer than two prompts define the figure:
        one prompt says nothing about how much prompts differ.

    Raises:
        ReportError: a level outside (0, 1), or no resamples.
    """
    level = probability("level", level, error=ReportError)
    resamples = whole_number("resamples", resamples, at_least=1, error=ReportError)
    seed = validation.seed(seed, error=ReportError)
    prompts = x.shape[0]
    draws = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=draws)
    times = torch.zeros(resamples, prompts, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    times = times.to(x.device)

    figures = rearrange(x.double(), "prompt ... -> prompt (...)")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=x.device)
    low_high = [
        _quantiles(_resampled_means(times, chunk), ends)
        for chunk in figures.split(max(1, _CHUNK // resamples), dim=1)
    ]
    few = (~figures.isnan()).sum(0) < 2
    low, high = torch.cat(low_high, dim=1).masked_fill(few, torch.nan).to(x.dtype)
    return Interval(mean_over_prompts(x), low.reshape(x.shape[1:]), high.reshape(x.shape[1:]))


def _quantiles(
    means: Float[Tensor, "resample figure"], ends: Float[Tensor, "end"]
) -> Float[Tensor, "end figure"]:
    linear = torch.nanquantile(means, ends, dim=0)
    if not means.isinf().any():
        return linear
    # Between two infinite means torch interpolates to nan.
    lower = torch.nanquantile(means, ends, dim=0, interpolation="lower")
    return torch.where(lower.isinf(), lower, linear)


def _resampled_means(
    times: Float[Tensor, "resample prompt"], figures: Float[Tensor, "prompt figure"]
) -> Float[Tensor, "resample figure"]:
    """Mean of each resample over its prompts that define the figure."""
    defined = ~figures.isnan()
    sums = times @ figures.nan_to_num(0, 0, 0)
    for infinity in (torch.inf, -torch.inf):  # 0 × inf would be nan: an inf counts once drawn
        drawn = times @ (figures == infinity).double() > 0
        sums = torch.where(drawn, sums + infinity, sums)
    return sums / (times @ defined.double())


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end; nan with fewer than two prompts.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return number(self.mean)
        return f"{number(self.mean)} [{number(self.low)}, {number(self.high)}]"

    def negated(self) -> Estimate:
        """The same difference, taken the other way round."""
        return Estimate(-self.mean, -self.high, -self.low)

    def to_decimals(self, digits: int) -> str:
        """With as many digits after the point in every figure, for columns of a table."""
        return self._written(f".{digits}f")

    def signed(self, digits: int = 3) -> str:
        """A difference: each figure with its sign."""
        return self._written(f"+.{digits}f")

    def _written(self, how: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, how)
        return f"{self.mean:{how}} [{self.low:{how}}, {self.high:{how}}]"


def estimate(x: Float[Tensor, "prompt"]) -> Estimate:
    """Mean and interval of one figure a prompt."""
    return Estimate(*(float(end) for end in bootstrap(x.float())))


# -- tests that hold for many heads at once, and rank correlations with intervals over prompts -----

_PERMUTED_AT_ONCE = 2**24  # numbers of one piece of the permutations


def max_t(
    one: Float[Tensor, "prompt *head"],
    other: Float[Tensor, "other_prompt *head"],
    permutations: int = 10_000,
    seed: int = 0,
) -> Float[Tensor, "*head"]:
    """Two-sided p-values for a difference of means, corrected for the number of heads.

    Welch's t of each head, against how large the largest |t| of any head gets when prompts change
    sides at random (Westfall & Young 1993, single step). That bounds the probability of naming even
    one head wrongly, however much heads resemble each other: exactly where a head that does not
    differ has one distribution on both kinds of text, and for many prompts where only its mean is
    the same (Janssen 1997: what Welch's t is for). Prompts count as independent of each other.

    Args:
        one: A figure on one kind of text.
        other: The same on another, on other prompts.
        permutations: How often prompts change sides; no p-value is below 1 / (permutations + 1).
        seed: Of the permutations.

    Returns:
        (1 + how many permutations reach the head's |t|) / (1 + permutations), on the CPU.

    Raises:
        TextError: With fewer than two prompts on a side: one says nothing about how prompts differ.
    """
    sizes = len(one), len(other)
    if min(sizes) < 2:
        raise TextError(
            f"Comparing two kinds of text needs at least two prompts of each, not {sizes[0]} and "
            f"{sizes[1]}."
        )
    both = torch.cat([one.detach().cpu().double(), other.detach().cpu().double()])
    both = rearrange(both, "prompt ... -> prompt (...)")
    both = both - both.mean(dim=0)  # keeps the sums of squares below from cancelling
    first = torch.zeros(1, len(both), dtype=torch.float64)
    first[:, : sizes[0]] = 1
    seen = _welch(both, first).abs()[0]
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones(both.shape[1], dtype=torch.float64)
    left = permutations
    while left:
        some = min(left, max(1, _PERMUTED_AT_ONCE // both.numel()))
        order = torch.rand(some, len(both), generator=generator).argsort(dim=1)
        largest = _welch(both, (order < sizes[0]).double()).abs().amax(dim=1)
        # A permutation that only swaps equal prompts is the data itself, rounding apart.
        reached += (largest[:, None] >= seen * (1 - 1e-9)).sum(dim=0)
        left -= some
    return (reached / (1 + permutations)).reshape(one.shape[1:])


def _welch(
    figures: Float[Tensor, "prompt head"], first: Float[Tensor, "split prompt"]
) -> Float[Tensor, "split head"]:
    """Welch's t of the prompts marked 1 against the others, for each way to split them."""
    means, errors = [], []
    for side in (first, 1 - first):
        size = side.sum(dim=1, keepdim=True)
        mean = side @ figures / size
        spread = (side @ figures**2 - size * mean**2).clamp(min=0) / (size - 1)
        means.append(mean)
        errors.append(spread / size)
    difference, error = means[0] - means[1], (errors[0] + errors[1]).sqrt()
    # A head that is the same on every prompt differs by nothing, or for sure.
    return torch.where(difference == 0, 0, difference / error)


def spearman(x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation along the last axis; nan where either is constant."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(each.cpu().numpy(), axis=-1)) for each in (x, y)]
    one, other = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


def rank_correlation(
    x: Float[Tensor, "prompt head"],
    y: Float[Tensor, "prompt head"],
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Spearman's correlation over heads of two figures' means over prompts.

    The heads are all there are, so what is uncertain is the texts: the 95 % interval is the
    percentile bootstrap over prompts, both figures drawn together. Noise in either figure pulls the
    resampled correlations towards zero, so that the interval errs on the side of "no relation".
    """
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(x), (resamples, len(x)), generator=generator)
    rho = float(spearman(x.mean(dim=0), y.mean(dim=0)))
    if len(x) < 2:
        return Estimate(rho, torch.nan, torch.nan)
    times = torch.zeros(resamples, len(x), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    again = spearman(times @ x, times @ y)
    low, high = again.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(rho, low, high)
