"""Measure sinks during training: `Monitor` for a training loop, `SinkCallback` for a trainer.

1. The texts are tokenised once, when the monitor is made.
2. `Monitor.log(step)` scans the model in its current state: in evaluation mode, without gradients
   and outside autocast, through a copy of its modules that shares the weights. Afterwards modes,
   hooks, gradients and the states of all random generators are restored.
3. Each report is a cell of the folder, with the step as its checkpoint: `open_sweep` reads them.

A scan of n prompts costs about one forward pass over them, and the first one a few more, which
verify the copy; for n far below the training batch times `every` this is negligible.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from sinkscope.capture.scan import checked, scan
from sinkscope.errors import SinkscopeError, SinkscopeWarning, UnsupportedError
from sinkscope.models.load import load_model, unwrapped
from sinkscope.models.probe import input_device
from sinkscope.prompts.texts import as_texts
from sinkscope.report.key_numbers import key_numbers
from sinkscope.report.report import SinkReport
from sinkscope.sweeps.fingerprint import name_of
from sinkscope.sweeps.folder import Folder
from sinkscope.sweeps.grid import SCAN
from sinkscope.validation import whole_number

if TYPE_CHECKING:
    from sinkscope.experiments.dynamics import Dynamics

LOGGED = ("sink_rate", "sink_attention", "sink_head_share", "residual_peak", "value_drain")
"""The values in a trainer's log, each prefixed with "sink/"."""


class Monitor:
    """Measures a model on a few fixed texts whenever `log` is called.

    Args:
        model: A transformers model, or a wrapper of one: `DistributedDataParallel`, a compiled
            model, a `PeftModel`. Its training is not affected.
        texts: What `scan` takes; a few short prompts are enough to follow a sink.
        metrics: See `scan`.
        sinks: See `scan`.
        epsilon: See `scan`.
        out: A folder for the reports, as in `sweep`; None keeps them in memory only.
        name: The model's name in the grid.
        tokenizer: The tokenizer, for texts that are not token ids.

    Attributes:
        reports: Reports by step.

    Raises:
        UnsupportedError: If the model's weights are sharded over processes (FSDP, DeepSpeed
            ZeRO-3), so that no process can run it alone.

    Example:
        >>> monitor = Monitor(model, texts("prose", prompts=4, length=64))    # doctest: +SKIP
        >>> for step, batch in enumerate(batches):                          # doctest: +SKIP
        ...     if step % 500 == 0:
        ...         monitor.log(step)
    """

    def __init__(
        self,
        model: nn.Module,
        texts: Any,
        *,
        metrics: Any = "core",
        sinks: Any = (0,),
        epsilon: float = 0.3,
        out: str | Path | None = None,
        name: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        refuse_sharded(model)
        self._model = unwrapped(model, None)[0]
        self._name = name or type(self._model).__name__
        self._folder = None if out is None else Folder(out)
        metrics, sinks, epsilon, _ = checked(metrics, sinks, epsilon, "auto", "auto")
        self._settings = dict(metrics=metrics, sinks=sinks, epsilon=epsilon)
        self._tokenizer = tokenizer
        self.reports: dict[int, SinkReport] = {}
        with _unchanged(self._model):
            self._texts = as_texts(texts).tokenize(self._bridge())

    def log(self, step: int) -> dict[str, float]:
        """Measure the model in its current state.

        Args:
            step: The training step, under which the report is saved, replacing an earlier one of
                the same step.

        Returns:
            The defined values of `LOGGED`, prefixed with "sink/".

        Raises:
            ModelError: If the model's weights or residual states are nan or infinite.
        """
        step = whole_number("step", step, at_least=0)
        with _unchanged(self._model):
            report = scan(self._bridge(), self._texts, progress=False, **self._settings).to("cpu")
        self.reports[step] = report
        if self._folder is not None:
            self._keep(step, report)
        numbers = key_numbers(report)
        return {f"sink/{name}": numbers[name] for name in LOGGED if numbers[name] is not None}

    def dynamics(self, sink_threshold: float = 0.5) -> Dynamics:
        """Return the curves logged so far; see `experiments.dynamics`.

        Args:
            sink_threshold: Mean sink attention above which a head counts as dormant.
        """
        from sinkscope.experiments.dynamics import Dynamics

        if not self.reports:
            raise SinkscopeError("Nothing was logged yet; call log(step) first.")
        about = f"{self._name} · T = {self._texts.tokens.shape[1]:,} · {self._texts.source}"
        reports = dict(sorted(self.reports.items()))
        return Dynamics(about=about, reports=reports, loss={}, sink_threshold=sink_threshold)

    def _bridge(self) -> Any:
        if self._tokenizer is None:
            return load_model(self._model)
        return load_model(self._model, tokenizer=self._tokenizer)

    def _keep(self, step: int, report: SinkReport) -> None:
        assert self._folder is not None
        columns = {
            "model": self._name,
            "checkpoint": step,
            "texts": self._texts.source,
            "length": self._texts.tokens.shape[1],
            "intervention": "none",
            "experiment": SCAN,
        }
        request = {"monitor": columns, "settings": report.settings.to_dict()}
        self._folder.write_report(name_of({"monitor": columns}), request, report, columns)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore modes and random generators afterwards."""
    modes = {module: module.training for module in model.modules()}
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    device = input_device(model).type
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        for module, training in modes.items():
            module.training = training


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which this process has only a part of the weights.

    Raises:
        UnsupportedError: If its weights are sharded.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    sharded = "FSDP" if kinds & {"FullyShardedDataParallel", "FSDPModule"} else ""
    for parameter in model.parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            sharded = sharded or "DTensor"
        if hasattr(parameter, "ds_id"):
            sharded = sharded or "DeepSpeed ZeRO-3"
    if sharded:
        raise UnsupportedError(
            f"The weights of this model are sharded over processes ({sharded}), so that no process "
            "can run it alone; save checkpoints and measure them with sinkscope sweep or dynamics."
        )


class SinkCallback(TrainerCallback):
    """Measures sinks every few steps of a transformers or Lightning `Trainer`.

    The process of rank 0 measures; the others go on to the next step, where they wait for it in the
    first reduction of gradients, and no collective operations are called meanwhile. Give the
    process group a timeout longer than a measurement.

    Args:
        texts: What `scan` takes; a few short prompts.
        every: Steps between two measurements; the first is made before training.
        trainer: The transformers `Trainer`, so that the values go to everything it logs to
            (TensorBoard, Weights & Biases, the console), since callbacks have no access to it.
            Without it they go to ``state.log_history`` and to `out`. Not needed with Lightning.
        out: See `Monitor`.
        **options: Passed on to `Monitor`: metrics, sinks, epsilon, name, tokenizer.

    Attributes:
        monitor: The `Monitor`, once training has begun; None on other ranks.

    Raises:
        UnsupportedError: When training begins, if the model's weights are sharded.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data)                # doctest: +SKIP
        >>> callback = SinkCallback("prose", every=500, trainer=trainer)      # doctest: +SKIP
        >>> trainer.add_callback(callback)                                    # doctest: +SKIP
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Also make it a Lightning callback if that was imported, for its trainer's check."""
        base = _lightning_callback()
        return super().__new__(cls if base is None or issubclass(cls, base) else _both(cls, base))

    def __init__(
        self,
        texts: Any,
        every: int = 500,
        *,
        trainer: Any = None,
        out: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._texts, self._trainer = texts, trainer
        self.every = whole_number("every", every, at_least=1)
        self._options = {"out": out, **options}
        self.monitor: Monitor | None = None
        self._last: int | None = None

    # transformers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the model before the first step, or when training is resumed."""
        refuse_sharded(kwargs["model"])
        if not state.is_world_process_zero:
            return
        tokenizer = self._options.pop("tokenizer", None) or kwargs.get("processing_class")
        self.monitor = Monitor(kwargs["model"], self._texts, tokenizer=tokenizer, **self._options)
        if self._trainer is None and _reports_to(args):
            warnings.warn(
                "The sinks are logged to state.log_history alone; pass SinkCallback(trainer=…) so "
                f"that {', '.join(_reports_to(args))} gets them too.",
                SinkscopeWarning,
                stacklevel=2,
            )
        self._transformers(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after every few steps."""
        if state.global_step % self.every == 0:
            self._transformers(state, control)

    def _transformers(self, state: Any, control: Any) -> None:
        if self.monitor is None or state.global_step == self._last:
            return
        self._last = state.global_step
        numbers = self.monitor.log(state.global_step)
        if self._trainer is None:
            state.log_history.append({**numbers, "step": state.global_step})
            return
        due = control.should_log  # which any logging resets
        self._trainer.log(numbers)
        control.should_log = self._trainer.control.should_log = due

    # PyTorch Lightning

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure the model before the first step."""
        refuse_sharded(pl_module)
        if trainer.is_global_zero:
            model = _transformers_model(pl_module)
            self.monitor = Monitor(model, self._texts, **self._options)
            self._lightning(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any, **kwargs: Any) -> None:
        """Measure after every few steps."""
        if trainer.global_step % self.every == 0:
            self._lightning(trainer)

    def _lightning(self, trainer: Any) -> None:
        if self.monitor is None or trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        numbers = self.monitor.log(trainer.global_step)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; both trainers call it, with different arguments."""


def _reports_to(args: Any) -> list[str]:
    named = args.report_to
    return [one for one in ([named] if isinstance(named, str) else named) if one != "none"]


def _lightning_callback() -> type | None:
    """Return Lightning's class of callbacks, if Lightning was imported."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return sys.modules[name].Callback
    return None


@cache
def _both(cls: type, base: type) -> type:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _transformers_model(module: nn.Module) -> nn.Module:
    """Return the outermost transformers model in a Lightning module."""
    for inside in module.modules():
        if isinstance(inside, PreTrainedModel):
            return inside
    raise UnsupportedError(
        f"{type(module).__name__} has no transformers model, which sinkscope needs."
    )
