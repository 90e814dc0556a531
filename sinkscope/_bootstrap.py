"""How sure a mean over prompts is: the percentile bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import ReportError

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
    if not 0 < level < 1 or resamples < 1:
        raise ReportError(
            f"An interval needs a level between 0 and 1 and at least one resample, not "
            f"{level} and {resamples}."
        )
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
