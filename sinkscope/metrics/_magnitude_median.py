"""The exact median of |x| over a hidden state, however large.

On a CPU numpy selects within a prompt. On a GPU a short prompt is left to ``torch.nanmedian``,
which selects within one row at a time. A long one (32k positions × 4k dims are 134 million entries)
would keep a single GPU block busy for half a second, so there the median is found by bisection over
bit patterns: read as an integer, the pattern of a non-negative float grows with its value. Each
step counts the entries at or below a trial value, a chunk of positions at a time. A sorted sample
supplies the first bracket, which leaves two or three steps in bf16 and about sixteen in fp32. The
bracket is verified by counting, so a sample that misleads costs time and never exactness.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics._reduce import at_least_fp32, position_chunks

_SHORT = 2**18  # entries of a prompt; up to here selecting within a row is faster
_SAMPLED = 2**18  # entries of the samples of all prompts together, at most
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_median(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """Median of |x| over each prompt's real positions and all dims; nan where there are none.

    Exact, and as numpy takes it: an even count gives the mean of the middle two.
    """
    if x.device.type == "cpu":
        return _by_partition(x, mask)
    entries = x.shape[1] * x.shape[2]
    if entries > _SHORT:
        return _by_bisection(x, mask)
    together = max(1, 2**24 // max(1, entries))
    parts = zip(x.split(together), mask.split(together), strict=True)
    return torch.cat([_by_selection(*part) for part in parts])


def _by_partition(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """On a CPU numpy's vectorised quickselect beats everything torch has by an order."""
    medians = []
    for prompt, real in zip(x, mask, strict=True):
        size = at_least_fp32(prompt[real]).abs().flatten().numpy()
        if size.size == 0:
            medians.append(torch.nan)
            continue
        middle = size.size // 2
        ordered = np.partition(size, middle)  # one pivot: asked for two, numpy is not vectorised
        upper = float(ordered[middle])
        lower = upper if size.size % 2 else float(ordered[:middle].max())
        medians.append(lower + (upper - lower) / 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.tensor(medians, dtype=dtype)


def _by_selection(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    size = torch.where(mask[:, :, None], x.abs(), torch.nan)
    size = rearrange(size, "prompt position dim -> prompt (position dim)")
    lower = size.nanmedian(dim=1, keepdim=True).values
    upper = torch.where(size > lower, size, torch.inf).amin(dim=1)
    count = mask.sum(dim=1) * x.shape[2]
    reached = (size <= lower).sum(dim=1)
    lower = lower.squeeze(1)
    return _middle(lower, torch.where(reached > count // 2, lower, upper))


def _by_bisection(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    count = mask.sum(dim=1) * x.shape[2]
    rank = (count + 1) // 2
    low, high, reached = _bracket(x, mask, rank)
    # So many steps close the widest bracket: one wait for the device, and not one a step.
    for _ in range(int((high - low).max()).bit_length()):
        middle = low + (high - low) // 2
        upto = _count_upto(x, mask, _magnitude(middle, x.dtype))
        enough = upto >= rank
        low = torch.where(enough, low, torch.minimum(middle + 1, high))
        high, reached = torch.where(enough, middle, high), torch.where(enough, upto, reached)
    lower = upper = _magnitude(high, x.dtype)
    apart = reached <= count // 2
    if apart.any():
        upper = torch.where(apart, _smallest_above(x, mask, lower), lower)
    return torch.where(count > 0, _middle(lower, upper), torch.nan)


def _middle(
    lower: Float[Tensor, "prompt"], upper: Float[Tensor, "prompt"]
) -> Float[Tensor, "prompt"]:
    lower, upper = at_least_fp32(lower), at_least_fp32(upper)
    return lower + (upper - lower) / 2  # their sum might overflow


def _bracket(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    rank: Int[Tensor, "prompt"],
) -> tuple[Int[Tensor, "prompt"], Int[Tensor, "prompt"], Int[Tensor, "prompt"]]:
    """Bit patterns low <= answer <= high, and how many entries lie at or below high.

    From quantiles of a sample four standard errors to either side; 0 or infinity where they fail.
    """
    every = math.ceil(math.sqrt(x.numel() / _SAMPLED))  # in positions, and in dims
    sample = torch.where(mask[:, ::every, None], x[:, ::every, ::every].abs(), torch.inf)
    ordered = rearrange(sample, "prompt position dim -> prompt (position dim)").sort(dim=1).values

    sampled = mask[:, ::every].sum(dim=1) * sample.shape[2]
    middle = rank * sampled // (mask.sum(dim=1) * x.shape[2]).clamp(min=1)
    margin = 2 * sampled.sqrt().ceil().long() + 1  # a median's standard error is √n / 2 ranks
    low = ordered.gather(1, (middle - margin).clamp(min=0)[:, None]).squeeze(1)
    high = ordered.gather(1, (middle + margin).clamp(max=ordered.shape[1] - 1)[:, None]).squeeze(1)

    too_high = _count_upto(x, mask, low) >= rank  # then the answer may lie below low
    reached = _count_upto(x, mask, high)
    too_low = reached < rank
    low, high = torch.where(too_high, 0, low), torch.where(too_low, torch.inf, high)
    return _bits(low), _bits(high), torch.where(too_low, mask.sum(dim=1) * x.shape[2], reached)


def _count_upto(
    x: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    bound: Float[Tensor, "prompt"],
) -> Int[Tensor, "prompt"]:
    """How many entries of each prompt's real positions have |x| <= bound."""
    count = torch.zeros_like(bound, dtype=torch.long)
    for chunk in position_chunks(x):
        size = x[:, chunk].abs()
        # As ones and zeros of x's own dtype these sum several times faster than as booleans.
        at_most = torch.le(size, bound[:, None, None], out=size).sum(dim=2, dtype=torch.float32)
        count += (at_most * mask[:, chunk]).sum(dim=1, dtype=torch.long)
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
