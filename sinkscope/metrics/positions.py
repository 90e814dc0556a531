"""Visibility of keys, sink positions, and received attention under uniform attention.

All functions except :func:`visible` are O(position) and build no query × key table.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics.reductions import at_least_fp32, sliding_sum, vector_norm


def masked_mean(
    x: Float[Tensor, "*shape"], where: Bool[Tensor, "*#shape"], dim: int | tuple[int, ...]
) -> Float[Tensor, "..."]:
    """Mean of ``x`` over ``dim``, counting only the entries where ``where`` holds.

    Other entries may have any value, nan included. Accumulated in at least fp32; a mean over no
    entries is nan.
    """
    kept = torch.where(where, at_least_fp32(x), 0)
    return kept.sum(dim=dim) / where.expand_as(x).sum(dim=dim)


def reach(causal: bool, window: int | None) -> tuple[int | None, int | None]:
    """Number of positions before and after itself that a query sees; None = all.

    Causal: keys ``i - window < j <= i``. Bidirectional: keys ``|i - j| < window``. Both follow
    Hugging Face's masks for the ``sliding_window`` that its attention functions receive (for
    ModernBERT that number is ``config.sliding_window + 1``).
    """
    before = None if window is None else window - 1
    return before, 0 if causal else before


def visible(
    mask: Bool[Tensor, "prompt position"], causal: bool, window: int | None = None
) -> Bool[Tensor, "prompt position position"]:
    """Whether query i (first position dim) sees key j (second): both real, j within i's reach.

    Quadratic in length: for definitions and oracles only.
    """
    index = torch.arange(mask.shape[1], device=mask.device)
    distance = index[:, None] - index[None, :]
    seen = mask[:, :, None] & mask[:, None, :]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    return seen


def visible_keys(
    mask: Bool[Tensor, "prompt query"], causal: bool, window: int | None = None
) -> Float[Tensor, "prompt query"]:
    """Number of real keys that each query sees, itself included; 0 for a query that is padding."""
    before, after = reach(causal, window)
    real = mask.float()
    return real * sliding_sum(real, before, after)


def visible_queries(
    mask: Bool[Tensor, "prompt key"], causal: bool, window: int | None = None
) -> Float[Tensor, "prompt key"]:
    """Number of real queries that see each key, itself included; 0 for a key that is padding."""
    before, after = reach(causal, window)
    real = mask.float()
    return real * sliding_sum(real, after, before)


def uniform_received(
    mask: Bool[Tensor, "prompt key"], causal: bool, window: int | None = None
) -> Float[Tensor, "prompt key"]:
    """Received attention of each key if every query attends uniformly to its visible keys.

    u_k = mean over the queries i that see k of 1 / (number of keys i sees) [probability]. Without
    a window or padding, causal attention gives u_k = (H_T - H_k) / (T - k), H the harmonic
    numbers, k from 0; bidirectional attention gives 1 / T. nan for padding.
    """
    before, after = reach(causal, window)
    share = torch.where(mask, 1 / visible_keys(mask, causal, window), 0)
    seen_by = visible_queries(mask, causal, window)
    return torch.where(mask, sliding_sum(share, after, before) / seen_by, torch.nan)


def first_true(sinks: Bool[Tensor, "prompt position"]) -> Int[Tensor, "prompt"]:
    """Index of the first True of each prompt; the length T if there is none."""
    length = sinks.shape[1]
    index = torch.arange(length, device=sinks.device)
    return torch.where(sinks, index, length).amin(dim=1)


def queries_after(
    sinks: Bool[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], causal: bool
) -> Bool[Tensor, "prompt position"]:
    """The queries over which sink attention is averaged: real positions that are not sinks.

    Under a causal mask they must also come after the first sink, since earlier queries cannot
    see it. With bidirectional attention every real non-sink query counts. A prompt without sinks
    has no such query.
    """
    queries = mask & ~sinks & sinks.any(dim=1, keepdim=True)
    if causal:
        index = torch.arange(sinks.shape[1], device=sinks.device)
        queries = queries & (index > first_true(sinks)[:, None])
    return queries


def queries_beyond(
    width: int,
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None = None,
) -> Bool[Tensor, "prompt position"]:
    """The queries for which near keys, sinks and the remaining keys are disjoint.

    These are the queries of :func:`queries_after` with no sink within ``width`` and at least one
    visible real key beyond ``width``. The first few queries see only near keys, and queries close
    to a sink would count it twice. Empty if a sliding window covers only near keys.
    """
    near = width + 1 if window is None else min(width + 1, window)
    further = visible_keys(mask, causal, window) > visible_keys(mask, causal, near)
    ahead = 0 if causal else width
    beside_sink = sliding_sum(sinks.float(), width, ahead) > 0
    return queries_after(sinks, mask, causal) & ~beside_sink & further


def uniform_nearby(
    width: int,
    itself: bool,
    mask: Bool[Tensor, "prompt query"],
    causal: bool,
    window: int | None = None,
) -> Float[Tensor, "prompt query"]:
    """Uniform attention of each query to the keys near it [probability].

    |N_i| / |V_i|, V_i the visible keys and N_i those of them with |i - j| < ``width``, or
    0 < |i - j| ≤ ``width`` without ``itself``. nan for padding.
    """
    near = width if itself else width + 1
    near = near if window is None else min(near, window)
    count = visible_keys(mask, causal, near) - (0 if itself else 1)
    return torch.where(mask, count / visible_keys(mask, causal, window), torch.nan)


def last_quarter(mask: Bool[Tensor, "prompt position"]) -> Bool[Tensor, "prompt position"]:
    """The last quarter of every prompt's real positions, whose keys few causal queries see.

    Of n real positions these are the last ⌊n/4⌋, without padding. Received attention of these keys
    is a mean over few queries and dominated by their own.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    return mask & (mask.cumsum(dim=1) > lengths - lengths // 4)


def find_sinks(
    received: Float[Tensor, "prompt layer head position"],
    mask: Bool[Tensor, "prompt position"],
    epsilon: float = 0.3,
    share: float = 0.1,
    *,
    causal: bool = True,
    window: int | None = None,
    over_uniform: float = 2.0,
    min_queries: int = 16,
) -> Bool[Tensor, "prompt position"]:
    """Sink positions anywhere in the prompt, from Gu's importance score of every head.

    Operational definition: a position is a sink if, in at least ``share`` of all (layer, head), its
    received attention [probability] exceeds both ``epsilon`` (the threshold of Gu et al.) and
    ``over_uniform`` times its value under uniform attention. The second bound matters only for
    short prompts: at T = 9 position 0 receives more than 0.3 under uniform causal attention.

    Under a causal mask few queries see the last keys. A head in which each query attends to itself
    or its neighbour gives every key a total attention of about 1, hence 1 / n over n queries, which
    exceeds any ε near the end. Therefore a key counts only if at least ``min_queries`` queries see
    it, or half of the prompt's real positions if that is fewer.

    Args:
        received: importance α_k, from :func:`sinkscope.metrics.attention.importance`.
        mask: real positions.
        epsilon: lower bound on α_k [probability].
        share: share of (layer, head) in which it must be exceeded, in (0, 1].
        causal: whether queries see only themselves and earlier keys.
        window: the widest window among the layers (None if any layer has full attention).
        over_uniform: lower bound on α_k over its value under uniform attention [ratio].
        min_queries: number of queries that must see a key for it to count.
    """
    length = mask.sum(dim=1, keepdim=True)
    enough = visible_queries(mask, causal, window) >= (length / 2).ceil().clamp(max=min_queries)
    strong = _exceeds(received, mask, epsilon, causal, window, over_uniform)
    return mask & enough & (strong.float().mean(dim=(1, 2)) >= share)


def primary_and_secondary(
    received: Float[Tensor, "prompt layer head position"],
    mask: Bool[Tensor, "prompt position"],
    epsilon: float = 0.3,
    share: float = 0.1,
    *,
    causal: bool = True,
    window: int | None = None,
    over_uniform: float = 2.0,
) -> tuple[Bool[Tensor, "prompt position"], Bool[Tensor, "prompt layer position"]]:
    """Divide the sinks of `find_sinks` into each prompt's primary sink and the others by layer.

    The **primary** sink of a prompt is the one that exceeds the bounds in the most (layer, head);
    ties are broken by received attention. All others are **secondary**: they are sinks in some
    layers only, namely those in which at least ``share`` of the layer's heads exceed the bounds.
    The two kinds are never averaged, as secondary sinks have different residual norms and values
    (arXiv 2512.22213).

    Args:
        received: importance α_k, from :func:`sinkscope.metrics.attention.importance`.
        mask: real positions.
        epsilon: see `find_sinks` [probability].
        share: of all (layer, head) for a sink, and of a layer's heads for a sink in that layer.
        causal: whether queries see only themselves and earlier keys.
        window: the widest window among the layers (None if any layer has full attention).
        over_uniform: see `find_sinks` [ratio].

    Returns:
        Mask of the primary sink of each prompt, all False in a prompt without a sink; and mask of
        the secondary sinks in each layer.
    """
    how = dict(causal=causal, window=window, over_uniform=over_uniform)
    sinks = find_sinks(received, mask, epsilon, share, **how)
    strong = _exceeds(received, mask, epsilon, causal, window, over_uniform)
    heads = strong.double().mean(dim=(1, 2))
    rank = torch.where(sinks, heads + 1e-6 * received.nan_to_num().double().mean(dim=(1, 2)), -1)
    primary = torch.zeros_like(mask).scatter(1, rank.argmax(dim=1, keepdim=True), True) & sinks
    in_layer = strong.float().mean(dim=2) >= share
    return primary, in_layer & (sinks & ~primary)[:, None]


def _exceeds(
    received: Float[Tensor, "prompt layer head position"],
    mask: Bool[Tensor, "prompt position"],
    epsilon: float,
    causal: bool,
    window: int | None,
    over_uniform: float,
) -> Bool[Tensor, "prompt layer head position"]:
    """Where received attention exceeds ε and the given multiple of uniform attention."""
    uniform = uniform_received(mask, causal, window)[:, None, None, :]
    return (received > epsilon) & (received > over_uniform * uniform)


def position_embedding_norm(weight: Float[Tensor, "context dim"]) -> Float[Tensor, "context"]:
    """‖p_t‖ of every learned position embedding [activation] (Yan et al. 2407.01601, Fig. 2)."""
    return vector_norm(weight)
