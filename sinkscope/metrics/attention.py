"""Attention statistics from patterns and scores, and the final steps shared by both paths.

Functions that take a ``pattern`` or ``scores`` are the quadratic definitions. Functions that take
rows (``[prompt head query]``) or column sums (``[prompt head key]``) complete the reductions of
either path: over a stored pattern, or in streaming attention, which does not store one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sinkscope.metrics.positions import (
    last_quarter,
    masked_mean,
    queries_after,
    uniform_received,
    visible,
    visible_queries,
)
from sinkscope.metrics.reductions import at_least_fp32
from sinkscope.metrics.values import per_query_head

EPSILONS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Thresholds of the sink-rate curve [probability]."""
RECENT = (4, 16, 64)
"""Widths w of the neighbourhood in the recency metric [tokens]."""

TOP = 3
"""Number of keys per head and prompt in `top_received`."""


def attention_to(
    pattern: Float[Tensor, "prompt head query key"], keys: Bool[Tensor, "prompt key"]
) -> Float[Tensor, "prompt head query"]:
    """Attention that each query pays to a set of keys, Σ_{j∈keys} A_ij [probability]."""
    return torch.where(keys[:, None, None, :], at_least_fp32(pattern), 0).sum(dim=-1)


def sink_attention(
    to_sinks: Float[Tensor, "prompt head query"],
    sinks: Bool[Tensor, "prompt query"],
    mask: Bool[Tensor, "prompt query"],
    causal: bool,
) -> Float[Tensor, "prompt head"]:
    """Mean attention paid to the sinks by the queries after them [probability].

    mean_i Σ_{s∈sinks} A_is over :func:`~sinkscope.metrics.positions.queries_after`. Queries whose
    window no longer includes the sink count as 0; :func:`importance` divides by the number of
    queries that see it instead.
    """
    return masked_mean(to_sinks, queries_after(sinks, mask, causal)[:, None, :], dim=-1)


def first_token_attention(
    to_first: Float[Tensor, "prompt head query"], mask: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head"]:
    """AWFT: mean over all real queries, the first included, of A_i0 [probability].

    Sandoval-Segura et al. 2504.03889; the "F-Attn" of gated attention, 2505.06708.
    """
    return masked_mean(to_first, mask[:, None, :], dim=-1)


def bucket_edges(length: int) -> list[int]:
    """Lower edges of the query-position buckets 1, 2-3, 4-7, … up to a length."""
    return [2**power for power in range(max(length - 1, 1).bit_length())]


def by_bucket(
    to_sinks: Float[Tensor, "prompt head query"],
    sinks: Bool[Tensor, "prompt query"],
    mask: Bool[Tensor, "prompt query"],
    edges: list[int],
    causal: bool = True,
) -> tuple[Float[Tensor, "prompt head bucket"], Int[Tensor, "prompt bucket"]]:
    """Mean sink attention and number of queries in each bucket of query positions.

    A bucket runs from its edge up to the next, the last one to the end. Only the queries after
    the sinks count; the mean of an empty bucket is nan. Query 0 is in no bucket.
    """
    queries = queries_after(sinks, mask, causal)
    index = torch.arange(mask.shape[1], device=mask.device)
    means, counts = [], []
    for low, high in pairwise([*edges, mask.shape[1]]):
        inside = queries & (index >= low) & (index < high)
        means.append(masked_mean(to_sinks, inside[:, None, :], dim=-1))
        counts.append(inside.sum(dim=-1))
    return torch.stack(means, dim=-1), torch.stack(counts, dim=-1)


def is_largest(
    pattern: Float[Tensor, "prompt head query key"], keys: Bool[Tensor, "prompt key"]
) -> Bool[Tensor, "prompt head query"]:
    """Whether a query pays its largest attention to one of some keys: argmax_j A_ij ∈ keys.

    A tie counts, and a query that sees no key has no largest. The mean over queries and heads, with
    the first token as the key, is the "%First-Attn" of Kaul et al. 2024 (2410.17174).
    """
    largest = pattern.amax(dim=-1)
    at_keys = torch.where(keys[:, None, None, :], pattern, 0).amax(dim=-1)
    return (at_keys >= largest) & (largest > 0)


def received_mass(
    pattern: Float[Tensor, "prompt head query key"], mask: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head key"]:
    """Total attention that each key receives, Σ_i A_ik over the real queries i [queries]."""
    return torch.where(mask[:, None, :, None], at_least_fp32(pattern), 0).sum(dim=2)


def importance(
    mass: Float[Tensor, "prompt head key"],
    mask: Bool[Tensor, "prompt key"],
    causal: bool,
    window: int | None = None,
) -> Float[Tensor, "prompt head key"]:
    """Gu's importance score α_k: mean of A_ik over the real queries i that can see key k.

    α_k = 1/(T-k+1) Σ_{i=k..T} A_ik, k from 1 (Gu et al. 2410.10781, §3.1), with the divisor
    generalised to windows, padding and bidirectional attention [probability]. nan for padding.
    """
    seen_by = visible_queries(mask, causal, window)
    score = at_least_fp32(mass) / seen_by[:, None, :]
    return torch.where(mask[:, None, :], score, torch.nan)


def top_received(
    importance: Float[Tensor, "prompt head key"],
    mask: Bool[Tensor, "prompt key"],
    causal: bool,
    count: int = TOP,
) -> tuple[Float[Tensor, "prompt head rank"], Float[Tensor, "prompt head rank"]]:
    """The keys that receive the most attention from each head, strongest first.

    These are the features of Binkowski et al. 2604.10697 ("SinkProbe"): the largest values of
    received attention, sorted. We use Gu's importance score. In a causal model the last quarter of
    a prompt is left out, because few queries see these keys (see `positions.last_quarter`): the
    score of the last key is the attention of a single query to itself.

    Args:
        importance: Importance score of every key; see `importance` [probability].
        mask: True at real positions.
        causal: Whether attention is causal.
        count: Number of keys to return for each head.

    Returns:
        Scores [prompt head rank] and positions [prompt head rank], both nan where a prompt has
        fewer eligible keys.
    """
    score, position = ranked(*strongest(importance, eligible_keys(mask, causal), count))
    return score, position


def eligible_keys(mask: Bool[Tensor, "prompt key"], causal: bool) -> Bool[Tensor, "prompt key"]:
    """The keys that :func:`top_received` ranks."""
    return mask & ~last_quarter(mask) if causal else mask


def strongest(
    score: Float[Tensor, "prompt head key"], eligible: Bool[Tensor, "prompt key"], count: int = TOP
) -> tuple[Float[Tensor, "prompt head rank"], Int[Tensor, "prompt head rank"]]:
    """The largest scores and their keys; -inf, and any key, if fewer keys are eligible."""
    score = torch.where(eligible[:, None, :], at_least_fp32(score), -torch.inf)
    if (keys := score.shape[-1]) >= count:
        return score.topk(count, dim=-1)
    padded = torch.nn.functional.pad(score, (0, count - keys), value=-torch.inf)
    value, index = padded.topk(count, dim=-1)
    return value, index.clamp(max=keys - 1)


def ranked(
    score: Float[Tensor, "*shape"], *others: Shaped[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], ...]:
    """The scores of :func:`strongest`, and what belongs to them, with nan in place of -inf."""
    there = score > -torch.inf
    return tuple(torch.where(there, x.to(score.dtype), torch.nan) for x in (score, *others))


def uniform_ratio(
    importance: Float[Tensor, "prompt head key"],
    mask: Bool[Tensor, "prompt key"],
    causal: bool,
    window: int | None = None,
) -> Float[Tensor, "prompt head key"]:
    """Importance of each key over its importance under uniform attention [ratio]."""
    return importance / uniform_received(mask, causal, window)[:, None, :]


def count_above(
    importance: Float[Tensor, "*heads key"], epsilons: Float[Tensor, "epsilon"]
) -> Float[Tensor, "epsilon key"]:
    """For each key, the number of leading entries (prompt, head, …) that exceed each ε.

    Sums over prompts and layers, so a sink rate can be accumulated layer by layer: divide the
    total by (prompts that reach the key) × layers × heads. Padding is nan and is not counted.
    """
    flat = importance.flatten(end_dim=-2)
    return torch.stack([(flat > epsilon).sum(dim=0) for epsilon in epsilons]).float()


def sink_rate(
    importance: Float[Tensor, "prompt layer head key"],
    mask: Bool[Tensor, "prompt key"],
    epsilon: float = 0.3,
) -> Float[Tensor, "key"]:
    """Gu's Sink_k^ε: share of (prompt, layer, head) whose importance at key k exceeds ε [share].

    1/L Σ_l 1/H Σ_h 1[α_k > ε], thresholded in each prompt before averaging, as in the authors'
    code (Gu et al. 2410.10781, ε = 0.3, T = 64). Positions beyond every prompt are nan.
    """
    return masked_mean((importance > epsilon).float(), mask[:, None, None, :], dim=(0, 1, 2))


def row_entropy(
    pattern: Float[Tensor, "prompt head query key"],
) -> Float[Tensor, "prompt head query"]:
    """Entropy of each query's attention, -Σ_j A_ij ln A_ij [nat], with 0 ln 0 = 0.

    Rows are not renormalised: with a learned sink they sum to less than 1, and the sink's share is
    left out. (From a log-sum-exp that includes it: lse_i Σ_j A_ij - Σ_j A_ij s_ij.)
    """
    return torch.special.entr(at_least_fp32(pattern)).sum(dim=-1)


def attention_entropy(
    rows: Float[Tensor, "prompt head query"], mask: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head"]:
    """AEQD: row entropy averaged over all real queries, the first included [nat]."""
    return masked_mean(rows, mask[:, None, :], dim=-1)


def logit_gap_rows(
    scores: Float[Tensor, "prompt head query key"],
    sinks: Bool[Tensor, "prompt key"],
    mask: Bool[Tensor, "prompt key"],
    causal: bool,
    window: int | None = None,
) -> tuple[Float[Tensor, "prompt head query"], Bool[Tensor, "prompt head query"]]:
    """Sink logit of each query minus the mean of its other logits [logit], and where it is valid.

    Δ_i = mean_{s∈S_i} s_is - mean_{j∈O_i} s_ij, where S_i are the sinks visible to query i and O_i
    its other visible keys except i itself. With the single sink 0 under a causal mask this is
    s_i0 - mean_{1≤j<i} s_ij (Guo et al. 2410.13835). Valid for queries after the sink if neither
    set is empty; nan elsewhere. Masked scores may have any value; scores masked by an intervention
    (the dtype's minimum, or -inf) are excluded as well.
    """
    seen = visible(mask, causal, window)[:, None] & (scores > torch.finfo(scores.dtype).min / 2)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    at_sinks = sinks[:, None, None, :]
    to_sinks, to_others = seen & at_sinks, seen & ~at_sinks & ~itself
    after = queries_after(sinks, mask, causal)[:, None]
    valid = after & to_sinks.any(dim=-1) & to_others.any(dim=-1)
    scores = at_least_fp32(scores)
    gap = masked_mean(scores, to_sinks, dim=-1) - masked_mean(scores, to_others, dim=-1)
    return torch.where(valid, gap, torch.nan), valid


def sink_logit_gap(
    gap: Float[Tensor, "prompt head query"], valid: Bool[Tensor, "prompt #head query"]
) -> Float[Tensor, "prompt head"]:
    """Δlogit: the gap of :func:`logit_gap_rows` averaged over the valid queries [logit]."""
    return masked_mean(gap, valid, dim=-1)


def nearby_attention(
    pattern: Float[Tensor, "prompt head query key"], widths: Sequence[int]
) -> Float[Tensor, "prompt head query span"]:
    """Attention that each query pays to its neighbourhood, Σ A_ij over a span [probability].

    The spans are |i - j| < w for each width w (the query's own key included), then 0 < |i - j| ≤ w
    (excluded). Under a causal mask these are the last w keys, and the w keys before the query's.
    """
    index = torch.arange(pattern.shape[-1], device=pattern.device)
    distance = (index[:, None] - index[None, :]).abs()
    pattern = at_least_fp32(pattern)
    return torch.stack(
        [torch.where(span, pattern, 0).sum(dim=-1) for span in spans(distance, widths)], dim=-1
    )


def spans(distance: Int[Tensor, "..."], widths: Sequence[int]) -> list[Bool[Tensor, "..."]]:
    """Masks of the query-key distances in each span of :func:`nearby_attention`."""
    including = [distance < width for width in widths]
    return including + [(distance > 0) & (distance <= width) for width in widths]


def learned_sink_mass(
    pattern: Float[Tensor, "prompt head query key"], mask: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head"]:
    """Attention to a learned sink logit: mean over real queries of 1 - Σ_j A_ij [probability].

    gpt-oss appends a logit per head to each row before the softmax and drops it afterwards, so
    the remaining row sums to less than 1. Values below 0 from rounding are clamped.
    """
    missing = (1 - at_least_fp32(pattern).sum(dim=-1)).clamp(min=0)
    return masked_mean(missing, mask[:, None, :], dim=-1)


def share_paid_to_sinks(
    part: Float[Tensor, "prompt head query"],
    whole: Float[Tensor, "prompt head query"],
    sinks: Bool[Tensor, "prompt query"],
    mask: Bool[Tensor, "prompt query"],
    causal: bool,
) -> Float[Tensor, "prompt head"]:
    """Mean of part / whole over the queries after the sinks [share]; zero wholes are left out."""
    return mean_share(part, whole, queries_after(sinks, mask, causal))


def mean_share(
    part: Float[Tensor, "prompt head query"],
    whole: Float[Tensor, "prompt head query"],
    queries: Bool[Tensor, "prompt query"],
) -> Float[Tensor, "prompt head"]:
    """Mean of part / whole over the given queries [share]; zero wholes are left out."""
    return masked_mean(at_least_fp32(part) / whole, queries[:, None, :] & (whole > 0), dim=-1)


def value_weighted_share(
    pattern: Float[Tensor, "prompt head query key"],
    value_norm: Float[Tensor, "prompt kv_head key"],
    sinks: Bool[Tensor, "prompt key"],
    mask: Bool[Tensor, "prompt key"],
    causal: bool,
) -> Float[Tensor, "prompt head"]:
    """Share of the sinks in attention weighted by value norms [share].

    mean_i Σ_{j∈sinks} A_ij ‖v_j‖ / Σ_j A_ij ‖v_j‖ over the queries after the sinks. It can be
    close to 0 even if the sink attention is 0.9.
    """
    sizes = per_query_head(torch.where(mask[:, None, :], value_norm, 0), pattern.shape[1])
    weighted = at_least_fp32(pattern) * sizes[:, :, None, :]
    part = attention_to(weighted, sinks)
    return share_paid_to_sinks(part, weighted.sum(dim=-1), sinks, mask, causal)


def renormalised_similarity(
    similarity: Float[Tensor, "prompt head query key"],
    seen: Bool[Tensor, "prompt query key"],
) -> Float[Tensor, "prompt head query key"]:
    """Normalised weights for attention whose rows are not distributions: |sim_ij| / Σ_j |sim_ij|.

    For sigmoid, ReLU, linear and other attention without softmax (Gu et al. 2410.10781, the starred
    rows of their table of attention operations). ``seen`` is
    :func:`~sinkscope.metrics.positions.visible`. Rows of zeros remain zero.
    """
    size = torch.where(seen[:, None], at_least_fp32(similarity).abs(), 0)
    total = size.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, size / total, 0)
