"""Flash attention for cases without a library kernel: softcaps, padding, float32 windows."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from sinkscope.attention.kernels.tiles import LN_2, load_block, log2_pattern, visible_keys


@triton.jit
@no_type_check
def forward_kernel(
    query,
    key,
    value,
    key_bias,
    result,
    lse,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    value_b,
    value_t,
    value_h,
    bias_b,
    n_queries,
    n_keys,
    offset,
    window,
    scale,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    V: tl.constexpr,
    V_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted values [query head d_value] and log-sum-exp of one block of queries.

    Zeros and -inf for a query without visible keys.
    """
    first_query = tl.program_id(0) * M
    head = tl.program_id(1)
    prompt = tl.program_id(2).to(tl.int64)
    queries = first_query + tl.arange(0, M)
    real = queries < n_queries
    values = tl.arange(0, V_BLOCK)

    query += prompt * query_b + head * query_h
    q = load_block(query, query_t, queries, n_queries, D, D_BLOCK)
    key += prompt * key_b + (head // GROUP) * key_h
    value += prompt * value_b + (head // GROUP) * value_h
    key_bias += prompt * bias_b

    low, high = visible_keys(first_query, n_keys, offset, window, M, N, CAUSAL, WINDOWED)

    zero = tl.zeros([M], dtype=tl.float32)
    mixed = tl.zeros([M, V_BLOCK], dtype=tl.float32)
    total = zero
    largest = zero - float("inf")
    for first in tl.range(low, high, N):
        keys = first + tl.arange(0, N)
        there = keys < n_keys
        k = load_block(key, key_t, keys, n_keys, D, D_BLOCK)
        logits = log2_pattern(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0, (queries + offset)[:, None],
            keys[None, :], window, scale, cap, CAUSAL, WINDOWED, CAPPED, True,
        )  # fmt: skip
        logits = tl.where(there[None, :], logits, float("-inf"))
        if BIASED:
            logits += tl.load(key_bias + keys, mask=there, other=float("-inf"))[None, :]
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # Before the first visible key the maximum is -inf, and -inf + inf would be nan.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        pattern = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(largest - base)
        v = load_block(value, value_t, keys, n_keys, V, V_BLOCK)
        total = total * shrink + tl.sum(pattern, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(pattern.to(v.dtype), v, mixed, input_precision=PRECISION)
        largest = new_largest

    total = tl.where(total == 0.0, 1.0, total)
    mixed = mixed / total[:, None]
    n_heads = tl.num_programs(1)
    row = (prompt * n_queries + queries) * n_heads + head
    tl.store(
        result + row[:, None] * V + values[None, :],
        mixed.to(result.dtype.element_ty),
        mask=real[:, None] & (values < V)[None, :],
    )
    sums = (largest + tl.log2(total)) * LN_2
    tl.store(lse + (prompt * n_heads + head) * n_queries + queries, sums, mask=real)
