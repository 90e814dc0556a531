"""What all kernels share: loading a block of vectors, the visible keys, log2 of the pattern."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def load_block(vectors, step, places, length, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """The vectors [place D_BLOCK] of a head at some positions; 0 beyond ``length`` and ``D``.

    ``vectors`` points to position 0, and ``step`` is the distance between positions.
    """
    dims = tl.arange(0, D_BLOCK)
    at = places.to(tl.int64)[:, None] * step + dims[None, :]
    return tl.load(vectors + at, mask=(places < length)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
@no_type_check
def visible_keys(
    first_query,
    n_keys,
    offset,
    window,
    M: tl.constexpr,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Range of the keys that any of M queries sees, from the start of a block of N keys."""
    low = 0
    high = n_keys
    if WINDOWED:
        low = tl.maximum(first_query + offset - window + 1, 0) // N * N
        high = tl.minimum(n_keys, first_query + M - 1 + offset + window)
    if CAUSAL:
        high = tl.minimum(high, first_query + M + offset)
    return low, high


@triton.jit
@no_type_check
def log2_pattern(
    products,
    log2_sums,
    stands,
    keys,
    window,
    scale,
    cap,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """log2 A_ij from the products q·k of some queries and keys; -inf where not visible.

    All tensors broadcast against each other, so that a kernel may have queries or keys first.
    ``scale`` converts products to logits in units of log 2. With CAPPED, ``cap`` is the softcap in
    the same units and ``scale`` converts products to 2/ln 2 times the argument of the tanh.
    """
    if CAPPED:
        logs = cap * (1.0 - 2.0 / (tl.exp2(products * scale) + 1.0)) - log2_sums
    else:
        logs = products * scale - log2_sums
    if MASKED:
        logs = tl.where(sees(stands, keys, window, CAUSAL, WINDOWED), logs, float("-inf"))
    return logs


@triton.jit
@no_type_check
def load_log2_sums(lse, queries, n_queries):
    """Log-sum-exps in units of log 2; +inf, so that A_ij = 0, for a query without visible keys."""
    sums = tl.load(lse + queries, mask=queries < n_queries, other=float("inf")) * LOG2_E
    return tl.where(sums == float("-inf"), float("inf"), sums)


@triton.jit
@no_type_check
def sees(stands, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether a query at a key index sees the key, by causality and window."""
    ahead = keys - stands
    seen = ahead <= 0 if CAUSAL else ahead == ahead
    if WINDOWED:
        seen = seen & (ahead > -window)
        if not CAUSAL:
            seen = seen & (ahead < window)
    return seen
