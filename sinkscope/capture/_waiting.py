"""Small tensors between host and device, without one waiting for the other.

A plain ``.item()`` or ``.to(device)`` waits until the device has done everything it was given, and
then the device waits for Python. At short lengths that is most of what a scan would cost.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


class Coming:
    """A tensor of one number on its way to the host.

    Asking for the number waits until it was computed, not for what has been launched since.
    """

    def __init__(self, number: Shaped[Tensor, ""]) -> None:
        self._number = number
        self._arrived: torch.cuda.Event | None = None
        if number.is_cuda:
            # Only page-locked memory can be written while the host goes on.
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))

    def __int__(self) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number)


def sent(x: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """A tensor of the host on `device`, where it will have arrived before anything reads it."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
