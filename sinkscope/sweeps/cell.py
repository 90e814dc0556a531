"""Cells, and the worker that measures them, loading a model once for consecutive cells."""

from __future__ import annotations

import gc
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from sinkscope.capture.scan import scan
from sinkscope.errors import SinkscopeError
from sinkscope.experiments.result import Result
from sinkscope.experiments.resume import Request
from sinkscope.output import counted, listed
from sinkscope.prompts.tokens import Texts
from sinkscope.sweeps.folder import Busy, Folder
from sinkscope.sweeps.grid import SCAN, Case, Model

MEASURED, KEPT, FAILED, BUSY = "measured", "kept", "failed", "busy"


@dataclass(frozen=True)
class Cell:
    """A case with its request and file name.

    Attributes:
        case: What to measure.
        request: What its values depend on.
        name: Name of its files.
    """

    case: Case
    request: Request
    name: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        name: Name of the cell.
        state: "measured", "kept" (it existed already), "failed", or "busy" (another process is
            measuring it).
        reason: Why it failed.
        loaded: Whether a model was loaded for it.
        seconds: Total time that the worker spent on it.
        measuring: The part of it in `load_model`, `scan` or the experiment.
    """

    name: str
    state: str
    reason: str = ""
    loaded: bool = False
    seconds: float = 0.0
    measuring: float = 0.0


@dataclass(frozen=True)
class Run:
    """The outcomes of the cells of one call of `sweep`.

    Attributes:
        outcomes: Outcomes by the cells' names, including cells that existed before.
    """

    outcomes: dict[str, Outcome]

    def count(self, state: str) -> int:
        """Return the number of cells with a state: "measured", "kept" or "failed"."""
        return sum(outcome.state == state for outcome in self.outcomes.values())

    @property
    def loads(self) -> int:
        """Number of times that a model was loaded."""
        return sum(outcome.loaded for outcome in self.outcomes.values())

    @property
    def overhead(self) -> float:
        """Mean time of a measured cell beyond loading and measuring [s]; nan if there is none.

        This is time of the worker: locks, files, hashes.
        """
        spent = [
            outcome.seconds - outcome.measuring
            for outcome in self.outcomes.values()
            if outcome.state == MEASURED
        ]
        return sum(spent) / len(spent) if spent else float("nan")

    def summary(self) -> str:
        """Return counts by state, and why cells failed."""
        parts = [f"{self.count(state)} {state}" for state in (MEASURED, KEPT, FAILED)]
        lines = [f"{listed(parts)}; {counted(self.loads, 'model load')}."]
        reasons: dict[str, int] = {}
        for outcome in self.outcomes.values():
            if outcome.state == FAILED:
                reasons[outcome.reason] = reasons.get(outcome.reason, 0) + 1
        lines += [f"  {counted(count, 'cell')}: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


class Worker:
    """Measures one cell after another; a model stays loaded until a cell of another model.

    Args:
        place: The sweep's folder or URL.
        device: Device of the models; by default a GPU if there is one.
    """

    def __init__(self, place: str, device: str | None = None) -> None:
        self._folder = Folder(place)
        self._device = device
        self._key: str | None = None
        self._model: Any = None
        self._broken: Exception | None = None
        self._texts: dict[str, Texts] = {}

    def measure(self, cell: Cell) -> Outcome:
        """Measure a cell and save it, or record why that failed."""
        begun = time.perf_counter()
        self._loaded, self._measuring = False, 0.0
        reason = ""
        try:
            with self._folder.claimed(cell.name):
                if self._folder.has(cell.name, cell.case.task.experiment):
                    state = KEPT
                else:
                    self._measured(cell)
                    state = MEASURED
        except Busy:
            state = BUSY
        except Exception as error:  # any error of a model or an experiment
            state, reason = FAILED, _sentence(error)
            trace = "" if isinstance(error, SinkscopeError) else traceback.format_exc()
            self._folder.write_failure(cell.name, cell.case.columns, reason, trace)
        seconds = time.perf_counter() - begun
        return Outcome(cell.name, state, reason, self._loaded, seconds, self._measuring)

    def close(self) -> None:
        """Release the model."""
        self._key = self._model = self._broken = None
        self._texts.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measured(self, cell: Cell) -> None:
        case = cell.case
        model = self._bridge(case.model)
        begun = time.perf_counter()
        prompts = self._tokenised(model, cell)
        with case.interventions(model):
            if case.task.experiment == SCAN:
                measured: Any = scan(model, prompts, progress=False, **case.task.options).to("cpu")
            else:
                measured = case.task.function()(model, prompts, **_quietly(case))
        self._measuring += time.perf_counter() - begun
        if case.task.experiment == SCAN:
            self._folder.write_report(cell.name, cell.request, measured, case.columns)
        elif isinstance(measured, Result):
            self._folder.write_result(cell.name, cell.request, measured, case.columns)
        else:
            raise SinkscopeError(
                f"{case.task.experiment} gave a {type(measured).__name__}, which a sweep cannot "
                "keep; call it by itself."
            )

    def _bridge(self, model: Model) -> Any:
        """Load the model unless it is loaded already; one that failed to load is not tried again.

        Raises:
            SinkscopeError: If it cannot be loaded.
        """
        if self._key != model.key:
            self.close()
            begun = time.perf_counter()
            self._key, self._loaded = model.key, True
            try:
                self._model = model.load(self._device)
            except Exception as error:  # from files, memory, or the checkpoint's code
                self._broken = error
            self._measuring += time.perf_counter() - begun
        if self._broken is not None:
            raise self._broken
        return self._model

    def _tokenised(self, model: Any, cell: Cell) -> Texts:
        """Tokenise the prompts, once for all cells of this model on the same text."""
        key = str(cell.request["texts"])
        if key not in self._texts:
            self._texts[key] = cell.case.texts.tokenize(model)
        return self._texts[key]


def _quietly(case: Case) -> dict[str, Any]:
    """Return the experiment's options, with its progress bar disabled."""
    import inspect

    takes = inspect.signature(case.task.function()).parameters
    quiet = {"progress": False} if "progress" in takes else {}
    return {**quiet, **case.task.options}


def _sentence(error: Exception) -> str:
    if isinstance(error, SinkscopeError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
