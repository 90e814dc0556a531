"""Norms and angles of queries and keys, and the sink's logit gap, without the pattern.

All of them are linear in the visible keys, so they can be computed from sums of keys and of their
directions, over the sinks and over all others. A prompt is divided into chunks; `key_sum_kernel`
sums each chunk, a cumulative sum over chunks follows, and `angle_kernel` adds the visible keys of
the query's own chunk by a small matrix product.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from sinkscope.attention.kernels.tiles import load_block

SINK: tl.constexpr = tl.constexpr(1)
OTHER: tl.constexpr = tl.constexpr(2)
COUNTED: tl.constexpr = tl.constexpr(4)
"""Bits of a position's role: a sink; another real key; a query that counts."""


@triton.jit
@no_type_check
def key_sum_kernel(
    key,
    role,
    sums,
    key_b,
    key_t,
    key_h,
    length,
    chunks,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    C: tl.constexpr,
):
    """One chunk's sums of a KV head: sinks, their directions, other keys, their directions."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    places = chunk * C + tl.arange(0, C)
    here = places < length
    dims = tl.arange(0, D_BLOCK)
    key += prompt * key_b + head * key_h
    k = load_block(key, key_t, places, length, D, D_BLOCK).to(tl.float32)
    roles = tl.load(role + prompt * length + places, mask=here, other=0)
    sink = ((roles & SINK) != 0)[:, None]
    other = ((roles & OTHER) != 0)[:, None]
    unit = k / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)[:, None]

    sums += ((prompt * tl.num_programs(1) + head) * 4 * D + dims) * chunks + chunk
    inside = dims < D
    tl.store(sums, tl.sum(tl.where(sink, k, 0.0), 0), mask=inside)
    tl.store(sums + D * chunks, tl.sum(tl.where(sink, unit, 0.0), 0), mask=inside)
    tl.store(sums + 2 * D * chunks, tl.sum(tl.where(other, k, 0.0), 0), mask=inside)
    tl.store(sums + 3 * D * chunks, tl.sum(tl.where(other, unit, 0.0), 0), mask=inside)


@triton.jit
@no_type_check
def angle_kernel(
    query,
    key,
    role,
    seen,
    sums,
    result,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    length,
    chunks,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    C: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Five sums of one head over one chunk of queries, and the number of queries in each.

    ``seen`` has the numbers of sinks and of other keys visible to each query, ``sums`` the
    cumulative sums of `key_sum_kernel` over chunks; with FIRST_ONLY there is a single chunk.
    The five means are those of `kernels.Angles`.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1) // GROUP
    places = chunk * C + tl.arange(0, C)
    here = places < length
    dims = tl.arange(0, D_BLOCK)
    query += prompt * query_b + head * query_h
    key += prompt * key_b + (head // GROUP) * key_h
    q = load_block(query, query_t, places, length, D, D_BLOCK)
    k = load_block(key, key_t, places, length, D, D_BLOCK)
    roles = tl.load(role + prompt * length + places, mask=here, other=0)
    seen += prompt * 2 * length + places
    sinks_seen = tl.load(seen, mask=here, other=0.0)
    others_seen = tl.load(seen + length, mask=here, other=0.0)
    sink = (roles & SINK) != 0
    other = (roles & OTHER) != 0
    counted = (roles & COUNTED) != 0

    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    q = q.to(tl.float32)
    k = k.to(tl.float32)
    q_norm = tl.sqrt(tl.sum(q * q, 1))
    k_norm = tl.sqrt(tl.sum(k * k, 1))
    cosines = products / tl.maximum(k_norm, 1e-12)[None, :]
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    at_sinks = sink[None, :] & (column <= row)
    at_others = other[None, :] & (column < row)  # excludes a query's own key
    to_sink = tl.sum(tl.where(at_sinks, products, 0.0), 1)
    sink_cosine = tl.sum(tl.where(at_sinks, cosines, 0.0), 1)
    to_other = tl.sum(tl.where(at_others, products, 0.0), 1)
    other_cosine = tl.sum(tl.where(at_others, cosines, 0.0), 1)
    if not FIRST_ONLY:
        sums += ((prompt * kv_heads + head // GROUP) * 4 * D + dims) * chunks + chunk - 1
        before = dims < tl.where(chunk > 0, D, 0)  # none before the first chunk
        step = D * chunks
        to_sink += tl.sum(q * tl.load(sums, mask=before, other=0.0)[None, :], 1)
        sink_cosine += tl.sum(q * tl.load(sums + step, mask=before, other=0.0)[None, :], 1)
        to_other += tl.sum(q * tl.load(sums + 2 * step, mask=before, other=0.0)[None, :], 1)
        other_cosine += tl.sum(q * tl.load(sums + 3 * step, mask=before, other=0.0)[None, :], 1)
    gap = to_sink / tl.maximum(sinks_seen, 1.0) - to_other / tl.maximum(others_seen, 1.0)
    sink_cosine = sink_cosine / tl.maximum(sinks_seen, 1.0)
    other_cosine = other_cosine / tl.maximum(others_seen, 1.0)

    near = counted & (sinks_seen > 0)
    far = counted & (others_seen > 0)
    both = near & far
    near = near & (q_norm > 0)  # a query of norm 0 has a gap, but no direction
    far = far & (q_norm > 0)
    result += ((prompt * tl.num_programs(1) + head) * chunks + chunk) * 10
    _store(result, 0, counted, q_norm)
    _store(result, 1, sink, k_norm)
    _store(result, 2, near, sink_cosine / tl.maximum(q_norm, 1e-30))
    _store(result, 3, far, other_cosine / tl.maximum(q_norm, 1e-30))
    _store(result, 4, both, gap * scale)


@triton.jit
@no_type_check
def _store(result, index: tl.constexpr, where, x):
    """The sum of some entries, and how many they are."""
    tl.store(result + index, tl.sum(tl.where(where, x, 0.0), 0))
    tl.store(result + 5 + index, tl.sum(where.to(tl.float32), 0))
