"""Gates on the heads' outputs: their openness, and the attention and values that pass them.

The output of a gated head before W_O is g_i ⊙ Σ_j A_ij v_j, where the gate g_i of query i is one
factor for the whole head or one for each channel, computed from the query's own hidden state (Qiu
et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708). With a closed gate a head
outputs nothing, whatever it attends to; without a gate, it can only do so by attending to a sink.
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
"""Activations by which models compute a gate's factors from a projection, in the model's dtype."""

Gate = Float[Tensor, "prompt position head d_gate"]
"""Factors of every head: a single one (d_gate = 1), or one for each channel (d_gate = d_head)."""


def factors(x: Float[Tensor, "prompt position *width"], activation: str, heads: int) -> Gate:
    """The gate's factors from the activation at a hook point, flat or by heads.

    Args:
        x: [prompt position width], or [prompt position head d_gate].
        activation: A name in `ACTIVATIONS`.
        heads: Number of query heads.
    """
    split = rearrange(x, "p t (h d) -> p t h d", h=heads) if x.ndim == 3 else x
    return ACTIVATIONS[activation](split)


def openness(gate: Gate) -> Float[Tensor, "prompt head position"]:
    """Mean of each query's factors over the head's channels [1]."""
    return rearrange(at_least_fp32(gate).mean(dim=-1), "p t h -> p h t")


def closed(gate: Gate, below: float = CLOSED) -> Float[Tensor, "prompt head position"]:
    """Share of each query's factors that are below ``below``, over the head's channels [share]."""
    return rearrange((at_least_fp32(gate) < below).float().mean(dim=-1), "p t h -> p h t")


def mean_gate(gate: Gate, mask: Bool[Tensor, "prompt position"]) -> Float[Tensor, "prompt head"]:
    """Mean factor over real queries and channels [1]: the gating score of Qiu et al. 2505.06708."""
    return masked_mean(openness(gate), mask[:, None, :], dim=-1)


def closed_share(
    gate: Gate, mask: Bool[Tensor, "prompt position"], below: float = CLOSED
) -> Float[Tensor, "prompt head"]:
    """Sparsity of a gate: share of (real query, channel) with a factor below ``below`` [share]."""
    return masked_mean(closed(gate, below), mask[:, None, :], dim=-1)


def gated_attention(
    attention: Float[Tensor, "prompt head query"],
    gate: Gate,
    queries: Bool[Tensor, "prompt query"],
) -> Float[Tensor, "prompt head"]:
    """Attention to the sinks that passes the gate: mean_i A_i,sink ḡ_i over the given queries.

    ḡ_i is the query's mean factor over the head's channels. If attention and gate are
    uncorrelated, this is sink attention times mean gate; it is smaller if the gate closes when
    the head attends to the sink.

    Args:
        attention: Total attention of each query to the sinks [probability].
        gate: The factors.
        queries: Queries to average over, see `metrics.positions.queries_after`.
    """
    return masked_mean(at_least_fp32(attention) * openness(gate), queries[:, None, :], dim=-1)


def norms_through(
    x: Float[Tensor, "prompt position kv_head d_head"],
    gram: Float[Tensor, "head d_head d_head"],
    gate: Gate,
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt head position"]:
    """Norm of every value after the gate and W_O, root mean square over queries [activation].

    The contribution of value j to query i is A_ij (g_i ⊙ v_j) W_O^h. This is the root mean square
    of ‖(g_i ⊙ v_j) W_O^h‖ over the prompt's real queries i,

        sqrt(v_jᵀ (G^h ∘ C^h) v_j),   C^h = mean_i g_i g_iᵀ,

    with G from `metrics.values.gram` and ∘ the elementwise product. A gate of 1 gives
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
    # Each (prompt, head) has its own matrix: treat prompts as heads.
    norms = values.norms_through(rearrange(x, "p t k d -> 1 t (p k) d"), matrices)
    return rearrange(norms, "1 (p h) t -> p h t", p=len(x))
