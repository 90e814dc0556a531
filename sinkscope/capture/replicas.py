"""Scheduling of batches over replicas, with results accumulated in a fixed order.

1. An idle replica takes the next prompts of the list, which is sorted from long to short. A batch
   that does not fit in memory is put back, and batches are half as large from then on.
2. The results of a batch are accumulated after those of all previous batches. Sums over prompts
   therefore do not depend on the speed of the replicas, and with the same batches all values are
   bit for bit those of a single replica.
3. The first error, or Ctrl-C, stops every replica at its next layer.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jaxtyping import Int
from torch import Tensor

from sinkscope.capture.batches import together

Found = TypeVar("Found")


class Share(NamedTuple):
    """Prompts of one batch.

    Attributes:
        start: Index of the first one in the list.
        rows: Indices of the prompts in the text.
    """

    start: int
    rows: Int[Tensor, "prompt"]


class Batches:
    """The queue of remaining prompts.

    Args:
        order: All prompts, from long to short.
        classes: The class of every prompt, see `batches.classes`.
        size: Maps a prompt's index to the maximum size of a batch that begins with it.
    """

    def __init__(
        self, order: Int[Tensor, "row"], classes: Int[Tensor, "prompt"], size: Callable[[int], int]
    ) -> None:
        self._order = order
        self._classes = classes
        self._size = size
        self._most = max(1, len(order))
        self._left = [(0, len(order))]
        self._guard = threading.Lock()

    def next(self) -> Share | None:
        """The next batch, or None if the queue is empty."""
        with self._guard:
            if not self._left or self._left[0][0] == self._left[0][1]:
                return None
            start, stop = heapq.heappop(self._left)
            order = self._order[start:stop]
            size = min(self._most, self._size(int(order[0])))
            rows = next(together(order, self._classes, size))
            if start + len(rows) < stop:
                heapq.heappush(self._left, (start + len(rows), stop))
            return Share(start, rows)

    def put_back(self, share: Share, most: int) -> None:
        """Return a batch to the queue, and limit further batches to `most` prompts."""
        with self._guard:
            self._most = min(self._most, most)
            heapq.heappush(self._left, (share.start, share.start + len(share.rows)))


class InOrder(Generic[Found]):
    """Accumulates the results of batches in the order of the list.

    Args:
        fold: Called with the result of each batch in order, by one thread at a time.
    """

    def __init__(self, fold: Callable[[Found], None]) -> None:
        self._fold = fold
        self._next = 0
        self._waiting: dict[int, tuple[int, Found]] = {}
        self._guard = threading.Lock()

    def add(self, share: Share, result: Found) -> None:
        """Accumulate a batch, or store it until all previous ones have been accumulated."""
        with self._guard:
            self._waiting[share.start] = len(share.rows), result
            while self._next in self._waiting:
                prompts, ready = self._waiting.pop(self._next)
                self._next += prompts
                self._fold(ready)


class Stopped(Exception):
    """Raised in a replica's forward pass because another replica failed, or Ctrl-C was pressed."""


def side_by_side(works: Sequence[Callable[[], Any]], stop: threading.Event) -> None:
    """Run the first function in this thread and each of the others in its own thread.

    Args:
        works: The functions; each raises `Stopped` soon after `stop` is set.
        stop: Set when one of them fails.

    Raises:
        BaseException: The first exception raised by any of them.
    """
    failed: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works[1:]]
    for thread in threads:
        thread.start()
    try:
        works[0]()
        for thread in threads:
            thread.join()
    except Stopped:
        pass
    except BaseException:
        stop.set()
        raise
    finally:
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
