"""Representational collapse of a layer's hidden states.

Sinks have been interpreted as preventing over-mixing (Barbero et al. 2504.02732) and as compressing
the hidden state into one direction (Queipo-de-Llano et al. 2510.06477). A single peak dominates
both measures here, so compute them with and without the sinks: ``where = mask`` or
``mask & ~sinks``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.metrics.positions import masked_mean
from sinkscope.metrics.reductions import at_least_fp32


def rank_collapse(
    hidden: Float[Tensor, "prompt position dim"], where: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """Distance of the positions from their mean, μ(V) = ‖V - (1/n) 1 1ᵀ V‖_F [activation].

    0 is complete rank collapse (Barbero et al. 2504.02732). nan without any position.
    """
    centre = masked_mean(hidden, where[:, :, None], dim=1)
    offset = torch.where(where[:, :, None], at_least_fp32(hidden) - centre[:, None], 0)
    size = torch.linalg.vector_norm(offset, dim=(1, 2))
    return torch.where(where.any(dim=1), size, torch.nan)


def matrix_entropy(
    hidden: Float[Tensor, "prompt position dim"],
    where: Bool[Tensor, "prompt position"],
    normalised: bool = False,
) -> Float[Tensor, "prompt"]:
    """Von Neumann entropy of the hidden state's Gram matrix, -Σ_r p_r ln p_r [nat].

    p_r = σ_r² / Σ σ², σ the singular values of the positions × dims matrix, not centred
    (Queipo-de-Llano et al. 2510.06477). 0 means rank one. ``normalised`` divides by the maximum,
    ln(min(positions, dims)) [share]. Computed in float64 from the smaller Gram matrix.
    """
    rows = torch.where(where[:, :, None], hidden, 0).double()
    wide = rows.shape[1] <= rows.shape[2]
    gram = rows @ rows.mT if wide else rows.mT @ rows
    energy = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = energy / energy.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(share).sum(dim=-1)
    if normalised:
        entropy = entropy / where.sum(dim=1).clamp(max=hidden.shape[2]).double().log()
    return entropy.to(torch.promote_types(hidden.dtype, torch.float32))
