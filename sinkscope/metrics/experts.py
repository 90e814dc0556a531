"""Super experts: the experts of a routed model that write its massive activations."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.metrics.residual import MASSIVE_MINIMUM, MASSIVE_RATIO

PERCENTILE, SHARE = 99.5, 0.1
"""Thresholds on the largest output of a super expert: percentile, and share of the maximum."""


def forms_massive(
    peak: Float[Tensor, "prompt state"],
    median: Float[Tensor, "prompt state"],
    minimum: float = MASSIVE_MINIMUM,
    ratio: float = MASSIVE_RATIO,
    share: float = SHARE,
) -> Bool[Tensor, "layer"]:
    """The layers in which massive activations form.

    Layer l qualifies if in some prompt the largest |a| of the hidden state after it, M_l, is a
    massive activation, M_l > minimum and M_l > ratio × the median |a| (Sun et al. 2024, arXiv
    2402.17762), and the layer increases it by more than a share of the maximum over all layers,
    M_l − M_{l−1} > share · max M. Su et al. (2025), Unveiling Super Experts in Mixture-of-Experts
    Large Language Models, arXiv 2507.23279, read these layers off a plot; the rule here is ours.

    Args:
        peak: max |a| over the real tokens and dims of each hidden state [activation]; state 0 is
            the input of the first block, state l + 1 the output of block l.
        median: Median |a| of the same hidden states [activation].
        minimum: Lower bound on M_l [activation].
        ratio: Lower bound on M_l over the median.
        share: Smallest increase, as a share of the largest M of the prompt.
    """
    after = peak[:, 1:]
    massive = (after > minimum) & (after > ratio * median[:, 1:])
    rises = after - peak[:, :-1] > share * peak.amax(dim=1, keepdim=True)
    return (massive & rises).any(dim=0)


def super_experts(
    largest: Float[Tensor, "layer expert"],
    forms: Bool[Tensor, "layer"],
    percentile: float = PERCENTILE,
    share: float = SHARE,
) -> Bool[Tensor, "layer expert"]:
    """The super experts of a model.

    With a_le the largest |output| of the down-projection of expert e in layer l, over all tokens
    routed to it, an expert is a super expert if a_le is above the percentile of all a and above a
    share of the largest a, and l is a layer in which massive activations form. Su et al.
    (2025), Unveiling Super Experts in Mixture-of-Experts Large Language Models, arXiv 2507.23279.

    Args:
        largest: a_le [activation]; nan for an expert to which no token is routed, which is left out
            of the percentile.
        forms: The layers in which massive activations form, see `forms_massive`.
        percentile: Between 0 and 100; interpolated linearly.
        share: Threshold as a share of the largest a.
    """
    known = largest[~largest.isnan()].double()
    if not len(known):
        return torch.zeros_like(largest, dtype=torch.bool)
    bound = torch.maximum(torch.quantile(known, percentile / 100), share * known.max())
    return (largest > bound) & forms[:, None]
