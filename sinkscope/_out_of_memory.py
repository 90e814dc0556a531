"""Recognising that memory has run out, on every device."""

from __future__ import annotations

import torch

_SAID = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's allocators for CPUs say; only the one for GPUs has an exception of its own."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch means that memory has run out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID)
