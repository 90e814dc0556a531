"""The exact median of |x| on CUDA by radix selection, without host synchronisation.

The bits of a non-negative float, read as an integer, increase with its value. The median's bits
are therefore determined digit by digit from the top: count the values of the digit among the
entries that match the bits found so far, then choose the digit that contains the required rank. An
even number of entries has two middle ones, so two ranks are tracked; they share one count while
their bits agree.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.devices import on_its_device

DIGITS: dict[torch.dtype, tuple[tuple[int, int], ...]] = {
    torch.bfloat16: ((7, 8), (0, 7)),
    torch.float16: ((7, 8), (0, 7)),
    torch.float32: ((23, 8), (15, 8), (7, 8), (0, 7)),
}
"""(shift, width) in bits of each digit, from the top, without the sign bit."""

TYPES = {
    torch.bfloat16: (tl.int16, tl.bfloat16),
    torch.float16: (tl.int16, tl.float16),
    torch.float32: (tl.int32, tl.float32),
}
"""Triton's names for the integer with a float's bits, and for the float."""

INTEGER = {2: torch.int16, 4: torch.int32}
HEAD, DONE = tl.constexpr(16), tl.constexpr(8)
"""Offsets in a prompt's memory of the counts, and of the numbers of finished programs."""

PROGRAMS = 1024
"""Approximate number of counting programs: several per multiprocessor of a large GPU."""


@on_its_device
def magnitude_median(
    x: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """Median of |x| over each prompt's real positions and all dims; nan where there are none."""
    x, mask = x if x.stride(-1) == 1 else x.contiguous(), mask.contiguous()
    prompts, positions, width = x.shape
    digits = DIGITS[x.dtype]
    # For each prompt: bits and ranks found so far, the number of entries, the number of programs
    # that finished each digit; then counts of every digit's values.
    memory = torch.zeros(
        prompts, HEAD.value + 512 * len(digits), dtype=torch.int32, device=x.device
    )
    median = torch.empty(prompts, dtype=torch.float32, device=x.device)
    rows = max(1, triton.cdiv(prompts * positions, PROGRAMS))
    bits = x.view(INTEGER[x.element_size()])
    block = min(4096, triton.next_power_of_2(width))
    for index, (shift, size) in enumerate(digits):
        _count_kernel[(triton.cdiv(positions, rows), prompts)](
            bits, mask, memory, median, *x.stride()[:2], positions, width, rows, memory.stride(0),
            SHIFT=shift, SIZE=size, INDEX=index, LAST=shift == 0, BLOCK=block,
            INT=TYPES[x.dtype][0], FLOAT=TYPES[x.dtype][1], num_warps=4,
        )  # fmt: skip
    return median


@triton.jit
@no_type_check
def _count_kernel(
    bits,
    mask,
    memory,
    median,
    prompt_stride,
    position_stride,
    n_positions,
    width,
    rows,
    memory_stride,
    SHIFT: tl.constexpr,
    SIZE: tl.constexpr,
    INDEX: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Count the values of one digit in some rows of a prompt.

    The last program of a prompt to finish chooses the digit from the complete counts.
    """
    prompt = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, n_positions)
    bits += prompt * prompt_stride + first.to(tl.int64) * position_stride
    mask += prompt * n_positions
    memory += prompt * memory_stride
    lower = tl.load(memory)
    upper = tl.load(memory + 1)
    bins = tl.arange(0, 1 << SIZE)
    at_lower = tl.zeros([1 << SIZE], dtype=tl.int32)
    at_upper = tl.zeros([1 << SIZE], dtype=tl.int32)
    for row in tl.range(first, last):
        if tl.load(mask + row) != 0:
            for start in tl.range(0, width, BLOCK):
                dims = start + tl.arange(0, BLOCK)
                here = dims < width
                value = tl.load(bits + dims, here, other=0)
                # Widening extends the sign bit, so clear all bits from the sign on.
                value = value.to(tl.int32) & ((1 << (value.dtype.primitive_bitwidth - 1)) - 1)
                digit = (value >> SHIFT) & ((1 << SIZE) - 1)
                above = value >> (SHIFT + SIZE)
                at_lower += tl.histogram(digit, 1 << SIZE, mask=here & (above == lower))
                if upper != lower:
                    at_upper += tl.histogram(digit, 1 << SIZE, mask=here & (above == upper))
        bits += position_stride
    counts = memory + HEAD + INDEX * 512
    tl.atomic_add(counts + bins, at_lower, mask=at_lower > 0, sem="relaxed")
    tl.atomic_add(counts + 256 + bins, at_upper, mask=at_upper > 0, sem="relaxed")
    tl.debug_barrier()  # all counts are written before the program is marked finished
    done = tl.atomic_add(memory + DONE + INDEX, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        _choose(median + prompt, memory, lower, upper, SIZE, INDEX, LAST, INT, FLOAT)


@triton.jit
@no_type_check
def _choose(
    median,
    memory,
    lower,
    upper,
    SIZE: tl.constexpr,
    INDEX: tl.constexpr,
    LAST: tl.constexpr,
    INT: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Append the digit that contains each rank to its bits; after the last digit, take the mean."""
    bins = tl.arange(0, 1 << SIZE)
    counts = memory + HEAD + INDEX * 512
    # Bypass this multiprocessor's L1 cache, which may miss additions by others.
    at_lower = tl.load(counts + bins, cache_modifier=".cg")
    at_upper = tl.load(counts + 256 + bins, cache_modifier=".cg")
    at_upper = tl.where(upper == lower, at_lower, at_upper)
    if INDEX == 0:
        total = tl.sum(at_lower, 0)
        rank_lower = (total + 1) // 2
        rank_upper = total // 2 + 1
        tl.store(memory + 4, total)
    else:
        rank_lower = tl.load(memory + 2)
        rank_upper = tl.load(memory + 3)
    below = tl.cumsum(at_lower, 0) < rank_lower
    lower = (lower << SIZE) + tl.sum(below.to(tl.int32), 0)
    rank_lower -= tl.sum(tl.where(below, at_lower, 0), 0)
    below = tl.cumsum(at_upper, 0) < rank_upper
    upper = (upper << SIZE) + tl.sum(below.to(tl.int32), 0)
    rank_upper -= tl.sum(tl.where(below, at_upper, 0), 0)
    if LAST:
        low = lower.to(INT).to(FLOAT, bitcast=True).to(tl.float32)
        high = upper.to(INT).to(FLOAT, bitcast=True).to(tl.float32)
        middle = low + (high - low) / 2  # the sum could overflow
        tl.store(median, tl.where(tl.load(memory + 4) > 0, middle, float("nan")))
    else:
        tl.store(memory, lower)
        tl.store(memory + 1, upper)
        tl.store(memory + 2, rank_lower)
        tl.store(memory + 3, rank_upper)
