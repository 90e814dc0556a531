"""Devices and their memory.

`chosen_device` checks the requested device. `ran_out_of_memory` recognises out-of-memory errors of
every device, after which `in_pieces` continues with smaller pieces. `HostNumber` and `sent` copy
between host and device asynchronously.
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

# -- launching Triton kernels on the device of their tensors ---------------------------------------

Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """Run a function with the GPU of its first tensor as the current one, on which Triton launches.

    The layers of a model may be spread over several GPUs.
    """

    @functools.wraps(launch)
    def run(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launch(x, *args, **options)
        with torch.cuda.device(x.device):
            return launch(x, *args, **options)

    return run  # type: ignore[return-value]


# -- recognising out-of-memory errors of every device ----------------------------------------------

_SAID = ("can't allocate memory", "not enough memory", "out of memory")
"""Messages of torch's CPU allocators; only the GPU allocator has an exception class of its own."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception raised by torch is an out-of-memory error."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAID)


# -- asynchronous copies of small tensors between host and device ----------------------------------
#
# A plain ``.item()`` or ``.to(device)`` blocks until the device has finished all launched work, and
# the device then idles until Python launches more. At short lengths this would dominate a scan.


class HostNumber:
    """An asynchronous copy of one number from the device to the host.

    ``int()`` waits for the number itself, not for work launched after it.
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
    """Copy a tensor from the host to `device` asynchronously; later kernels can read it."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


# -- returning freed memory to the operating system ------------------------------------------------
#
# glibc keeps freed memory for reuse, but cannot always reuse the holes that large tensors leave: in
# a loop over 32,768 tokens on a CPU, with at most 80 MB of tensors alive at once, the process grew
# by 4 GB. malloc_trim returns such holes to the operating system.


def trim() -> None:
    """Return freed memory to the operating system; a no-op without glibc."""
    trimmer = _trimmer()
    if trimmer is not None:
        trimmer(0)


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


# -- work on slices of rows, halved when memory runs out -------------------------------------------


def in_pieces(rows: int, size: int, work: Callable[[slice], Tensor]) -> Tensor:
    """Apply `work` to slices of at most `size` rows and concatenate the results.

    Args:
        rows: Total number of rows.
        size: Initial size of a slice; halved each time the device runs out of memory.
        work: Maps a slice of rows to a tensor with one entry per row.

    Raises:
        ModelError: If not even one row fits in memory.
    """
    done, pieces = 0, []
    while done < rows:
        try:
            pieces.append(work(slice(done, min(done + size, rows))))
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            size = _halved(size, error)
            continue
        done += size
    return torch.cat(pieces)


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


# -- one thread at a time on a model; torch's default settings -------------------------------------

_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Lock a model, so that its hooks see the forward passes of one thread only.

    Args:
        model: A model or a bridge.
    """
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def usual_torch() -> Iterator[None]:
    """Within the context, new tensors are float32 on the CPU whatever defaults the user has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # A device context adds microseconds to every call of torch; enter it only where needed.
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


# -- checking the requested device -----------------------------------------------------------------


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The requested device, checked; by default a GPU if there is one.

    Raises:
        ModelError: If it is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "cpu" and chosen.index:  # torch accepts any index of a CPU
            raise RuntimeError(f"no CPU {chosen.index}")
        torch.empty(1, device=chosen).item()  # fails on "meta", which has no memory
    except (
        RuntimeError,
        AssertionError,
        TypeError,
        ValueError,
    ) as error:  # without CUDA torch raises an AssertionError
        # For CUDA, torch's first line says what is missing; for other names it only lists devices.
        why = f" ({str(error).splitlines()[0]})" if str(device).startswith("cuda") else ""
        raise ModelError(f"There is no device {str(device)!r} here{why}; try 'cpu'.") from error
    return chosen
