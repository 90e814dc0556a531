"""`sweep`: measure every combination of models, texts, lengths and interventions that is missing.

1. `plan` names every cell by what its values depend on; no model is loaded.
2. Cells whose files exist are kept. The others are measured in this process, in several, or on a
   Ray cluster (`deal`), and each is written as soon as it is measured.
3. If a cell fails, the reason is recorded in its file and reported at the end, and the others
   continue. The next call tries it again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from sinkscope.devices import chosen_device
from sinkscope.errors import SinkscopeError, SinkscopeWarning
from sinkscope.output import counted, listed, number, table_as_text, wrapped
from sinkscope.sweeps import memory
from sinkscope.sweeps.cell import FAILED, KEPT, Cell, Outcome, Run, Worker
from sinkscope.sweeps.deal import deal, here
from sinkscope.sweeps.fingerprint import Fingerprints, name_of
from sinkscope.sweeps.folder import Folder
from sinkscope.sweeps.grid import Case, combined, interventions_of, models_of, task_of, texts_of
from sinkscope.sweeps.view import Cells
from sinkscope.validation import path, real_number, shown, whole_number


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, and which of them exist.

    Attributes:
        place: Its folder or URL.
        cells: Every cell once, model by model.
        rows: The grid columns of every combination with the name of its cell; equal combinations
            share a cell.
        there: Names of the cells that have been measured.
    """

    place: str
    cells: tuple[Cell, ...]
    rows: tuple[dict[str, Any], ...]
    there: frozenset[str]

    @property
    def missing(self) -> list[Cell]:
        """The missing cells."""
        return [cell for cell in self.cells if cell.name not in self.there]

    @cached_property
    def digest(self) -> str:
        """A hash of the cells and their labels."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        return {
            "place": self.place,
            "cells": [{**row, "there": row["cell"] in self.there} for row in self.rows],
            "memory": [vars(one) for one in self.memory()],
        }

    def memory(self) -> list[memory.Estimate]:
        """Estimate the memory of each model."""
        by_model: dict[str, list[Case]] = {}
        for cell in self.cells:
            by_model.setdefault(cell.case.model.key, []).append(cell.case)
        return [memory.estimate(cases) for cases in by_model.values()]

    def __repr__(self) -> str:
        missing = {cell.name for cell in self.missing}
        counts: dict[str, list[int]] = {}
        for cell in self.cells:
            count = counts.setdefault(cell.case.model.key, [0, 0])
            count[0] += 1
            count[1] += cell.name in missing
        rows = [
            [
                one.model,
                str(cells),
                str(left),
                _gigabytes(one.weights),
                _gigabytes(one.working),
            ]
            for one, (cells, left) in zip(self.memory(), counts.values(), strict=True)
        ]
        columns = ("model", "cells", "missing", "weights [GB]", "working [GB]")
        said = (
            f"{counted(len(self.cells), 'cell')} of {counted(len(counts), 'model')}, "
            f"{len(missing)} missing from {self.place}. A worker needs the weights of one model at "
            "a time, and working memory for one prompt at least; batches take more where there is "
            "more."
        )
        return f"{wrapped(said)}\n{table_as_text(columns, rows)}"


def _gigabytes(size: float | None) -> str:
    return number(None if size is None else size / 1e9)


def sweep(
    models: Any,
    texts: Any = "prose",
    lengths: int | Iterable[int] | None = None,
    metrics: str | Iterable[str] = "core",
    interventions: Any = None,
    out: str | Path = "sweep",
    *,
    prompts: int | None = None,
    experiment: Any = None,
    sinks: Iterable[int] | Literal["auto"] = (0,),
    epsilon: float = 0.3,
    attention: str = "auto",
    batch: int | Literal["auto"] = "auto",
    device: str | None = None,
    dtype: str | None = None,
    workers: int = 0,
    ray: str | bool | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    progress: bool = True,
) -> Cells:
    """Measure a grid: every model on every text at every length under every intervention.

    Args:
        models: One, a list, or a mapping from label to model. A model is what `load_model` takes, a
            snapshot of the toy model (``step-000500.safetensors``), a pattern such as
            "runs/checkpoint-*", or a mapping such as ``{"model": "EleutherAI/pythia-70m",
            "checkpoint": [0, 1000], "dtype": "bfloat16"}``.
        texts: One source, a list, or a mapping from label to source. A source is what `scan` takes,
            or a mapping of the arguments of `texts`: ``{"source": "code", "bos": "never"}``.
        lengths: Tokens of each prompt; None for each source's own.
        metrics: See `scan`; by default those of "core".
        interventions: A list; each "none", a name in `sinkscope.interventions`, a mapping such as
            ``{"ZeroValue": {"positions": 0}}``, or a list of these to combine.
        out: A folder, which may hold other sweeps, or a URL that fsspec supports ("s3://…").
        prompts: Default number of prompts of sources.
        experiment: Instead of scans: a name such as "trace_peak" or "ablation.ablate_heads", or a
            mapping of "name" and the experiment's options. Each cell calls it with a model and
            texts.
        sinks: See `scan`.
        epsilon: See `scan`.
        attention: See `scan`.
        batch: See `scan`.
        device: Device of the models; by default a GPU if there is one.
        dtype: Default dtype of the models; by default float32.
        workers: Number of processes; 0 measures in this one. GPUs are assigned in turn. On Ray,
            number of actors; 0 for as many as fit in the cluster.
        ray: A Ray cluster's address, "auto" for the one that this machine belongs to, or "local" or
            True to start one on this machine for this call. Needs the extra "cluster".
        num_gpus: On Ray, GPUs of each worker, a fraction of one or several (with the models'
            device_map: auto).
        num_cpus: On Ray, CPUs of each worker; 1 by default.
        progress: Whether to draw a bar over the cells.

    Returns:
        All cells of this grid, as from `open_sweep`; `run` counts the measured, kept and failed
        cells and the model loads.

    Raises:
        SinkscopeError: If an argument cannot be understood, or a model in memory is to be measured
            elsewhere.
        ReportError: If the folder cannot be used.

    Example:
        >>> found = sweep("smollm2-135m", ["prose", "code"], [64, 128])       # doctest: +SKIP
        >>> found.to_frame("sink_attention")                                  # doctest: +SKIP
    """
    workers = whole_number("workers", workers, at_least=0)
    if num_gpus is not None:
        num_gpus = real_number("num_gpus", num_gpus, at_least=0)
    if not ray:
        chosen_device(device)
    elif not isinstance(ray, str | bool):
        raise SinkscopeError(f"ray is {shown(ray)}; expected local, auto, or a cluster's address.")
    made = plan(
        models, texts, lengths, metrics, interventions, out,
        prompts=prompts, experiment=experiment, sinks=sinks, epsilon=epsilon, attention=attention,
        batch=batch, dtype=dtype,
    )  # fmt: skip
    missing = made.missing
    if (workers or ray) and missing:
        _refuse_what_stays_here(missing)
    folder = Folder(out)
    folder.write_plan(made.digest, list(made.rows))
    outcomes = {name: Outcome(name, KEPT) for name in made.there}
    if ray and missing:
        from sinkscope.sweeps.on_ray import on_ray

        address = None if ray is True or ray == "local" else str(ray)
        result = on_ray(missing, folder, address, workers, device, num_gpus, num_cpus)
    elif workers and missing:
        from sinkscope.sweeps.processes import Processes

        pool = Processes(_absolute(folder), workers, device)
        result = deal(missing, pool, workers)
    else:
        result = here(missing, Worker(_absolute(folder), device))
    for outcome in _with_bar(result, len(made.cells), len(made.there), progress):
        outcomes[outcome.name] = outcome
    run = Run(outcomes)
    if failed := run.count(FAILED):
        warnings.warn(
            f"{counted(failed, 'cell')} of {len(made.cells)} failed; .run.summary() says why, and "
            "the same call tries them again.",
            SinkscopeWarning,
            stacklevel=2,
        )
    return replace(Cells.of(folder, list(made.rows)), run=run)


def plan(
    models: Any,
    texts: Any = "prose",
    lengths: Any = None,
    metrics: Any = "core",
    interventions: Any = None,
    out: str | Path = "sweep",
    *,
    prompts: int | None = None,
    experiment: Any = None,
    sinks: Any = (0,),
    epsilon: float = 0.3,
    attention: str = "auto",
    batch: Any = "auto",
    dtype: str | None = None,
) -> Plan:
    """Plan a sweep without measuring any cell.

    Args:
        models: See `sweep`.
        texts: See `sweep`.
        lengths: See `sweep`.
        metrics: See `sweep`.
        interventions: See `sweep`.
        out: See `sweep`.
        prompts: See `sweep`.
        experiment: See `sweep`.
        sinks: See `sweep`.
        epsilon: See `sweep`.
        attention: See `sweep`.
        batch: See `sweep`.
        dtype: See `sweep`.

    Returns:
        The plan, with the memory of each model.
    """
    path("out", out)
    task = task_of(experiment, metrics, sinks, epsilon, attention, batch)
    cases = combined(
        models_of(models, dtype=dtype),
        texts_of(texts, lengths, prompts),
        interventions_of(interventions),
        task,
    )
    prints = Fingerprints(str(out))
    cells: dict[str, Cell] = {}
    rows = []
    for case in cases:
        request = prints.request(case)
        name = name_of(request)
        cells.setdefault(name, Cell(case, request, name))
        rows.append({**case.columns, "cell": name})
    prints.save()
    files = Folder(out).names()
    folder = Folder(out)
    there = {name for name in cells if folder.has(name, task.experiment, files)}
    return Plan(str(out), tuple(cells.values()), tuple(rows), frozenset(there))


def _absolute(folder: Folder) -> str:
    """Return the folder's absolute name, for a process in another working directory."""
    return folder.place if "://" in folder.place else str(folder.path)


def _with_bar(
    outcomes: Iterator[Outcome], cells: int, done: int, progress: bool
) -> Iterator[Outcome]:
    """Yield the outcomes, with one progress bar over all cells."""
    failed = 0
    with tqdm(total=cells, initial=done, unit="cell", disable=not progress, leave=False) as bar:
        for outcome in outcomes:
            failed += outcome.state == FAILED
            if failed:
                bar.set_postfix_str(f"{failed} failed")
            bar.update()
            yield outcome


def _refuse_what_stays_here(cells: Sequence[Cell]) -> None:
    """Refuse cells that other processes cannot measure.

    Raises:
        SinkscopeError: If a model is in memory, or a metric is user-defined.
    """
    for cell in cells:
        if cell.case.model.in_memory:
            raise SinkscopeError(
                f"{cell.case.model.label} is in memory, where other processes cannot reach it; "
                "save it and name the folder, or measure in this process (workers=0)."
            )
        if own := cell.request["task"].get("own"):
            raise SinkscopeError(
                f"The metric {listed(sorted(own))} is user-defined and not known in other "
                f"processes; measure in this process (workers=0)."
            )
