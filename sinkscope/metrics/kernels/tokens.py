"""Norms through W_O, and norm, peak and cosine to the sink, reading each vector once on CUDA."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.devices import on_its_device

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_HEAD = 128
"""Largest d_head for which a Gram matrix and a block of vectors fit in shared memory."""


@on_its_device
def norms_through(
    x: Float[Tensor, "prompt position kv_head d_head"], gram: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "prompt head position"]:
    """See `metrics.values.norms_through`."""
    x, gram = x if x.stride(-1) == 1 else x.contiguous(), gram.float().contiguous()
    prompts, length, kv_heads, width = x.shape
    heads, block = len(gram), max(16, triton.next_power_of_2(width))
    result = torch.empty(prompts, heads, length, dtype=torch.float32, device=x.device)
    rows = 64 if x.dtype != torch.float32 else 32
    # float16 vectors times G in three TF32 parts is accurate to float32.
    precision = "ieee" if x.dtype == torch.float32 else "tf32x3"
    split = x.dtype == torch.bfloat16
    through_kernel[(-(-length // rows), heads, prompts)](
        x, gram, result, *x.stride()[:3], length, GROUP=heads // kv_heads, D=width, D_BLOCK=block,
        M=rows, COLUMNS=max(16, block // 2) if split else block, SPLIT=split, PRECISION=precision,
        num_warps=4,
    )  # fmt: skip
    return result


@on_its_device
def token_summary(
    hidden: Float[Tensor, "prompt position dim"], first: Int[Tensor, "prompt"]
) -> tuple[Tensor, Tensor, Tensor]:
    """‖h_j‖, the largest |h_j| over dims, and cos(h_j, h_s) with s = ``first``; see `residual`."""
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    prompts, length, width = hidden.shape
    norm, peak, cosine = torch.empty(
        3, prompts, length, dtype=torch.float32, device=hidden.device
    ).unbind(0)
    rows = 4
    summary_kernel[(-(-length // rows), prompts)](
        hidden, first, norm, peak, cosine, *hidden.stride()[:2], length, width, R=rows,
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return norm, peak, cosine


@triton.jit
@no_type_check
def through_kernel(
    x,
    gram,
    result,
    x_b,
    x_t,
    x_h,
    length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sqrt(xᵀ G^h x) for one block of positions of one query head, over blocks of columns of G.

    With SPLIT, for bfloat16 vectors, G is split into three bfloat16 parts, exact to float32.
    """
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    places = tl.program_id(0) * M + tl.arange(0, M)
    here = places < length
    dims = tl.arange(0, D_BLOCK)
    at = places.to(tl.int64)[:, None] * x_t + dims[None, :]
    x += prompt * x_b + (head // GROUP) * x_h
    vectors = tl.load(x + at, mask=here[:, None] & (dims < D)[None, :], other=0.0)
    size = tl.zeros([M], dtype=tl.float32)
    for start in tl.static_range(0, D_BLOCK, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        square = head * D * D + dims[:, None] * D + columns[None, :]
        g = tl.load(gram + square, mask=(dims < D)[:, None] & (columns < D)[None, :], other=0.0)
        if SPLIT:
            high = g.to(tl.bfloat16)
            rest = g - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            through = tl.dot(vectors, high, tl.dot(vectors, middle, tl.dot(vectors, low)))
        else:
            through = tl.dot(vectors.to(tl.float32), g, input_precision=PRECISION)
        if COLUMNS < D_BLOCK:
            part = places.to(tl.int64)[:, None] * x_t + columns[None, :]
            along = tl.load(x + part, mask=here[:, None] & (columns < D)[None, :], other=0.0)
        else:
            along = vectors
        size += tl.sum(through * along.to(tl.float32), 1)
    size = tl.sqrt(tl.maximum(size, 0.0))
    tl.store(result + (prompt * tl.num_programs(1) + head) * length + places, size, mask=here)


@triton.jit
@no_type_check
def summary_kernel(
    hidden,
    first,
    norm,
    peak,
    cosine,
    hidden_b,
    hidden_t,
    length,
    width,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm, largest magnitude and cosine to the sink of a few positions; nan without a sink."""
    prompt = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * R + tl.arange(0, R)
    here = places < length
    sink = tl.load(first + prompt)
    there = sink < length
    bound = tl.where(there, width, 0)
    hidden += prompt * hidden_b
    squares = tl.zeros([R], dtype=tl.float32)
    along = tl.zeros([R], dtype=tl.float32)
    largest = tl.zeros([R], dtype=tl.float32)
    own = tl.zeros([1], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        inside = dims < width
        s = tl.load(hidden + sink * hidden_t + dims, mask=dims < bound, other=0.0)
        s = s.to(tl.float32)
        at = places.to(tl.int64)[:, None] * hidden_t + dims[None, :]
        x = tl.load(hidden + at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
        along += tl.sum(x * s[None, :], 1)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        own += tl.sum(s * s, 0)
    length_of = tl.sqrt(squares)
    angle = along / (length_of * tl.sqrt(own))
    angle = tl.where(there, angle, float("nan"))
    row = prompt * length + places
    tl.store(norm + row, length_of, mask=here)
    tl.store(peak + row, largest, mask=here)
    tl.store(cosine + row, angle, mask=here)
