"""Functions from attention scores to attention weights: softmax and alternatives.

Every operator takes scores and the mask of visible keys, and returns the pattern; masked keys have
weight 0 and do not affect the others. Without a mask, the scores are already masked, in float32,
with masked entries at `HIDDEN` or below, so that an edit of scores can mask a key. A row without
a visible key is zero, except under `softmax`, whose rows always sum to 1.

`OPERATORS` lists the operators that need only scores, by their public names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HIDDEN = torch.finfo(torch.float32).min / 2
Scores = Float[Tensor, "*row key"]
Visible = Bool[Tensor, "*#row key"]
Pattern = Float[Tensor, "*row key"]


def softmax(scores: Scores, visible: Visible | None = None) -> Pattern:
    """exp(s_j) / Σ_k exp(s_k)."""
    return torch.softmax(_masked(scores, visible), dim=-1)


def softmax_with_extra_logit(
    scores: Scores, logit: Float[Tensor, "*#row 1"], visible: Visible | None = None
) -> Pattern:
    """exp(s_j) / (exp(logit) + Σ_k exp(s_k)): the rest of the row, the off-sequence mass, is lost.

    With one learned logit per head it is the attention sink of gpt-oss (OpenAI 2025, gpt-oss-120b
    & gpt-oss-20b Model Card, arXiv 2508.10925); with logit = q·k* for a learned key k* whose value
    is zero, the key bias of Gu et al. (2024, When Attention Sink Emerges in Language Models: An
    Empirical View, arXiv 2410.10781).
    """
    scores = _masked(scores, visible)
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1, keepdim=True), logit)
    return torch.exp(scores - total)


def off_by_one(scores: Scores, visible: Visible | None = None) -> Pattern:
    """exp(s_j) / (1 + Σ_k exp(s_k)): softmax with an extra logit of 0.

    Source: Miller (2023), Attention Is Off By One; as a zero sink in Xiao et al. (2023), Efficient
    Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.3.
    """
    return softmax_with_extra_logit(scores, scores.new_zeros(1), visible)


def relu(scores: Scores, visible: Visible | None = None) -> Pattern:
    """max(s_j, 0) / n with n visible keys.

    Source: Guo et al. (2024), Active-Dormant Attention Heads, arXiv 2410.13835.
    """
    return torch.relu(_masked(scores, visible)) / _count(scores, visible)


def sigmoid(scores: Scores, visible: Visible | None = None) -> Pattern:
    """σ(s_j − ln n) with n visible keys: about 1/n each where the scores are 0, as with softmax.

    Source: Ramapuram et al. (2024), Theory, Analysis, and Best Practices for Sigmoid
    Self-Attention, arXiv 2409.04431.
    """
    return torch.sigmoid(_masked(scores, visible) - _count(scores, visible).log())


def softpick(scores: Scores, visible: Visible | None = None, eps: float = 1e-8) -> Pattern:
    """max(e^s_j − 1, 0) / (Σ_k |e^s_k − 1| + ε), computed without overflow.

    Source: Zuhri et al. (2025), Softpick: No Attention Sink, No Massive Activations with Rectified
    Softmax, arXiv 2504.20966.
    """
    scores = _masked(scores, visible)
    shift = scores.amax(-1, keepdim=True).clamp(min=0.0)
    lifted = torch.exp(scores - shift) - torch.exp(-shift)
    weight = torch.where(scores > HIDDEN, lifted.abs(), 0.0).sum(-1, keepdim=True)
    return torch.relu(lifted) / (weight + eps)


def zero(scores: Scores, visible: Visible | None = None) -> Pattern:
    """No attention to any key: the pattern of a layer without attention."""
    return torch.zeros_like(scores)


Operator = Callable[[Scores, Visible], Pattern]
"""Maps scores and the mask of visible keys, both [prompt head query key], to the pattern."""

OPERATORS: dict[str, Operator] = {
    "softmax": softmax,
    "relu": relu,
    "sigmoid": sigmoid,
    "off-by-one": off_by_one,
    "softpick": softpick,
}


def _masked(scores: Scores, visible: Visible | None) -> Scores:
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _count(scores: Scores, visible: Visible | None) -> Tensor:
    """Number of visible keys of each row [*row 1], at least 1 to avoid division by 0."""
    seen = scores > HIDDEN if visible is None else visible
    return seen.sum(-1, keepdim=True).clamp(min=1)
