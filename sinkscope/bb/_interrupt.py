"""A Ctrl-C that waits until a training step is over, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def waiting_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only answers the question that is yielded; a second one stops all.

    Where Ctrl-C would not raise KeyboardInterrupt (other threads, other handlers), nothing changes.
    """
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
