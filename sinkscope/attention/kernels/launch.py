"""Launch the kernels: from tensors and an `AttentionCall` to pointers, strides and tile sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.attention.call import AttentionCall
from sinkscope.attention.kernels import Angles
from sinkscope.attention.kernels.angles import angle_kernel, key_sum_kernel
from sinkscope.attention.kernels.columns import received_kernel
from sinkscope.attention.kernels.forward import forward_kernel
from sinkscope.attention.kernels.rows import chosen_kernel, nearby_kernel, row_kernel
from sinkscope.attention.scores import contiguous_rows
from sinkscope.devices import on_its_device

LOG2_E = math.log2(math.e)

Query = Float[Tensor, "prompt query head d_head"]
Key = Float[Tensor, "prompt key kv_head d_head"]
LogSumExp = Float[Tensor, "prompt head query"]

TILES: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("received", 64): (64, 128, 4, 3),
    ("received", 128): (64, 128, 4, 2),
    ("both", 64): (64, 128, 4, 3),
    ("both", 128): (64, 128, 4, 3),
    ("rows", 64): (128, 64, 4, 3),
    ("rows", 128): (128, 64, 4, 2),
    ("forward", 64): (64, 64, 4, 3),
    ("forward", 128): (64, 64, 4, 3),
    ("received", 256): (64, 64, 4, 2),
    ("both", 256): (64, 64, 4, 2),
    ("rows", 256): (64, 64, 4, 2),
}
"""(queries, keys, warps, stages) of a tile by kernel and head width, for half precision.

The fastest of five to ten each at 8,192 to 32,768 positions, on an H100 up to a width of 128 and on
an H200 for the 192 of latent attention, whose block is 256.
"""

SMALL = (32, 32, 4, 2)
"""Tiles for float32, for wider heads, and for GPUs with less shared memory than `SHARED`."""

SHARED = 160 * 2**10
"""Shared memory of a block that the tiles of `TILES` need at most [bytes]: A100, H100 and later."""


@on_its_device
def attention_to_keys(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    index: Int[Tensor, "prompt slot"],
    number: Int[Tensor, "prompt"],
) -> Float[Tensor, "prompt head query"]:
    """Σ_j A_ij over the first ``number`` keys that ``index`` lists for each prompt."""
    query, key, lse = contiguous_rows(query), contiguous_rows(key), lse.contiguous()
    paid = torch.empty_like(lse)
    bias = lse if call.mask is None else _mask_bias(call.mask, query)
    rows = 64
    chosen_kernel[_grid(query, rows)](
        query, key, lse, bias, index, number, paid, *_strides(query), *_strides(key),
        bias.stride(0), index.stride(0), query.shape[1], **_numbers(call),
        **_shape(query, key, call), M=rows, BIASED=call.mask is not None, num_warps=4,
    )  # fmt: skip
    return paid


@on_its_device
def received_mass(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None,
) -> Float[Tensor, "prompt head key"]:
    """Σ_i A_ij over the chosen queries."""
    return _received(query, key, lse, call, queries)


@on_its_device
def received_mass_by(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    weights: Float[Tensor, "prompt query bucket"],
) -> Float[Tensor, "prompt bucket head key"]:
    """Σ_i w_ib A_ij for weights ≥ 0: w exp(s − lse) = exp(s − (lse − ln w)), bucket by bucket.

    A weight of 0 makes the log-sum-exp infinite, which excludes the query.
    """
    shifts = weights.float().log().mT[:, :, None]
    shifted = (lse[:, None] - shifts).masked_fill(shifts == -torch.inf, torch.inf)
    return torch.stack([_received(query, key, x, call) for x in shifted.unbind(1)], dim=1)


@on_its_device
def row_and_column_sums(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None,
    entropy: bool,
    weights: Float[Tensor, "prompt key kv_head"] | None,
) -> tuple[Float[Tensor, "prompt head key"], LogSumExp | None, LogSumExp | None]:
    """Σ_i A_ij, −Σ_j A_ij ln A_ij and Σ_j A_ij w_j in one pass over the pattern.

    Row sums are accumulated atomically, so their last digits vary between runs.
    """
    if call.mask is not None:  # rare: padded encoders
        received = received_mass(query, key, lse, call, queries)
        rows = row_entropy(query, key, lse, call) if entropy else None
        mass = None if weights is None else weighted_mass(query, key, lse, call, weights)
        if queries is not None:
            rows, mass = (x if x is None else x * queries[:, None, :] for x in (rows, mass))
        return received, rows, mass
    rows = torch.zeros_like(lse, dtype=torch.float32) if entropy else None
    mass = None if weights is None else torch.zeros_like(lse, dtype=torch.float32)
    return _received(query, key, lse, call, queries, rows, mass, weights), rows, mass


@on_its_device
def row_entropy(
    query: Query, key: Key, lse: LogSumExp, call: AttentionCall
) -> Float[Tensor, "prompt head query"]:
    """−Σ_j A_ij ln A_ij."""
    bias = None if call.mask is None else _mask_bias(call.mask, query)
    return _along_rows(query, key, lse, call, bias, entropy=True)


@on_its_device
def nearby_attention(
    query: Query, key: Key, lse: LogSumExp, call: AttentionCall, widths: Sequence[int]
) -> Float[Tensor, "prompt head query span"]:
    """Σ_j A_ij over |i − j| < w for each width, then over 0 < |i − j| ≤ w."""
    query, key, lse = contiguous_rows(query), contiguous_rows(key), lse.contiguous()
    result = lse.new_empty(2 * len(widths), *lse.shape)
    bias = lse if call.mask is None else _mask_bias(call.mask, query)
    shape = _shape(query, key, call)
    rows, columns, warps, stages = _tile("rows", query, shape["D_BLOCK"])
    for width, including, excluding in zip(widths, *result.chunk(2), strict=True):
        nearby_kernel[_grid(query, rows)](
            query, key, lse, bias, including, excluding, *_strides(query), *_strides(key),
            bias.stride(0), query.shape[1], key.shape[1], width, **_numbers(call), **shape,
            M=rows, N=columns, BIASED=call.mask is not None, PRECISION=_precision(query),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return result.movedim(0, -1)


@on_its_device
def weighted_mass(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    weights: Float[Tensor, "prompt key kv_head"],
) -> Float[Tensor, "prompt head query"]:
    """Σ_j A_ij w_j for weights ≥ 0."""
    bias = weights.float().mT.log2()
    if call.mask is not None:
        bias = bias + _mask_bias(call.mask, query)
    return _along_rows(query, key, lse, call, bias.contiguous(), entropy=False)


@on_its_device
def forward(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
) -> tuple[Float[Tensor, "prompt query head d_value"], Float[Tensor, "prompt head query"]]:
    """Attention and its log-sum-exp, learned sink left out; laid out as by `attend.attend`."""
    q, k, v = (contiguous_rows(x.transpose(1, 2)) for x in (query, key, value))
    z = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    bias = lse if call.mask is None else _mask_bias(call.mask, q)
    shape = _shape(q, k, call)
    wide = max(shape["D_BLOCK"], triton.next_power_of_2(v.shape[-1]))
    rows, columns, warps, stages = _tile("forward", q, wide)
    forward_kernel[_grid(q, rows)](
        q, k, v, bias, z, lse, *_strides(q), *_strides(k), *_strides(v), bias.stride(0),
        q.shape[1], k.shape[1], **_numbers(call), **shape, V=v.shape[-1],
        V_BLOCK=triton.next_power_of_2(v.shape[-1]), M=rows, N=columns,
        BIASED=call.mask is not None, PRECISION=_precision(q), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return z, lse


@on_its_device
def causal_angles(
    query: Query,
    key: Key,
    role: Int[Tensor, "prompt position"],
    seen: Float[Tensor, "prompt 2 position"],
    scale: float,
) -> Angles:
    """Norms, cosines and the logit gap under a causal mask without a window.

    Args:
        query: Queries of the dot product.
        key: Keys of the dot product.
        role: Bits of each position, see `angles.py`.
        seen: Numbers of sinks, and of other keys, visible to the query at each position.
        scale: Factor on the dot product.
    """
    query, key, role, seen = (
        contiguous_rows(query),
        contiguous_rows(key),
        role.contiguous(),
        seen.contiguous(),
    )
    prompts, length, heads, width = query.shape
    kv_heads, block = key.shape[2], max(16, triton.next_power_of_2(width))
    chunk = 64 if block <= 128 else 32
    chunks = -(-length // chunk)
    shape = dict(D=width, D_BLOCK=block, C=chunk, num_warps=4)
    sums = seen  # not read if there is a single chunk
    if chunks > 1:
        sums = query.new_empty(prompts, kv_heads, 4, width, chunks, dtype=torch.float32)
        key_sum_kernel[(chunks, kv_heads, prompts)](
            key, role, sums, *_strides(key), length, chunks, **shape
        )
        sums = sums.cumsum(dim=-1)
    result = query.new_empty(prompts, heads, chunks, 10, dtype=torch.float32)
    angle_kernel[(chunks, heads, prompts)](
        query, key, role, seen, sums, result, *_strides(query), *_strides(key), length, chunks,
        float(scale), GROUP=heads // kv_heads, FIRST_ONLY=chunks == 1,
        PRECISION=_precision(query), **shape,
    )  # fmt: skip
    total = result[:, :, 0] if chunks == 1 else result.sum(dim=2)
    means = total[..., :5] / total[..., 5:]  # 0 / 0 is nan, the mean over no entries
    return Angles(*means.unbind(-1))


def _received(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None = None,
    entropy: LogSumExp | None = None,
    weighted: LogSumExp | None = None,
    weights: Float[Tensor, "prompt key kv_head"] | None = None,
) -> Float[Tensor, "prompt head key"]:
    """Return column sums, and add row sums to those output tensors that are given."""
    query, key, lse = contiguous_rows(query), contiguous_rows(key), lse.contiguous()
    received = lse.new_empty(len(key), query.shape[2], key.shape[1])
    shape = _shape(query, key, call)
    along_rows = entropy is not None or weighted is not None
    rows, columns, warps, stages = _tile(
        "both" if along_rows else "received", query, shape["D_BLOCK"]
    )
    sizes = lse if weights is None else weights.float().mT.contiguous()
    received_kernel[_grid(query, columns, key.shape[1])](
        query, key, lse, lse if queries is None else queries.contiguous(), sizes, received,
        lse if entropy is None else entropy, lse if weighted is None else weighted,
        *_strides(query), *_strides(key), query.shape[1], key.shape[1],
        **_numbers(call), **shape, M=rows, N=columns, CHOSEN=queries is not None,
        ENTROPY=entropy is not None, WEIGHTED=weighted is not None,
        KEYS_FIRST=not along_rows and shape["D_BLOCK"] <= 64,
        PRECISION=_precision(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if call.mask is not None:
        received.masked_fill_(~call.mask[:, None, :].to(received.device), 0.0)
    return received


def _along_rows(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    bias: Float[Tensor, "prompt _ key"] | None,
    entropy: bool,
) -> LogSumExp:
    query, key, lse = contiguous_rows(query), contiguous_rows(key), lse.contiguous()
    result = torch.empty_like(lse)
    shape = _shape(query, key, call)
    rows, columns, warps, stages = _tile("rows", query, shape["D_BLOCK"])
    per_head = 0 if bias is None or bias.shape[1] == 1 else bias.stride(1)
    row_kernel[_grid(query, rows)](
        query, key, lse, lse if bias is None else bias, result, *_strides(query), *_strides(key),
        0 if bias is None else bias.stride(0), per_head, query.shape[1], key.shape[1],
        **_numbers(call), **shape, M=rows, N=columns, BIASED=bias is not None, ENTROPY=entropy,
        PRECISION=_precision(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return result


def _mask_bias(mask: Bool[Tensor, "prompt key"], like: Tensor) -> Float[Tensor, "prompt 1 key"]:
    """0 for real keys, -inf for padding."""
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=like.device)
    return bias.masked_fill_(~mask.to(like.device), -torch.inf)[:, None, :]


def _numbers(call: AttentionCall) -> dict[str, Any]:
    """Parameters of a call in the units of the kernels (see `tiles.log2_pattern`)."""
    cap = call.softcap
    return dict(
        offset=call.offset,
        window=0 if call.window is None else call.window,
        scale=float(call.scale) * LOG2_E * (1.0 if cap is None else 2.0 / cap),
        cap=0.0 if cap is None else float(cap) * LOG2_E,
    )


def _shape(query: Query, key: Key, call: AttentionCall) -> dict[str, Any]:
    width = query.shape[-1]
    return dict(
        GROUP=query.shape[2] // key.shape[2],
        D=width,
        D_BLOCK=max(16, triton.next_power_of_2(width)),
        CAUSAL=call.causal,
        WINDOWED=call.window is not None,
        CAPPED=call.softcap is not None,
    )


def _tile(kernel: str, query: Query, width: int) -> tuple[int, int, int, int]:
    if query.dtype == torch.float32 or _shared_memory(query.device) < SHARED:
        return SMALL
    return TILES.get((kernel, max(width, 64)), SMALL)


@cache
def _shared_memory(device: torch.device) -> float:
    """Shared memory of a block on a GPU [bytes]; unlimited where torch does not tell it."""
    if device.type != "cuda":  # Triton's interpreter
        return math.inf
    properties = torch.cuda.get_device_properties(device)
    return float(getattr(properties, "shared_memory_per_block_optin", math.inf))


def _precision(query: Query) -> str:
    # True float32 products, as TF32 is accurate to three digits.
    return "ieee" if query.dtype == torch.float32 else "tf32"


def _grid(query: Query, block: int, length: int | None = None) -> tuple[int, int, int]:
    prompts, n_queries, heads, _ = query.shape
    blocks = -(-(n_queries if length is None else length) // block)  # faster than triton.cdiv
    return blocks, heads, prompts


def _strides(x: Float[Tensor, "prompt position head d"]) -> tuple[int, int, int]:
    return x.stride()[:3]
