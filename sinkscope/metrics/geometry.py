"""Logits and angles between queries and keys, without a score matrix.

If a score is just scale · q_i·k_j, its mean over a set of keys is the product of q_i with the mean
of these keys, and the mean over all visible keys is a sliding sum: O(T · d_head) instead of the
O(T²) of the definition in :mod:`sinkscope.metrics.attention`. This does not hold with a softcap,
ALiBi or another position bias, where the logits of this module are not the model's.

Queries and keys are those of the dot product, after rotary embedding and QK norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from sinkscope.metrics.positions import masked_mean, queries_after, reach
from sinkscope.metrics.reductions import at_least_fp32, position_chunks, sliding_sum
from sinkscope.metrics.values import norms, per_query_head


class SinkLogit(NamedTuple):
    """Factors of the sink logit ‖q‖ ‖k‖ cos(q, k)."""

    query_norm: Float[Tensor, "prompt head"]
    """Mean ‖q_i‖ over the queries after the sinks [activation]."""
    key_norm: Float[Tensor, "prompt head"]
    """Mean ‖k_s‖ over the sinks, for the KV head of each query head [activation]."""
    cosine: Float[Tensor, "prompt head"]
    """Mean over those queries of cos(q_i, k_s), averaged over the sinks visible to i."""
    other_cosine: Float[Tensor, "prompt head"]
    """The same over the other visible keys except i itself."""


def sink_logit_decomposition(
    q: Float[Tensor, "prompt position head d_head"],
    k: Float[Tensor, "prompt position kv_head d_head"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None = None,
) -> SinkLogit:
    """Norms and cosines behind the sink logit (Gu et al. 2410.10781, Fig. 2).

    In LLaMA3-8B the sink is due to the angle, not the norms: the first key's norm is several times
    smaller than the others'. Each cosine is averaged over the queries after the sinks that see
    such a key by causality, window and padding; keys masked by an intervention are included.
    Computed as mean_j cos(q_i, k_j) = q̂_i · mean_j k̂_j, without forming pairs.
    """
    queries = queries_after(sinks, mask, causal)
    sees_sink, sees_other = _sees(sinks, mask, causal, window)
    query_norm, unit = norms(q), normalize(at_least_fp32(k), dim=-1)
    to_sinks = products(q, mean_key(unit, sinks & mask, causal, window)) / query_norm
    others = mean_key(unit, mask & ~sinks, causal, window, itself=False)
    to_others = products(q, others) / query_norm
    key_norm = masked_mean(norms(k), (sinks & mask)[:, None, :], dim=-1)
    points = query_norm > 0  # no direction at norm 0
    return SinkLogit(
        query_norm=masked_mean(query_norm, queries[:, None, :], dim=-1),
        key_norm=per_query_head(key_norm, q.shape[2]),
        cosine=masked_mean(to_sinks, points & (queries & sees_sink)[:, None, :], dim=-1),
        other_cosine=masked_mean(to_others, points & (queries & sees_other)[:, None, :], dim=-1),
    )


def other_logit_mean(
    q: Float[Tensor, "prompt position head d_head"],
    k: Float[Tensor, "prompt position kv_head d_head"],
    scale: float,
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None = None,
) -> Float[Tensor, "prompt head position"]:
    """Mean of scale · q_i·k_j over the visible keys j except sinks and i itself [logit].

    nan where there is no such key. See the module for the models in which these are the logits.
    """
    return scale * products(q, mean_key(k, mask & ~sinks, causal, window, itself=False))


def logit_gap_rows(
    q: Float[Tensor, "prompt position head d_head"],
    k: Float[Tensor, "prompt position kv_head d_head"],
    scale: float,
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None = None,
) -> tuple[Float[Tensor, "prompt head position"], Bool[Tensor, "prompt 1 position"]]:
    """The gap of :func:`sinkscope.metrics.attention.logit_gap_rows`, linear in length [logit].

    Δ_i = scale · q_i · (mean sink key - mean other key). See the module for when this holds.
    """
    sees_sink, sees_other = _sees(sinks, mask, causal, window)
    valid = (queries_after(sinks, mask, causal) & sees_sink & sees_other)[:, None, :]
    difference = mean_key(k, sinks & mask, causal, window)
    difference = difference - mean_key(k, mask & ~sinks, causal, window, itself=False)
    return torch.where(valid, scale * products(q, difference), torch.nan), valid


def mean_key(
    k: Float[Tensor, "prompt position kv_head d_head"],
    keys: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None = None,
    *,
    itself: bool = True,
) -> Float[Tensor, "prompt position kv_head d_head"]:
    """For each query position, the mean of its visible ``keys``; nan where there are none.

    Args:
        k: key vectors.
        keys: mask of the keys to average over.
        causal: whether queries see only themselves and earlier keys.
        window: the layer's window.
        itself: whether to include a position's own key.
    """
    before, after = reach(causal, window)
    chosen = torch.where(keys[:, :, None, None], at_least_fp32(k), 0)
    total = sliding_sum(chosen, before, after)
    if not itself:
        total = total - chosen
    return total / _count(keys, causal, window, itself)[:, :, None, None]


def products(
    q: Float[Tensor, "prompt position head d_head"],
    k: Float[Tensor, "prompt position kv_head d_head"],
) -> Float[Tensor, "prompt head position"]:
    """q_i · k_i at each position, for every query head and its KV head.

    Multiplied and summed in true fp32, in chunks, since a matrix product might run in TF32.
    """
    k = at_least_fp32(k)
    q = rearrange(q, "prompt position (kv group) d -> prompt position kv group d", kv=k.shape[2])
    parts = [(q[:, at] * k[:, at, :, None]).sum(dim=-1) for at in position_chunks(q)]
    return rearrange(
        torch.cat(parts, dim=1), "prompt position kv group -> prompt (kv group) position"
    )


def _count(
    keys: Bool[Tensor, "prompt position"], causal: bool, window: int | None, itself: bool
) -> Float[Tensor, "prompt position"]:
    before, after = reach(causal, window)
    count = sliding_sum(keys.float(), before, after)
    return count if itself else count - keys.float()


def _sees(
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
    window: int | None,
) -> tuple[Bool[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]:
    """Whether each query sees a sink, and whether it sees any other key than itself."""
    sees_sink = _count(sinks & mask, causal, window, itself=True) > 0
    return sees_sink, _count(mask & ~sinks, causal, window, itself=False) > 0
