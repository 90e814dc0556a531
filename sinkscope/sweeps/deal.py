"""Assign cells to workers so that each model is loaded at most once per worker.

1. An idle worker gets the next cell of its loaded model.
2. If there is none left, it gets a cell of a model that no worker has loaded, the one with most
   cells first; then one of a model of other workers, if more cells of it are left than workers have
   it.
3. A worker that is lost (killed, out of memory) is replaced, and its cell is assigned again, three
   times at most. A cell that another sweep is measuring is tried again a second later.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sinkscope.sweeps.cell import BUSY, FAILED, Cell, Outcome, Worker

_ATTEMPTS = 3
_AGAIN = 1.0  # seconds until a cell that another sweep measures is tried again


@dataclass(frozen=True)
class Lost:
    """A worker that ended before it answered.

    Attributes:
        reason: Why, as far as known.
    """

    reason: str


@runtime_checkable
class Pool(Protocol):
    """Protocol of a pool of workers."""

    def start(self) -> Hashable:
        """Start a worker and return its name."""
        ...

    def submit(self, worker: Hashable, cell: Cell) -> None:
        """Send a cell to an idle worker."""
        ...

    def wait(self, seconds: float | None) -> Iterator[tuple[Hashable, Outcome | Lost]]:
        """Yield the available answers; at least one, unless the time is over."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def here(cells: Sequence[Cell], worker: Worker) -> Iterator[Outcome]:
    """Measure cells in this process, model by model."""
    hands = Hands(cells)
    while (cell := hands.next("here")) is not None or hands.waiting():
        if cell is None:
            time.sleep(_AGAIN)
            continue
        outcome = worker.measure(cell)
        if outcome.state == BUSY:
            hands.later(cell)
            continue
        yield outcome
    worker.close()


def deal(cells: Sequence[Cell], pool: Pool, workers: int) -> Iterator[Outcome]:
    """Measure cells on the workers of a pool."""
    hands, attempts = Hands(cells), Counter[str]()
    busy: dict[Hashable, Cell] = {}
    idle: list[Hashable] = []
    try:
        while True:
            while len(idle) + len(busy) < min(workers, hands.left + len(busy)):
                idle.append(pool.start())
            for worker in list(idle):
                if (cell := hands.next(worker)) is not None:
                    idle.remove(worker)
                    busy[worker] = cell
                    pool.submit(worker, cell)
            if not busy and not hands.waiting():
                return
            for worker, answer in pool.wait(_AGAIN if hands.waiting() else None):
                cell = busy.pop(worker)
                if isinstance(answer, Lost):
                    hands.forget(worker)
                    attempts[cell.name] += 1
                    if attempts[cell.name] < _ATTEMPTS:
                        hands.again(cell)
                    else:
                        reason = (
                            f"{_ATTEMPTS} workers ended while they measured it; {answer.reason}"
                        )
                        yield Outcome(cell.name, FAILED, reason)
                    continue
                idle.append(worker)
                if answer.state == BUSY:
                    hands.later(cell)
                else:
                    yield answer
    finally:
        pool.close()


class Hands:
    """Tracks which cells are left, by model, and which worker has loaded which model."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._left: dict[str, deque[Cell]] = {}
        for cell in cells:
            self._left.setdefault(cell.case.model.key, deque()).append(cell)
        self._held: dict[Hashable, str] = {}
        self._later: deque[tuple[float, Cell]] = deque()

    @property
    def left(self) -> int:
        """Number of cells to assign, including those to assign again."""
        return sum(map(len, self._left.values())) + len(self._later)

    def next(self, worker: Hashable) -> Cell | None:
        """Return the cell that an idle worker should measure; None if there is none at present."""
        while self._later and self._later[0][0] <= time.monotonic():
            self.again(self._later.popleft()[1])
        key = self._chosen(worker)
        if key is None:
            return None
        self._held[worker] = key
        return self._left[key].popleft()

    def again(self, cell: Cell) -> None:
        """Assign a cell again."""
        self._left.setdefault(cell.case.model.key, deque()).append(cell)

    def later(self, cell: Cell) -> None:
        """Assign a cell again after a second."""
        self._later.append((time.monotonic() + _AGAIN, cell))

    def waiting(self) -> bool:
        """Whether cells are left that become available later."""
        return bool(self._later)

    def forget(self, worker: Hashable) -> None:
        """Remove a lost worker with its loaded model."""
        self._held.pop(worker, None)

    def _chosen(self, worker: Hashable) -> str | None:
        mine = self._held.get(worker)
        if mine is not None and self._left.get(mine):
            return mine
        holders = Counter(key for other, key in self._held.items() if other != worker)
        open_ = [
            key for key, cells in self._left.items() if cells and len(cells) > holders[key] - 1
        ]
        return min(open_, key=lambda key: (holders[key] > 0, -len(self._left[key])), default=None)
