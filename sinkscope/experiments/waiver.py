"""The waiver phenomenon (Yan et al. 2024, arXiv 2407.01601), asked of any model.

An element can waive its own contribution (small values) and absorb the attention that heads do not
need. Which element that is depends on what makes it special: being the one that mixes nothing, or
its position vector. Each function asks one of the paper's questions:

========================= ============================================================= =======
`nonmixture`              which FFN-output dims mark the element that mixes nothing      Fig. 1
`position_norms`          whether the first position's vector stands out                 Fig. 2
`structured_mask`         whether an element that is made to mix nothing becomes a sink  Fig. 3
`position_embeddings`     whether another position's vector makes a sink                 Fig. 4
`which_part`              which layers, dims or norms it takes                           ours
========================= ============================================================= =======

Each returns a result with ``summary()``, ``frame()``, ``figures()``, ``to_dict()`` and ``save()``.
"""

from __future__ import annotations

from sinkscope.experiments._nonmixture import NonMixture, nonmixture
from sinkscope.experiments._parts import WhichPart
from sinkscope.experiments._position_vectors import (
    PositionEdit,
    PositionNorms,
    position_embeddings,
    position_norms,
)
from sinkscope.experiments._structured_mask import Designation, structured_mask
from sinkscope.experiments._which_part import which_part

__all__ = [
    "Designation",
    "NonMixture",
    "PositionEdit",
    "PositionNorms",
    "WhichPart",
    "nonmixture",
    "position_embeddings",
    "position_norms",
    "structured_mask",
    "which_part",
]
