"""A tile of the pattern's logarithm: what every kernel here starts from."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log2_pattern(
    q,
    k,
    log2_sum,
    stands,
    keys,
    window,
    scale,
    cap,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2 A_ij [query key] for a block of queries and a block of keys; -inf where not visible.

    ``scale`` takes dot products to logits in units of log 2. With CAPPED, ``cap`` is the softcap
    in the same units and ``scale`` takes dot products to 2/ln 2 times what goes into the tanh.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAPPED:
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * scale) + 1.0)) - log2_sum[:, None]
    else:
        logits = logits * scale - log2_sum[:, None]
    if MASKED:
        logits = tl.where(
            sees(stands[:, None], keys[None, :], window, CAUSAL, WINDOWED), logits, float("-inf")
        )
    return logits


@triton.jit
def sees(stands, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether the query that stands at a key index has the key within its reach."""
    ahead = keys - stands
    seen = ahead <= 0 if CAUSAL else ahead == ahead
    if WINDOWED:
        seen = seen & (ahead > -window)
        if not CAUSAL:
            seen = seen & (ahead < window)
    return seen
