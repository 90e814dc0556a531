"""Verdicts on heads: HONOR and the other inactivity scores, dormancy."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def over_layer_mean(score: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """The score over its mean across the heads of the layer: 1 = like its neighbours [ratio]."""
    return score / score.mean(dim=-1, keepdim=True)


def honor(norms: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """HONOR: a head's mean output norm over its layer's mean of the same [ratio].

    mean_i ‖o_i^h‖ / mean_{h'} mean_i ‖o_i^{h'}‖ per prompt and layer (AHON-LN of Sandoval-Segura
    et al. 2504.03889), o the head output before W_O, or after it in their appendix.
    """
    return over_layer_mean(norms)
