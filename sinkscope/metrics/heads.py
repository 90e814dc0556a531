"""Classification of heads: HONOR and the other inactivity scores, dormancy.

The thirteen scores are those of Sandoval-Segura et al. (2504.03889). Each is defined per head and
prompt, so a head can be inactive on one input and active on another. "LN" divides by the layer's
mean of the same score, except that LTHON-LN divides by the layer's mean AHON, as in their code.
"HN" divides by the head's own mean over positions. LTHON-LL, which divides by the layer's mean
LTHON, is our addition and not one of the thirteen.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.renamed import argument

Direction = Literal["above", "below"]

INACTIVE_IF: dict[str, Direction] = {
    "AWFT": "above",
    "AWFT-LN": "above",
    "AEQD": "below",
    "AEQD-LN": "below",
    "FTVVN": "below",
    "FTVVN-LN": "below",
    "AVVN": "below",
    "AVVN-LN": "below",
    "LTHON": "below",
    "LTHON-LN": "below",
    "LTHON-LL": "below",
    "LTHON-HN": "below",
    "AHON": "below",
    "AHON-LN": "below",
}
"""Names of the scores, with the side of the threshold on which a head counts as inactive."""


def over_layer_mean(score: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """The score over its mean across the heads of the layer [ratio]."""
    return score / score.mean(dim=-1, keepdim=True)


def honor(norms: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """HONOR: a head's mean output norm over the mean of its layer [ratio].

    mean_i ‖o_i^h‖ / mean_{h'} mean_i ‖o_i^{h'}‖ per prompt and layer (AHON-LN), where o is the
    head's output before W_O, or after it in the paper's appendix.
    """
    return over_layer_mean(norms)


def inactivity_scores(
    first_token_attention: Float[Tensor, "prompt layer head"],
    attention_entropy: Float[Tensor, "prompt layer head"],
    first_value_norm: Float[Tensor, "prompt layer head"],
    mean_value_norm: Float[Tensor, "prompt layer head"],
    last_output_norm: Float[Tensor, "prompt layer head"],
    head_output_norm: Float[Tensor, "prompt layer head"],
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """The thirteen scores and LTHON-LL by name; see `INACTIVE_IF` for the inactive side.

    LTHON-LN = ‖o_last^h‖ / mean_{h'} mean_i ‖o_i^{h'}‖ and LTHON-LL = ‖o_last^h‖ / mean_{h'}
    ‖o_last^{h'}‖, both over the heads h' of the layer [ratio].

    Args:
        first_token_attention: AWFT, mean_i A_i0 [probability].
        attention_entropy: AEQD, mean_i -Σ_j A_ij ln A_ij [nat].
        first_value_norm: FTVVN, ‖v_0‖, repeated for the query heads of a group [activation].
        mean_value_norm: AVVN, mean_j ‖v_j‖, repeated in the same way [activation].
        last_output_norm: LTHON, ‖o_last‖ at the last real position [activation].
        head_output_norm: AHON, mean_i ‖o_i‖ [activation].
    """
    measured = {
        "AWFT": first_token_attention,
        "AEQD": attention_entropy,
        "FTVVN": first_value_norm,
        "AVVN": mean_value_norm,
        "LTHON": last_output_norm,
        "AHON": head_output_norm,
    }
    scores = measured | {f"{name}-LN": over_layer_mean(score) for name, score in measured.items()}
    scores["LTHON-LL"] = over_layer_mean(last_output_norm)
    scores["LTHON-LN"] = last_output_norm / head_output_norm.mean(dim=-1, keepdim=True)
    scores["LTHON-HN"] = last_output_norm / head_output_norm
    return {name: scores[name] for name in INACTIVE_IF}


def inactivity_threshold(
    score: Float[Tensor, "*shape"], quantile: float, inactive_if: Direction
) -> float:
    """The threshold at which a share ``quantile`` of all entries is inactive.

    Computed from the score's distribution over all prompts, layers and heads, as in the paper for
    one data set; a threshold from one text can then be applied to another.
    """
    at = quantile if inactive_if == "below" else 1 - quantile
    # torch.nanquantile accepts at most 2^24 values.
    return float(np.nanquantile(score.double().cpu().numpy(), at))


def flag_inactive(
    score: Float[Tensor, "*shape"], quantile: float, inactive_if: Direction
) -> Bool[Tensor, "*shape"]:
    """The heads strictly beyond the threshold of :func:`inactivity_threshold`; nan is False."""
    threshold = inactivity_threshold(score, quantile, inactive_if)
    return score < threshold if inactive_if == "below" else score > threshold


@argument("parked", "sink_threshold")
def is_dormant(
    sink_attention: Float[Tensor, "*shape"], sink_threshold: float = 0.5
) -> Bool[Tensor, "*shape"]:
    """Whether a head is dormant by its attention: sink attention above ``sink_threshold``.

    Guo et al. (2410.13835) call Llama-2-7B L16H25 dormant at 0.5 to 1.0. Attention alone is only an
    indication; whether the head has no effect is decided by ablation.
    """
    return sink_attention > sink_threshold


@argument("parked", "sink_threshold")
def is_active_dormant(
    here: Float[Tensor, "prompt layer head"],
    there: Float[Tensor, "other_prompt layer head"],
    sink_threshold: float = 0.5,
    drop: float = 0.25,
) -> Bool[Tensor, "layer head"]:
    """Heads that are dormant on one kind of text and active on another.

    Operational definition: mean sink attention above ``sink_threshold`` on the first kind, and
    lower by at least ``drop`` on the second (L16H25 of Guo et al.: 0.5 to 1.0 on Wikipedia, 0.08 to
    0.5 on GitHub).

    Args:
        here: sink attention on the text where the head should be dormant.
        there: sink attention on the text where it should be active.
        sink_threshold: sink attention above which a head is dormant [probability].
        drop: smallest decrease at which it counts as active [probability].
    """
    here, there = here.nanmean(dim=0), there.nanmean(dim=0)
    return (here > sink_threshold) & (here - there >= drop)
