"""Reductions shared by the definitions: precision, sliding sums, medians, chunks."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def token_kernels(x: Float[Tensor, "*shape"]) -> ModuleType | None:
    """The CUDA kernels for vectors if they support this tensor; None to use plain torch."""
    if not x.is_cuda or x.numel() == 0:
        return None
    try:
        from sinkscope.metrics.kernels import tokens
    except ImportError:  # a CUDA build of torch without Triton
        return None
    return tokens if x.dtype in tokens.DTYPES else None


def at_least_fp32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast to fp32; float64 is unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vector_norm(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape"]:
    """Euclidean norm over the last dim, accumulated in fp32 without an fp32 copy of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def largest_magnitude(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "..."]:
    """The largest |x| over a dim; on a GPU in one pass, without the copy of ``x.abs()``."""
    if x.device.type == "cpu":  # inf-norm is not vectorised: a copy is several times faster
        return at_least_fp32(x.abs().amax(dim=dim))
    return at_least_fp32(torch.linalg.vector_norm(x, ord=torch.inf, dim=dim))


def largest_magnitude_at(
    x: Float[Tensor, "prompt position dim"], where: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt dim"]:
    """The largest |x| of each dim over the positions where ``where`` holds; 0 if there are none."""
    if x.device.type == "cpu":  # zeroing a few rows is faster than masking all entries
        size = x.abs()
        size[~where] = 0
        return at_least_fp32(size.amax(dim=1))
    return largest_magnitude(torch.where(where[:, :, None], x, 0), dim=1)


def masked_median(
    x: Float[Tensor, "*batch position"], where: Bool[Tensor, "*#batch position"]
) -> Float[Tensor, "*batch"]:
    """Median of the entries where ``where`` holds, by numpy's convention; nan if there are none.

    An even count gives the mean of the middle two (``torch.median`` gives the lower one).
    """
    x = at_least_fp32(x)
    ordered = torch.where(where, x, torch.inf).sort(dim=-1).values
    count = where.expand_as(x).sum(dim=-1, keepdim=True)
    lower = ordered.gather(-1, ((count - 1) // 2).clamp(min=0))
    upper = ordered.gather(-1, (count // 2).clamp(max=x.shape[-1] - 1))
    return torch.where(count > 0, (lower + upper) / 2, torch.nan).squeeze(-1)


def sliding_sum(
    x: Float[Tensor, "prompt position *rest"], before: int | None, after: int | None
) -> Float[Tensor, "prompt position *rest"]:
    """y_i = Σ_{j = i-before}^{i+after} x_j along ``position``, in O(position); None = unbounded.

    The difference of two cumulative sums would suffer from cancellation on long inputs. Instead
    the axis is divided into blocks of the window's width: every window is then the tail of one
    block plus the head of the next, and only its own terms are added.
    """
    last = x.shape[1] - 1
    before = last if before is None else min(before, last)
    after = last if after is None else min(after, last)
    if before == last and after == last:
        return x.sum(dim=1, keepdim=True).expand_as(x)
    if before == last and after == 0:
        return _running_sum(x)
    if before == 0 and after == last:
        return _running_sum(x.flip(1)).flip(1)
    return _windowed_sum(x, before, after)


def _running_sum(
    x: Float[Tensor, "prompt position *rest"], width: int = 256
) -> Float[Tensor, "prompt position *rest"]:
    """Cumulative sum along ``position``, in blocks, as GPUs scan a long outer axis sequentially."""
    length = x.shape[1]
    if length <= width:
        return x.cumsum(dim=1)
    blocked = _in_blocks(x, width, -(-length // width)).cumsum(dim=2)
    blocked[:, 1:] += blocked[:, :-1, -1:].cumsum(dim=1)
    return rearrange(blocked, "prompt block inner ... -> prompt (block inner) ...")[:, :length]


def _windowed_sum(
    x: Float[Tensor, "prompt position *rest"], before: int, after: int
) -> Float[Tensor, "prompt position *rest"]:
    length, width = x.shape[1], before + after + 1
    blocked = _in_blocks(x, width, -(-(length + before + after) // width), before)
    heads, tails = blocked.cumsum(dim=2), blocked.flip(2).cumsum(dim=2).flip(2)
    # The window of position i is [i, i + width) of the padded axis. If i starts a block, the window
    # is that block and equals its head.
    tails[:, :, 0] = 0
    heads = rearrange(heads, "prompt block inner ... -> prompt (block inner) ...")
    tails = rearrange(tails, "prompt block inner ... -> prompt (block inner) ...")
    return tails[:, :length] + heads[:, width - 1 : width - 1 + length]


def _in_blocks(
    x: Float[Tensor, "prompt position *rest"], width: int, blocks: int, before: int = 0
) -> Float[Tensor, "prompt block inner *rest"]:
    """``x`` padded by ``before`` zeros in front, in blocks, the last one padded with zeros."""
    padded = x.new_zeros(x.shape[0], blocks * width, *x.shape[2:])
    padded[:, before : before + x.shape[1]] = x
    return rearrange(padded, "prompt (block inner) ... -> prompt block inner ...", inner=width)


def position_chunks(
    x: Float[Tensor, "prompt position *rest"], elements: int = 2**24
) -> Iterator[slice]:
    """Slices of the position axis with about ``elements`` values each, to bound temporaries."""
    per_position = max(1, x.numel() // max(1, x.shape[1]))
    step = max(1, elements // per_position)
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)
