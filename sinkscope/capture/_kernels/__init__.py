"""Triton kernels for CUDA, imported only when there is something for them to do.

Triton compiles a function's source, so nothing may wrap it: ``no_type_check`` keeps the tests' type
checker away.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sinkscope.capture._calls import AttentionCall

WIDEST_HEAD = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_for(query: Tensor, call: AttentionCall) -> ModuleType | None:
    """The module of kernels that can take this call, or None: use plain torch."""
    fits = query.dtype in DTYPES and query.shape[-1] <= WIDEST_HEAD
    if not query.is_cuda or not fits or (call.mask is not None and call.mask.ndim == 4):
        return None
    try:
        from sinkscope.capture._kernels import launch
    except ImportError:  # a CUDA build of torch without Triton
        return None
    return launch
