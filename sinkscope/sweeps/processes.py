"""Workers as processes on this machine.

Each is a separate Python (`python -m sinkscope.sweeps.processes`), which reads pickled cells from
standard input and writes outcomes to standard output. Unlike with multiprocessing, it does not run
the caller's script again. It ends when its input does, so that after a sweep is killed a worker
finishes at most its current cell.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from sinkscope.sweeps.cell import FAILED, Cell, Outcome
from sinkscope.sweeps.deal import Lost


class Processes:
    """A pool of processes.

    Args:
        place: The sweep's folder or URL.
        workers: Number of processes; they share the cores, and get the GPUs in turn.
        device: Device of the models; by default a GPU if there is one.
    """

    def __init__(self, place: str, workers: int, device: str | None = None) -> None:
        self._arguments = place, device
        self._workers = workers
        self._gpus = _visible_gpus() if device in (None, "cuda") else []
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._place: dict[int, int] = {}
        self._started = 0
        self._answers: queue.Queue[tuple[int, Outcome | Lost]] = queue.Queue()

    def start(self) -> int:
        """Start a process."""
        self._started += 1
        worker = self._started
        taken = set(self._place.values())
        self._place[worker] = next(n for n in range(self._workers + 1) if n not in taken)
        process = subprocess.Popen(
            [sys.executable, "-m", "sinkscope.sweeps.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(self._place[worker]),
        )
        self._running[worker] = process
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()
        self._send(process, self._arguments)
        return worker

    def submit(self, worker: int, cell: Cell) -> None:
        """Send a cell to a process."""
        self._send(self._running[worker], cell)

    def wait(self, seconds: float | None) -> Iterator[tuple[int, Outcome | Lost]]:
        """Yield the available answers."""
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return
        while True:
            if answer[0] in self._running:
                if isinstance(answer[1], Lost):
                    self._end(answer[0])
                yield answer
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._running):
            self._end(worker)

    def _end(self, worker: int) -> None:
        process = self._running.pop(worker)
        self._place.pop(worker)
        process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it cannot be sent any more
            process.stdin.close()

    def _environment(self, place: int) -> dict[str, str]:
        chosen = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if "OMP_NUM_THREADS" not in os.environ:
            chosen["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._workers))
        if self._gpus:
            chosen["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        return os.environ | chosen

    @staticmethod
    def _send(process: subprocess.Popen[bytes], value: Any) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(value, process.stdin)
            process.stdin.flush()
        except (BrokenPipeError, OSError):  # it has ended, which `_listen` reports
            return

    def _listen(self, worker: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while True:
            try:
                answer = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError, OSError, ValueError):
                code = process.wait()
                process.stdout.close()
                self._answers.put((worker, Lost(f"the last one with exit code {code}")))
                return
            self._answers.put((worker, answer))


def _visible_gpus() -> list[str]:
    """Return the names in CUDA_VISIBLE_DEVICES of the GPUs of this process."""
    import torch

    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def _serve(cells: IO[bytes], outcomes: IO[bytes]) -> None:
    """Run a worker process."""
    from sinkscope.sweeps.cell import Worker

    worker = Worker(*pickle.load(cells))
    while True:
        try:
            cell = pickle.load(cells)
        except EOFError:
            return
        try:
            outcome = worker.measure(cell)
        except Exception as error:  # the folder is not writable
            outcome = Outcome(cell.name, FAILED, str(error))
        pickle.dump(outcome, outcomes)
        outcomes.flush()


if __name__ == "__main__":
    # Output of libraries goes to standard error.
    kept = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, kept)
