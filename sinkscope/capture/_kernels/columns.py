"""Sums over columns of the attention pattern, and of both rows and columns, in one pass.

A program holds a block of keys of one head and walks over the queries that see it. Once the
log-sum-exp is known, a column sum is one matrix product, one exp2 and one addition an entry: no
running maximum, no values. `flex_attention` with swapped roles does the same with both, and is
what `tests/gpu` compares it with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinkscope.capture._kernels.tiles import log2_pattern


@triton.jit
def received_kernel(
    query,
    key,
    log2_sum,
    received,
    entropy,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
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
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_i A_ij for one block of keys; with ENTROPY also −Σ_j A_ij log2 A_ij, added up atomically.

    ``log2_sum`` is the log-sum-exp in units of log 2; +inf takes a query out of all sums.
    """
    first_key = tl.program_id(0) * N
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    rows = prompt * tl.num_programs(1) + head
    keys = first_key + tl.arange(0, N)
    dims = tl.arange(0, D_BLOCK)

    key += prompt * key_b + (head // GROUP) * key_h
    at = keys.to(tl.int64)[:, None] * key_t + dims[None, :]
    inside = (keys < n_keys)[:, None] & (dims < D)[None, :]
    k = tl.load(key + at, mask=inside, other=0.0)

    query += prompt * query_b + head * query_h
    log2_sum += rows * n_queries
    entropy += rows * n_queries

    low = 0
    high = n_queries
    clear = 0
    if CAUSAL:
        low = tl.maximum(first_key - offset, 0) // M * M
        clear = tl.cdiv(tl.maximum(first_key + N - 1 - offset, 0), M) * M
    elif WINDOWED:
        low = tl.maximum(first_key - offset - window + 1, 0) // M * M
    if WINDOWED:
        high = tl.minimum(n_queries, first_key + N - 1 + window - offset)
        clear = high
    if ENTROPY:  # keys beyond the last would enter the rows' sums
        clear = tl.where(first_key + N > n_keys, high, clear)
    clear = tl.maximum(low, tl.minimum(clear, tl.cdiv(high, M) * M))

    total = tl.zeros([M, N], dtype=tl.float32)
    total = _walk(
        total, query, query_t, k, keys, log2_sum, entropy, low, clear, n_queries, n_keys, offset, window,
        scale, cap, D, D_BLOCK, M, CAUSAL, WINDOWED, CAPPED, True, ENTROPY, PRECISION,
    )  # fmt: skip
    total = _walk(
        total, query, query_t, k, keys, log2_sum, entropy, clear, high, n_queries, n_keys, offset, window,
        scale, cap, D, D_BLOCK, M, CAUSAL, WINDOWED, CAPPED, False, ENTROPY, PRECISION,
    )  # fmt: skip
    tl.store(received + rows * n_keys + keys, tl.sum(total, 0), mask=keys < n_keys)


@triton.jit
def _walk(
    total,
    query,
    query_t,
    k,
    keys,
    log2_sum,
    entropy,
    low,
    high,
    n_queries,
    n_keys,
    offset,
    window,
    scale,
    cap,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the queries from low up to high to the total of each key."""
    dims = tl.arange(0, D_BLOCK)
    for first in tl.range(low, high, M):
        queries = first + tl.arange(0, M)
        real = queries < n_queries
        at = queries.to(tl.int64)[:, None] * query_t + dims[None, :]
        q = tl.load(query + at, mask=real[:, None] & (dims < D)[None, :], other=0.0)
        sums = tl.load(log2_sum + queries, mask=real, other=float("inf"))
        logs = log2_pattern(
            q, k, sums, queries + offset, keys, window, scale, cap,
            CAUSAL, WINDOWED, CAPPED, MASKED, PRECISION,
        )  # fmt: skip
        if ENTROPY:
            if MASKED:
                logs = tl.where(keys[None, :] < n_keys, logs, float("-inf"))
            # exp2(-200) is 0 in float32, and 0 · (-200) is 0 where 0 · (-inf) would be nan.
            logs = tl.maximum(logs, -200.0)
        pattern = tl.exp2(logs)
        total += pattern
        if ENTROPY:
            tl.atomic_add(entropy + queries, -tl.sum(pattern * logs, 1), mask=real, sem="relaxed")
    return total
