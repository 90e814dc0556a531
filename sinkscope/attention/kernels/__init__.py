"""Triton kernels for CUDA, imported only when needed.

Triton compiles a function's source, so it must not be wrapped: ``no_type_check`` excludes it from
the run-time type checks of the tests.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention.call import AttentionCall

WIDEST_HEAD = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_for(query: Tensor, call: AttentionCall) -> ModuleType | None:
    """The module of kernels if it supports this call, or None to use plain torch."""
    fits = query.dtype in DTYPES and query.shape[-1] <= WIDEST_HEAD
    dense = call.key_bias is not None or (call.mask is not None and call.mask.ndim == 4)
    if not query.is_cuda or not fits or dense:
        return None
    try:
        from sinkscope.attention.kernels import launch
    except ImportError:  # a CUDA build of torch without Triton
        return None
    return launch


class Angles(NamedTuple):
    """Means over the selected queries, see `metrics.geometry`.

    Attributes:
        query_norm: ‖q_i‖ [activation].
        key_norm: ‖k_s‖ over the sinks [activation].
        cosine: cos(q_i, k_s) over the sinks visible to i.
        other_cosine: The same over the other visible keys except i itself.
        gap: Scaled product with the mean sink minus that with the mean other key [logit].
    """

    query_norm: Float[Tensor, "prompt head"]
    key_norm: Float[Tensor, "prompt head"]
    cosine: Float[Tensor, "prompt head"]
    other_cosine: Float[Tensor, "prompt head"]
    gap: Float[Tensor, "prompt head"]
