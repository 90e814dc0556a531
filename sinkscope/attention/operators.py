"""What may stand where softmax stands: each turns one row of scores into attention weights.

Every operator takes masked scores in float32, hidden entries at `HIDDEN` or below, and returns the
pattern; a hidden key always gets weight 0. Visibility is read off the scores, so that an edit of
`hook_attn_scores` (hide this key, show that one) reaches every operator alike.

`spare` is the logit of a place outside the sequence to which a head may send its attention; the
rows of such a pattern sum to less than 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

HIDDEN = torch.finfo(torch.float32).min / 2
Scores = Float[Tensor, "*row key"]
Pattern = Float[Tensor, "*row key"]


def softmax(scores: Scores) -> Pattern:
    """exp(s_j) / Σ_k exp(s_k)."""
    return torch.softmax(scores, dim=-1)


def softmax_with_spare(scores: Scores, spare: Float[Tensor, "*#row 1"]) -> Pattern:
    """exp(s_j) / (exp(spare) + Σ_k exp(s_k)).

    With spare = 0 this is softmax-off-by-one (Miller 2023); with one learned number per head, the
    sink logit of gpt-oss; with spare = q·k* for a learned key k* whose value is zero, the key bias
    of Gu et al. 2024 (§ "attention biases").
    """
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1, keepdim=True), spare)
    return torch.exp(scores - total)


def relu(scores: Scores) -> Pattern:
    """max(s_j, 0) / (number of visible keys): the ReLU attention of Guo et al. 2024."""
    return torch.relu(scores) / _number(scores)


def sigmoid(scores: Scores) -> Pattern:
    """σ(s_j − ln n) with n visible keys (Ramapuram et al. 2024): starts at softmax's 1/n."""
    return torch.sigmoid(scores - _number(scores).log())


def softpick(scores: Scores, eps: float = 1e-8) -> Pattern:
    """max(e^s_j − 1, 0) / (Σ_k |e^s_k − 1| + ε) (Zuhri et al. 2025), safe from overflow."""
    shift = scores.amax(-1, keepdim=True).clamp(min=0.0)
    lifted = torch.exp(scores - shift) - torch.exp(-shift)
    weight = torch.where(_visible(scores), lifted.abs(), 0.0).sum(-1, keepdim=True)
    return torch.relu(lifted) / (weight + eps)


def nothing(scores: Scores) -> Pattern:
    """No attention at all: what a layer without attention is measured as."""
    return torch.zeros_like(scores)


def _visible(scores: Scores) -> Tensor:
    return scores > HIDDEN


def _number(scores: Scores) -> Tensor:
    """Visible keys of each row, or 1 where there are none: nothing over nothing is nothing."""
    return _visible(scores).sum(-1, keepdim=True).clamp(min=1)


PLAIN: dict[str, Callable[[Scores], Pattern]] = {
    "softmax": softmax,
    "gated": softmax,  # the gate multiplies the head's output, not its pattern
    "relu": relu,
    "sigmoid": sigmoid,
    "softpick": softpick,
    "none": nothing,
}
SPARE = ("off-by-one", "learned-sink", "key-bias")
ATTENTIONS = ("softmax", "relu", "sigmoid", *SPARE, "softpick", "gated")
