"""Sums along rows of the attention pattern."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from sinkscope.attention.kernels.tiles import (
    LN_2,
    load_block,
    load_log2_sums,
    log2_pattern,
    visible_keys,
)


@triton.jit
@no_type_check
def row_kernel(
    query,
    key,
    lse,
    key_bias,
    result,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    bias_b,
    bias_h,
    n_queries,
    n_keys,
    offset,
    window,
    scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For one block of queries Σ_j A_ij 2^bias_j, or with ENTROPY −Σ_j A_ij ln A_ij."""
    first_query = tl.program_id(0) * M
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    rows = prompt * tl.num_programs(1) + head
    queries = first_query + tl.arange(0, M)
    real = queries < n_queries

    query += prompt * query_b + head * query_h
    q = load_block(query, query_t, queries, n_queries, D, D_BLOCK)
    sums = load_log2_sums(lse + rows * n_queries, queries, n_queries)
    key += prompt * key_b + (head // GROUP) * key_h
    key_bias += prompt * bias_b + (head // GROUP) * bias_h

    low, high = visible_keys(first_query, n_keys, offset, window, M, N, CAUSAL, WINDOWED)
    # Keys before `clear` are visible to every query of the block.
    clear = tl.minimum(first_query + offset + 1, n_keys) // N * N if CAUSAL else n_keys // N * N
    if WINDOWED:
        clear = low
    clear = tl.maximum(low, tl.minimum(clear, high))

    total = tl.zeros([M], dtype=tl.float32)
    total = _along(
        total, q, key, key_t, key_bias, queries + offset, sums, low, clear, n_keys, window,
        scale, cap, D, D_BLOCK, N, CAUSAL, WINDOWED, CAPPED, False, BIASED, ENTROPY, PRECISION,
    )  # fmt: skip
    total = _along(
        total, q, key, key_t, key_bias, queries + offset, sums, clear, high, n_keys, window,
        scale, cap, D, D_BLOCK, N, CAUSAL, WINDOWED, CAPPED, True, BIASED, ENTROPY, PRECISION,
    )  # fmt: skip
    tl.store(result + rows * n_queries + queries, total, mask=real)


@triton.jit
@no_type_check
def _along(
    total,
    q,
    key,
    key_t,
    key_bias,
    stands,
    sums,
    low,
    high,
    n_keys,
    window,
    scale,
    cap,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys from low up to high to the total of each query."""
    for first in tl.range(low, high, N):
        keys = first + tl.arange(0, N)
        real = keys < n_keys
        k = load_block(key, key_t, keys, n_keys, D, D_BLOCK)
        logs = log2_pattern(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), sums[:, None], stands[:, None],
            keys[None, :], window, scale, cap, CAUSAL, WINDOWED, CAPPED, MASKED,
        )  # fmt: skip
        if MASKED:
            logs = tl.where(real[None, :], logs, float("-inf"))
        if BIASED:
            logs += tl.load(key_bias + keys, mask=real, other=float("-inf"))[None, :]
        if ENTROPY:
            logs = tl.maximum(logs, -200.0)  # see columns.py
            total -= tl.sum(tl.exp2(logs) * logs, 1) * LN_2
        else:
            total += tl.sum(tl.exp2(logs), 1)
    return total


@triton.jit
@no_type_check
def nearby_kernel(
    query,
    key,
    lse,
    key_bias,
    including,
    excluding,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    bias_b,
    n_queries,
    n_keys,
    width,
    offset,
    window,
    scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For one block of queries Σ_j A_ij over |i − j| < width, and over 0 < |i − j| ≤ width."""
    first_query = tl.program_id(0) * M
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    rows = prompt * tl.num_programs(1) + head
    queries = first_query + tl.arange(0, M)
    real = queries < n_queries

    query += prompt * query_b + head * query_h
    q = load_block(query, query_t, queries, n_queries, D, D_BLOCK)
    sums = load_log2_sums(lse + rows * n_queries, queries, n_queries)
    key += prompt * key_b + (head // GROUP) * key_h
    key_bias += prompt * bias_b
    stands = queries + offset

    low = tl.maximum(first_query + offset - width, 0) // N * N
    high = first_query + M + offset
    if not CAUSAL:
        high += width
    high = tl.minimum(high, n_keys)
    with_own = tl.zeros([M], dtype=tl.float32)
    without = tl.zeros([M], dtype=tl.float32)
    for first in tl.range(low, high, N):
        keys = first + tl.arange(0, N)
        there = keys < n_keys
        k = load_block(key, key_t, keys, n_keys, D, D_BLOCK)
        logs = log2_pattern(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), sums[:, None], stands[:, None],
            keys[None, :], window, scale, cap, CAUSAL, WINDOWED, CAPPED, True,
        )  # fmt: skip
        if BIASED:
            logs += tl.load(key_bias + keys, mask=there, other=float("-inf"))[None, :]
        pattern = tl.where(there[None, :], tl.exp2(logs), 0.0)
        distance = tl.abs(stands[:, None] - keys[None, :])
        with_own += tl.sum(tl.where(distance < width, pattern, 0.0), 1)
        without += tl.sum(tl.where((distance > 0) & (distance <= width), pattern, 0.0), 1)
    tl.store(including + rows * n_queries + queries, with_own, mask=real)
    tl.store(excluding + rows * n_queries + queries, without, mask=real)


@triton.jit
@no_type_check
def chosen_kernel(
    query,
    key,
    lse,
    key_bias,
    index,
    number,
    result,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    bias_b,
    index_b,
    n_queries,
    offset,
    window,
    scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Σ_j A_ij for one block of queries over the keys whose indices are listed for the prompt."""
    queries = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    rows = prompt * tl.num_programs(1) + head
    real = queries < n_queries
    dims = tl.arange(0, D_BLOCK)
    query += prompt * query_b + head * query_h
    q = load_block(query, query_t, queries, n_queries, D, D_BLOCK).to(tl.float32)
    sums = load_log2_sums(lse + rows * n_queries, queries, n_queries)
    key += prompt * key_b + (head // GROUP) * key_h

    total = tl.zeros([M], dtype=tl.float32)
    for place in range(0, tl.load(number + prompt)):
        chosen = tl.load(index + prompt * index_b + place)
        k = tl.load(key + chosen * key_t + dims, mask=dims < D, other=0.0).to(tl.float32)
        logs = log2_pattern(
            tl.sum(q * k[None, :], 1), sums, queries + offset, chosen, window, scale, cap,
            CAUSAL, WINDOWED, CAPPED, True,
        )  # fmt: skip
        if BIASED:
            logs += tl.load(key_bias + prompt * bias_b + chosen)
        total += tl.exp2(logs)
    tl.store(result + rows * n_queries + queries, total, mask=real)
