"""Batches handed to replicas as they become idle, and folded in the order of the text.

1. Whoever is idle takes the next prompts of the list, from long to short. A batch that does not fit
   in memory is put back, and from then on batches are half as large.
2. What a batch came to is folded when all batches before it have been. So sums over prompts are
   added up in the same order whichever replica was faster, and over the same batches the figures
   are bit for bit those of one replica alone.
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
        start: Their place in the list.
        rows: Which prompts of the text they are.
    """

    start: int
    rows: Int[Tensor, "prompt"]


class Batches:
    """The prompts that nobody has taken yet.

    Args:
        order: All prompts, from long to short.
        classes: The class of every prompt, see `batches.classes`.
        size: From a prompt's index to the most prompts of a batch that begins with it.
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
        """The next batch; None if all have been taken."""
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
        """Let a batch be taken again, and no batch hold more than `most` prompts from now on."""
        with self._guard:
            self._most = min(self._most, most)
            heapq.heappush(self._left, (share.start, share.start + len(share.rows)))


class InOrder(Generic[Found]):
    """Folds what batches came to, in the order of the list.

    Args:
        fold: Called with one batch after another, by one thread at a time.
    """

    def __init__(self, fold: Callable[[Found], None]) -> None:
        self._fold = fold
        self._next = 0
        self._waiting: dict[int, tuple[int, Found]] = {}
        self._guard = threading.Lock()

    def add(self, share: Share, found: Found) -> None:
        """Fold a batch, or keep it until those before it have been folded."""
        with self._guard:
            self._waiting[share.start] = len(share.rows), found
            while self._next in self._waiting:
                prompts, ready = self._waiting.pop(self._next)
                self._next += prompts
                self._fold(ready)


class Stopped(Exception):
    """Raised in a replica's forward pass because another replica failed, or Ctrl-C was pressed."""


def side_by_side(works: Sequence[Callable[[], Any]], stop: threading.Event) -> None:
    """Do the first work in this thread and each other one in a thread of its own.

    Args:
        works: What to do; each raises `Stopped` soon after `stop` is set.
        stop: Set when one of them fails.

    Raises:
        BaseException: What the first of them to fail raised.
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
