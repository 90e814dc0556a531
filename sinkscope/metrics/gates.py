"""Gates on the heads' outputs: how open they are, and what they let through.

A gated head gives W_O the vector g_i ⊙ Σ_j A_ij v_j, where the gate g_i of query i is one factor
for the whole head or one for each channel, and is a function of the query's own hidden state (Qiu
et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708). A closed gate lets a head
add nothing whatever it attends to; without one a head has to attend to a sink for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.metrics import values
from sinkscope.metrics.positions import masked_mean
from sinkscope.metrics.reductions import at_least_fp32

CLOSED = 0.1
"""A factor below this is called closed."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "identity": lambda x: x,
        "sigmoid": torch.sigmoid,
        "softplus": lambda x: torch.nn.functional.softplus(at_least_fp32(x)).to(x.dtype),
    }
)
"""What models turn a projection into a gate's factors by, in the model's dtype."""

Gate = Float[Tensor, "prompt position head d_gate"]
"""Factors of every head, one (d_gate = 1) or one for each of its channels (d_gate = d_head)."""


def factors(x: Float[Tensor, "prompt position *width"], activation: str, heads: int) -> Gate:
    """The gate's factors from what a hook point shows, flat or by heads.

    Args:
        x: [prompt position width], or [prompt position head d_gate].
        activation: A name in `ACTIVATIONS`.
        heads: Query heads.
    """
    split = rearrange(x, "p t (h d) -> p t h d", h=heads) if x.ndim == 3 else x
    return ACTIVATIONS[activation](split)


def openness(gate: Gate) -> Float[Tensor, "prompt head position"]:
    """Mean of each query's factors over the head's channels [1]."""
    return rearrange(at_least_fp32(gate).mean(dim=-1), "p t h -> p h t")


def closed(gate: Gate, below: float = CLOSED) -> Float[Tensor, "prompt head position"]:
    """Share of each query's factors, over the head's channels, that are below ``below`` [share]."""
    return rearrange((at_least_fp32(gate) < below).float().mean(dim=-1), "p t h -> p h t")


def mean_gate(gate: Gate, mask: Bool[Tensor, "prompt position"]) -> Float[Tensor, "prompt head"]:
    """Mean factor over real queries and channels [1]: the gating score of Qiu et al. 2505.06708."""
    return masked_mean(openness(gate), mask[:, None, :], dim=-1)


def closed_share(
    gate: Gate, mask: Bool[Tensor, "prompt position"], below: float = CLOSED
) -> Float[Tensor, "prompt head"]:
    """How sparse a gate is: share of (real query, channel) whose factor is below ``below``."""
    return masked_mean(closed(gate, below), mask[:, None, :], dim=-1)


def gated_attention(
    attention: Float[Tensor, "prompt head query"],
    gate: Gate,
    queries: Bool[Tensor, "prompt query"],
) -> Float[Tensor, "prompt head"]:
    """Attention to the sinks that passes the gate: mean_i A_i,sink ḡ_i over the given queries.

    ḡ_i is the query's mean factor over the head's channels. Where attention and gate are
    independent this is sink attention times mean gate; a gate that closes just when the head
    attends to the sink makes it smaller.

    Args:
        attention: What each query pays to the sinks together [probability].
        gate: The factors.
        queries: Queries that count, see `metrics.positions.queries_after`.
    """
    return masked_mean(at_least_fp32(attention) * openness(gate), queries[:, None, :], dim=-1)


def norms_through(
    x: Float[Tensor, "prompt position kv_head d_head"],
    gram: Float[Tensor, "head d_head d_head"],
    gate: Gate,
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt head position"]:
    """Size of every value as the residual stream receives it behind the gate [activation].

    Query i receives A_ij (g_i ⊙ v_j) W_O^h of value j. This is the root mean square of
    ‖(g_i ⊙ v_j) W_O^h‖ over the prompt's real queries i,

        sqrt(v_jᵀ (G^h ∘ C^h) v_j),   C^h = mean_i g_i g_iᵀ,

    with G from `metrics.values.gram` and ∘ entry by entry. A gate that is 1 throughout gives
    `metrics.values.norms_through`; a factor c for the whole head multiplies that by c.

    Args:
        x: The values.
        gram: W_O^h W_O^hᵀ of every query head.
        gate: The factors.
        mask: True at real positions.
    """
    wide = at_least_fp32(gate)
    weight = mask.to(wide.dtype) / mask.sum(dim=1, keepdim=True)
    second = torch.einsum("pthd,pthe,pt->phde", wide, wide, weight)
    matrices = rearrange(gram.to(second.dtype) * second, "p h d e -> (p h) d e")
    # Every head of every prompt has a matrix of its own: let prompts be heads.
    found = values.norms_through(rearrange(x, "p t k d -> 1 t (p k) d"), matrices)
    return rearrange(found, "1 (p h) t -> p h t", p=len(x))
