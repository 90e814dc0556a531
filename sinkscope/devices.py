"""Devices and their memory.

`chosen_device` checks the device that was asked for. `ran_out_of_memory` recognises that memory is
exhausted, on every device, and `in_pieces` then goes on with smaller pieces. `HostNumber` and
`sent` copy between host and device without one waiting for the other.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor

from sinkscope.errors import ModelError

# -- launching Triton kernels where the tensors lie ------------------------------------------------

Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """Run a function on the GPU of its first tensor: Triton launches on the current one.

    The layers of one model may lie on several.
    """

    @functools.wraps(launch)
    def run(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launch(x, *args, **options)
        with torch.cuda.device(x.device):
            return launch(x, *args, **options)

    return run  # type: ignore[return-value]


# -- recognising that memory has run out, on every device ------------------------------------------

_SAID = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's allocators for CPUs say; only the one for GPUs has an exception of its own."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch means that memory has run out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID)


# -- small tensors between host and device, without one waiting for the other ----------------------
#
# A plain ``.item()`` or ``.to(device)`` waits until the device has done everything it was given,
# and then the device waits for Python. At short lengths that is most of what a scan would cost.


class HostNumber:
    """An asynchronous copy of one number from the device to the host.

    ``int()`` waits until the number was computed, not for what has been launched since.
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
    """Copy a tensor from the host to `device` asynchronously; kernels launched later see it."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


# -- returning freed memory to the operating system ------------------------------------------------
#
# The C library of Linux keeps what is freed for later use. It does not always find a use for the
# holes that large tensors leave: a loop over 32,768 tokens on a CPU, which never held more than 80
# MB of tensors at once, grew by 4 GB. Asked to, the library hands the holes back.


def trim() -> None:
    """Return freed memory to the operating system; without glibc, do nothing."""
    trimmer = _trimmer()
    if trimmer is not None:
        trimmer(0)


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


# -- work on rows a few at a time, fewer when memory runs out --------------------------------------


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
    if not ran_out_of_memory(error):
        raise error
    if size == 1:
        raise ModelError(
            "One prompt does not fit in memory; use shorter texts or a device with more memory."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


# -- one thread at a time on a model, and torch as it comes ----------------------------------------

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Inside, other threads that measure this model wait: what hooks see is one model's one pass.

    Args:
        model: A model or a bridge.
    """
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def usual_torch() -> Iterator[None]:
    """Inside, new tensors are float32 on the CPU, whatever defaults the user has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # Such a context costs microseconds for each call of torch: only where there is need of it.
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


# -- the device that was asked for, if it is there -------------------------------------------------


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device; a GPU if there is one and none is named.

    Raises:
        ModelError: If it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "cpu" and chosen.index:  # torch takes any number; there is one CPU
            raise RuntimeError(f"no CPU {chosen.index}")
        torch.empty(1, device=chosen).item()  # "meta" exists only in name
    except (
        RuntimeError,
        AssertionError,
        TypeError,
        ValueError,
    ) as error:  # torch says "no CUDA" with an assertion
        # A GPU may be there and only torch not see it; of other names torch lists all it knows.
        why = f" ({str(error).splitlines()[0]})" if str(device).startswith("cuda") else ""
        raise ModelError(f"There is no device {str(device)!r} here{why}; try 'cpu'.") from error
    return chosen
