"""Sums over columns of the attention pattern, and of both rows and columns, in one pass.

A program has a block of keys of one head and iterates over the queries that see it. With the
log-sum-exp known, a column sum takes one matrix product, one exp2 and one addition per entry, and
no running maximum or values.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from sinkscope.attention.kernels.tiles import LN_2, load_block, load_log2_sums, log2_pattern


@triton.jit
@no_type_check
def received_kernel(
    query,
    key,
    lse,
    chosen,
    weights,
    received,
    entropy,
    weighted,
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
    CHOSEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_i A_ij for one block of keys, and sums along rows, which are accumulated atomically.

    With ENTROPY these are −Σ_j A_ij ln A_ij, with WEIGHTED Σ_j A_ij w_j. With CHOSEN, only queries
    whose ``chosen`` is not 0 enter any sum. KEYS_FIRST, which sums along rows exclude, lays tiles
    out as [key query] instead of [query key], see `_walk`.
    """
    first_key = tl.program_id(0) * N
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    row = prompt * tl.num_programs(1) + head
    keys = first_key + tl.arange(0, N)
    key += prompt * key_b + (head // GROUP) * key_h
    k = load_block(key, key_t, keys, n_keys, D, D_BLOCK)

    query += prompt * query_b + head * query_h
    lse += row * n_queries
    chosen += prompt * n_queries
    entropy += row * n_queries
    weighted += row * n_queries
    if WEIGHTED:
        kv_row = prompt * (tl.num_programs(1) // GROUP) + head // GROUP
        w = tl.load(weights + kv_row * n_keys + keys, mask=keys < n_keys, other=0.0)
    else:
        w = 0.0

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
    if ENTROPY:  # exclude keys beyond the last from the row sums
        clear = tl.where(first_key + N > n_keys, high, clear)
    clear = tl.maximum(low, tl.minimum(clear, tl.cdiv(high, M) * M))

    if KEYS_FIRST:
        total = tl.zeros([N], dtype=tl.float32)
    else:
        total = tl.zeros([M, N], dtype=tl.float32)
    total = _walk(
        total, query, query_t, k, keys, lse, chosen, w, entropy, weighted, low, clear, n_queries,
        n_keys, offset, window, scale, cap,
        D, D_BLOCK, M, CAUSAL, WINDOWED, CAPPED, True, CHOSEN, ENTROPY, WEIGHTED,
        KEYS_FIRST, PRECISION,
    )  # fmt: skip
    total = _walk(
        total, query, query_t, k, keys, lse, chosen, w, entropy, weighted, clear, high, n_queries,
        n_keys, offset, window, scale, cap,
        D, D_BLOCK, M, CAUSAL, WINDOWED, CAPPED, False, CHOSEN, ENTROPY, WEIGHTED,
        KEYS_FIRST, PRECISION,
    )  # fmt: skip
    if not KEYS_FIRST:
        total = tl.sum(total, 0)
    tl.store(received + row * n_keys + keys, total, mask=keys < n_keys)


@triton.jit
@no_type_check
def _walk(
    total,
    query,
    query_t,
    k,
    keys,
    lse,
    chosen,
    w,
    entropy,
    weighted,
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
    CHOSEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the queries from low up to high to the total of each key.

    A reduction in every step should be along a tile's second axis, within the registers of a few
    threads. With row sums this axis is the keys, and column sums are kept as a tile until the end.
    With KEYS_FIRST it is the queries, which saves the registers of that tile.
    """
    for first in tl.range(low, high, M):
        queries = first + tl.arange(0, M)
        real = queries < n_queries
        q = load_block(query, query_t, queries, n_queries, D, D_BLOCK)
        sums = load_log2_sums(lse, queries, n_queries)
        if CHOSEN:
            counts = tl.load(chosen + queries, mask=real, other=0) != 0
            sums = tl.where(counts, sums, float("inf"))
        stands = queries + offset
        if KEYS_FIRST:
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            logs = log2_pattern(
                products, sums[None, :], stands[None, :], keys[:, None], window, scale, cap,
                CAUSAL, WINDOWED, CAPPED, MASKED,
            )  # fmt: skip
            total += tl.sum(tl.exp2(logs), 1)
        else:
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            logs = log2_pattern(
                products, sums[:, None], stands[:, None], keys[None, :], window, scale, cap,
                CAUSAL, WINDOWED, CAPPED, MASKED,
            )  # fmt: skip
            if ENTROPY:
                if MASKED:
                    logs = tl.where(keys[None, :] < n_keys, logs, float("-inf"))
                # exp2(-200) is 0 in float32, and 0 · (-200) is 0 where 0 · (-inf) would be nan.
                logs = tl.maximum(logs, -200.0)
            pattern = tl.exp2(logs)
            total += pattern
            if ENTROPY:
                rows = tl.sum(pattern * logs, 1) * -LN_2
                tl.atomic_add(entropy + queries, rows, mask=real, sem="relaxed")
            if WEIGHTED:
                rows = tl.sum(pattern * w[None, :], 1)
                tl.atomic_add(weighted + queries, rows, mask=real, sem="relaxed")
    return total
