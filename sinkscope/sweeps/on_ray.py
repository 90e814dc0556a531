"""Workers as actors on a Ray cluster.

An actor keeps the model of its last cell, like a worker process. Ray places it where GPUs and CPUs
are free; a lost actor is replaced by `deal`. The folder has to be shared by all machines, or be an
object store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.sweeps.cell import FAILED, MEASURED, Cell, Outcome, Worker
from sinkscope.sweeps.deal import Lost, deal
from sinkscope.sweeps.folder import Folder


def on_ray(
    cells: Sequence[Cell],
    folder: Folder,
    address: str | None,
    workers: int,
    device: str | None,
    num_gpus: float | None,
    num_cpus: float | None,
) -> Iterator[Outcome]:
    """Measure cells on Ray.

    Args:
        cells: The missing cells.
        folder: The sweep's folder.
        address: Address of the cluster; None starts a local one, which ends with the sweep.
        workers: Number of actors; 0 for as many as fit.
        device: Device of the models.
        num_gpus: GPUs of each actor.
        num_cpus: CPUs of each actor.

    Raises:
        SinkscopeError: If Ray is not installed, or the cluster cannot be reached or is lost.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise SinkscopeError(
            'Sweeps on Ray need the extra "cluster": pip install "sinkscope[cluster]".'
        ) from error
    ours = not ray.is_initialized()
    try:
        if ours:
            alone = {"include_dashboard": False} if address is None else {}
            try:
                ray.init(address=address, logging_level=logging.ERROR, **alone)
            except ValueError as error:
                raise SinkscopeError(
                    f"{address} is no address of a Ray cluster; expected local, auto, or one such "
                    "as ray://host:10001."
                ) from error
        share = {"num_cpus": 1 if num_cpus is None else num_cpus, "num_gpus": num_gpus or 0}
        pool = Actors(_place(folder), device, share)
        for outcome in deal(cells, pool, workers or _room(ray.cluster_resources(), share)):
            yield _seen(outcome, cells, folder)
    except (ConnectionError, ray.exceptions.RaySystemError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SinkscopeError(
            f"The Ray cluster cannot be reached, or was lost ({reason}); what was measured is "
            f"saved, and the same call continues with the rest."
        ) from error
    finally:
        if ours:
            ray.shutdown()


class Actors:
    """A pool of Ray actors.

    Args:
        place: The sweep's folder or URL.
        device: Device of the models.
        share: What Ray reserves for each: num_cpus and num_gpus.
    """

    def __init__(self, place: str, device: str | None, share: dict[str, float]) -> None:
        import ray  # pyright: ignore[reportMissingImports]  # an extra

        self._ray = ray
        self._arguments = place, device
        self._kind = ray.remote(max_restarts=0, max_task_retries=0, **share)(Worker)
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}
        self._started = 0

    def start(self) -> int:
        """Start an actor."""
        self._started += 1
        self._actors[self._started] = self._kind.remote(*self._arguments)
        return self._started

    def submit(self, worker: int, cell: Cell) -> None:
        """Send a cell to an actor."""
        self._asked[self._actors[worker].measure.remote(cell)] = worker

    def wait(self, seconds: float | None) -> Iterator[tuple[int, Outcome | Lost]]:
        """Yield the available answers."""
        ready, _ = self._ray.wait(list(self._asked), timeout=seconds)
        for answer in ready:
            worker = self._asked.pop(answer)
            try:
                yield worker, self._ray.get(answer)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError):
                self._actors.pop(worker)
                yield worker, Lost("Ray lost the last one: killed, out of memory, or its machine")

    def close(self) -> None:
        """End all actors."""
        if self._ray.is_initialized():
            for actor in self._actors.values():
                self._ray.kill(actor)


def _place(folder: Folder) -> str:
    return folder.place if "://" in folder.place else str(folder.path)


def _room(there: dict[str, float], share: dict[str, float]) -> int:
    """Return the number of actors that fit in the cluster."""
    rooms = [
        there.get(kind, 0) / share[requested]
        for kind, requested in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
        if share[requested]
    ]
    if (room := int(min(rooms, default=1))) < 1:
        raise SinkscopeError(
            f"A worker needs {share['num_cpus']:g} CPUs and {share['num_gpus']:g} GPUs, and the "
            f"cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; ask for less."
        )
    return room


def _seen(outcome: Outcome, cells: Sequence[Cell], folder: Folder) -> Outcome:
    """Return the outcome; failed if the worker wrote to a folder not accessible here."""
    experiment = cells[0].case.task.experiment
    if outcome.state != MEASURED or folder.has(outcome.name, experiment):
        return outcome
    reason = (
        f"it was measured on another machine, whose {folder.place} is not the one here; name a"
        f" folder that all machines share, or a URL that fsspec supports"
    )
    return replace(outcome, state=FAILED, reason=reason)
