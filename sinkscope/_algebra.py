"""The arithmetic by which claims about attention hook points are checked."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.metrics.values import per_query_head


def scaled_products(
    query: Float[Tensor, "prompt query head d_head"],
    key: Float[Tensor, "prompt key kv_head d_head"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "prompt head query key"]:
    """Scores: scale · q·k, bounded to ±softcap by tanh where there is a softcap (Gemma-2)."""
    query, key = (rearrange(x, "b t h d -> b h t d") for x in (query, key))
    key = per_query_head(key, query.shape[1])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(
    scores: Float[Tensor, "prompt head query key"],
    visible: Bool[Tensor, "query key"],
    sinks: Float[Tensor, "head"] | None,
) -> Float[Tensor, "prompt head query key"]:
    """Softmax over visible keys and, where there is one, a learned sink whose share is dropped."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    sink = rearrange(sinks, "h -> 1 h 1 1").expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def mixed_values(
    pattern: Float[Tensor, "prompt head query key"],
    value: Float[Tensor, "prompt key kv_head d_head"],
) -> Float[Tensor, "prompt query head d_head"]:
    """Σ_j A_ij v_j for every query head."""
    value = per_query_head(rearrange(value, "b t h d -> b h t d"), pattern.shape[1])
    return torch.einsum("bhqk,bhkd->bqhd", pattern, value)


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Equal shapes, and equal up to ``tolerance`` times the largest magnitude of either."""
    if left.shape != right.shape:
        return False
    size = torch.maximum(left.abs().max(), right.abs().max()).clamp_min(1e-30)
    return bool((left - right).abs().max() <= tolerance * size)
