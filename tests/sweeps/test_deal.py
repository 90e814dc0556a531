"""Who measures which cell: as few loads as can be, and nothing lost with a worker."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

import sinkscope as ss
from sinkscope.sweeps.cell import Cell, Outcome
from sinkscope.sweeps.deal import Lost, deal
from sinkscope.sweeps.grid import Case, Model, Task


def cells(models: int, each: int) -> list[Cell]:
    task, texts = Task("scan", {}), ss.random_tokens(1, 4)
    return [
        Cell(Case(Model(str(model), None, str(model)), "", texts, (), task), {}, f"{model}-{one}")
        for model in range(models)
        for one in range(each)
    ]


class Fake:
    """Workers that answer in a random order, and sometimes are lost or find a cell busy."""

    def __init__(self, seed: int = 0, lost: float = 0.0, busy: tuple[str, ...] = ()) -> None:
        self.random, self.lost, self.busy = random.Random(seed), lost, set(busy)
        self.now: dict = {}
        self.held: dict = {}
        self.loads: dict = defaultdict(int)
        self.measured: list[str] = []
        self.started, self.closed = 0, False

    def start(self):
        self.started += 1
        return self.started

    def submit(self, worker, cell) -> None:
        assert worker not in self.now
        if self.held.get(worker) != cell.case.model.key:
            self.loads[cell.case.model.key] += 1
        self.held[worker] = cell.case.model.key
        self.now[worker] = cell

    def wait(self, seconds):
        if not self.now:
            return
        worker = self.random.choice(sorted(self.now))
        cell = self.now.pop(worker)
        if cell.name in self.busy:
            self.busy.remove(cell.name)
            yield worker, Outcome(cell.name, "busy")
        elif self.random.random() < self.lost:
            yield worker, Lost("killed")
        else:
            self.measured.append(cell.name)
            yield worker, Outcome(cell.name, "measured")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("models", "each", "workers"), [(1, 9, 3), (5, 8, 2), (3, 4, 3), (7, 1, 4)]
)
def test_loads_are_at_most_workers_times_models(models: int, each: int, workers: int) -> None:
    for seed in range(20):
        pool, asked = Fake(seed), cells(models, each)
        names = [outcome.name for outcome in deal(asked, pool, workers)]
        assert sorted(names) == sorted(cell.name for cell in asked) == sorted(pool.measured)
        assert sum(pool.loads.values()) <= workers * models and pool.started <= workers
        assert pool.closed
        if models >= workers * 2:  # nobody helps while there is a model that nobody holds
            assert sum(pool.loads.values()) <= models + workers


def test_a_cell_of_a_lost_worker_is_measured_by_another() -> None:
    for seed in range(20):
        pool, asked = Fake(seed, lost=0.2), cells(4, 6)
        outcomes = list(deal(asked, pool, 3))
        assert sorted(one.name for one in outcomes) == sorted(cell.name for cell in asked)
        assert len(set(pool.measured)) == len(pool.measured)
        assert all(one.state == "measured" or "3 workers ended" in one.reason for one in outcomes)


def test_a_cell_that_kills_its_worker_fails_after_three() -> None:
    pool = Fake(lost=1.0)
    (outcome,) = deal(cells(1, 1), pool, 2)
    assert outcome.state == "failed" and "killed" in outcome.reason and pool.started == 3


def test_a_busy_cell_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkscope.sweeps.deal._AGAIN", 0.0)
    pool = Fake(busy=("0-0", "1-1"))
    assert len(list(deal(cells(2, 2), pool, 2))) == 4 and len(pool.measured) == 4
