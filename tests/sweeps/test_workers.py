"""Workers in other processes: the same numbers, and nothing lost with a worker that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import sinkscope as ss
from sinkscope.sweeps import processes
from sinkscope.sweeps.run import plan


def equal_to_single_scans(found, folders: list[Path]) -> None:
    by_step = {int(folder.name.removeprefix("step-")): folder for folder in folders}
    for columns, report in found.reports():
        texts = ss.texts(columns["texts"], prompts=2, length=columns["length"])
        model = by_step[columns["checkpoint"]]
        assert report.equals(ss.scan(model, texts, metrics="core", progress=False))


@pytest.mark.slow
def test_a_killed_worker_is_replaced(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list = []

    class Watched(processes.Processes):
        def start(self) -> int:
            worker = super().start()
            started.append(self._running[worker])
            return worker

    monkeypatch.setattr(processes, "Processes", Watched)

    def kill() -> None:  # once it has begun
        while not list(tmp_path.glob("*.nc")):
            time.sleep(0.05)
        os.kill(started[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    asked = dict(texts=["prose", "code"], lengths=[12, 16], prompts=2, out=tmp_path)
    found = ss.sweep(str(checkpoints / "step-*"), **asked, workers=1, progress=False)
    assert found.run.count("measured") == len(found) == 8 and len(started) == 2
    equal_to_single_scans(found, sorted(checkpoints.iterdir()))
    assert all(process.poll() is not None for process in started)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_on_ray(checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    asked = dict(texts=["prose", "code"], lengths=[12, 16], prompts=2, out=tmp_path)
    found = ss.sweep(
        str(checkpoints / "step-*"), **asked, workers=2, ray="local", num_cpus=0.5, progress=False
    )
    assert found.run.count("measured") == len(found) == 8 and 2 <= found.run.loads <= 4
    equal_to_single_scans(found, sorted(checkpoints.iterdir()))
    assert not plan(str(checkpoints / "step-*"), **asked).missing
