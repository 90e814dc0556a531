"""Memory that was freed, given back to the system.

The C library of Linux keeps what is freed for later use. It does not always find a use for the
holes that large tensors leave: a loop over 32,768 tokens on a CPU, which never held more than 80 MB
of tensors at once, grew by 4 GB. Asked to, the library hands the holes back.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Hand freed memory back; where the C library cannot be asked to (not glibc), do nothing."""
    trimmer = _trimmer()
    if trimmer is not None:
        trimmer(0)


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
