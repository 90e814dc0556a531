"""Work on rows a few at a time, fewer when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinkscope.errors import ModelError


def in_pieces(rows: int, size: int, work: Callable[[slice], Tensor]) -> Tensor:
    """Do `work` on slices of at most `size` rows and lay the results end to end.

    Args:
        rows: How many there are.
        size: How many to begin with; halved each time the device runs out of memory.
        work: From a slice of rows to a tensor with one entry a row.

    Raises:
        ModelError: If not even one row fits in memory.
    """
    done, found = 0, []
    while done < rows:
        try:
            found.append(work(slice(done, min(done + size, rows))))
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            size = _halved(size, error)
            continue
        done += size
    return torch.cat(found)


def _halved(size: int, error: RuntimeError) -> int:
    text = str(error).lower()
    if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in text:
        raise error
    if size == 1:
        raise ModelError(
            "One prompt does not fit in memory; use shorter texts or a device with more memory."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2
