"""Triton kernels for CUDA, imported only when there is something for them to do."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sinkscope.capture._calls import AttentionCall


def kernels_for(query: Tensor, call: AttentionCall) -> ModuleType | None:
    """The module of kernels that can take this call, or None: use plain torch."""
    return None
