"""The exact median of |x| over a hidden state too large to sort.

Read as an integer, the bit pattern of a non-negative float grows with its value, so the median can
be found by bisection over bit patterns: each step counts the entries at or below a trial value, a
chunk of positions at a time. A sorted sample supplies the first bracket, which leaves about three
steps in bf16 and about seventeen in fp32. The bracket is verified by counting, so a sample that
misleads costs time and never exactness.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics._reduce import at_least_fp32, position_chunks

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLED = 256  # at most so many positions and so many dims


def magnitude_median(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """Median of |x| over each prompt's real positions and all dims; nan where there are none.

    Exact, and as numpy takes it: an even count gives the mean of the middle two.
    """
    count = mask.sum(dim=1) * x.shape[2]
    lower = _order_statistic(x, mask, (count + 1) // 2)
    upper = lower
    between = _count_upto(x, mask, lower) <= count // 2
    if between.any():
        upper = torch.where(between, _smallest_above(x, mask, lower), lower)
    lower, upper = at_least_fp32(lower), at_least_fp32(upper)
    median = lower + (upper - lower) / 2  # their sum might overflow
    return torch.where(count > 0, median, torch.nan)


def _order_statistic(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    rank: Int[Tensor, "prompt"],
) -> Float[Tensor, "prompt"]:
    """The ``rank``-th smallest magnitude of each prompt, counted from 1."""
    low, high = _bracket(x, mask, rank)
    while (low < high).any():
        middle = low + (high - low) // 2
        reached = _count_upto(x, mask, _magnitude(middle, x.dtype)) >= rank
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, torch.minimum(middle + 1, high))
    return _magnitude(low, x.dtype)


def _bracket(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    rank: Int[Tensor, "prompt"],
) -> tuple[Int[Tensor, "prompt"], Int[Tensor, "prompt"]]:
    """Bit patterns low <= answer <= high: from a sample where it holds, else 0 and infinity."""
    every = [max(1, size // _SAMPLED) for size in x.shape[1:]]
    sample = x[:, :: every[0], :: every[1]].abs()
    sample = torch.where(mask[:, :: every[0], None], sample, torch.inf)
    ordered = rearrange(sample, "prompt position dim -> prompt (position dim)").sort(dim=1).values

    sampled = mask[:, :: every[0]].sum(dim=1) * sample.shape[2]
    middle = rank * sampled // (mask.sum(dim=1) * x.shape[2]).clamp(min=1)
    margin = 4 * sampled.sqrt().ceil().long() + 1
    low = ordered.gather(1, (middle - margin).clamp(min=0)[:, None]).squeeze(1)
    high = ordered.gather(1, (middle + margin).clamp(max=ordered.shape[1] - 1)[:, None]).squeeze(1)

    too_high = _count_upto(x, mask, low) >= rank  # then the answer may lie below low
    too_low = _count_upto(x, mask, high) < rank
    low = torch.where(too_high, 0, low)
    high = torch.where(too_low, torch.inf, high)
    return _bits(low), _bits(high)


def _count_upto(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    bound: Float[Tensor, "prompt"],
) -> Int[Tensor, "prompt"]:
    """How many entries of each prompt's real positions have |x| <= bound."""
    count = torch.zeros_like(bound, dtype=torch.long)
    for chunk in position_chunks(x):
        at_most = x[:, chunk].abs() <= bound[:, None, None]
        count += (at_most.sum(dim=2) * mask[:, chunk]).sum(dim=1)
    return count


def _smallest_above(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    bound: Float[Tensor, "prompt"],
) -> Float[Tensor, "prompt"]:
    """The smallest |x| > bound among each prompt's real positions; infinity if there is none."""
    smallest = torch.full_like(bound, torch.inf)
    for chunk in position_chunks(x):
        size = x[:, chunk].abs()
        size = size.masked_fill_((size <= bound[:, None, None]) | ~mask[:, chunk, None], torch.inf)
        smallest = torch.minimum(smallest, size.amin(dim=(1, 2)))
    return smallest


def _bits(magnitude: Float[Tensor, "prompt"]) -> Int[Tensor, "prompt"]:
    return magnitude.view(_INTEGER[magnitude.element_size()]).long()


def _magnitude(bits: Int[Tensor, "prompt"], dtype: torch.dtype) -> Float[Tensor, "prompt"]:
    return bits.to(_INTEGER[dtype.itemsize]).view(dtype)
