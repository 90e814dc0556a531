"""Sinks, drains, peaks and dormancy over training: one scan a checkpoint, one table for all.

Guo et al. (2410.13835) follow OLMo-7B over 31 revisions. Here a checkpoint is whatever can become a
model: a training step that TransformerLens knows, a Hub revision, a folder such as
``checkpoint-500``, a model, or a function that makes one. Each is loaded, scanned and let go before
the next; its report is kept, so that an interrupted run continues and later checkpoints can be
added.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from sinkscope.capabilities import Capabilities, capabilities
from sinkscope.errors import ModelError, ReportError, UnsupportedError
from sinkscope.experiments import _partial
from sinkscope.experiments._checkpoints import (
    by_step,
    is_snapshot,
    laboratory_model,
    usual_texts,
)
from sinkscope.experiments._dynamics import Dynamics
from sinkscope.experiments._dynamics_asked import asked_of
from sinkscope.experiments._losses import PromptLosses
from sinkscope.experiments._partway import Partway, with_predictions
from sinkscope.models import load_model
from sinkscope.report import SinkReport, load_report
from sinkscope.scan import scan
from sinkscope.texts import Texts, as_texts

__all__ = ["Dynamics", "dynamics"]

METRICS = ("sink_attention", "values", "head_outputs", "residual", "entropy", "received")
"""Of these, `entropy` is left out where attention is no softmax."""


def dynamics(
    model: str | Path | None,
    checkpoints: Mapping[int, Any] | Iterable[Any],
    texts: Any = None,
    *,
    parked: float = 0.5,
    sinks: Any = (0,),
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Dynamics:
    """Scan every checkpoint of a model on the same texts.

    Args:
        model: The Hub model that steps and revisions are of; None if each checkpoint says itself
            what it is.
        checkpoints: Each a training step that TransformerLens knows for this model (an int); a Hub
            revision whose last number is the step, such as "step1000"; a folder likewise, such as
            "runs/checkpoint-500"; a snapshot of the Bigram-Backcopy laboratory, such as
            "runs/step-001000.safetensors"; or, in a mapping from step, any of these, anything that
            `load_model` takes, or a function without arguments that gives such a thing.
        texts: Prompts; by default 16 of prose, 256 tokens each, and for laboratory snapshots 16 of
            their own task, as long as their context. They are tokenised by the first checkpoint,
            and all get the same tokens.
        parked: Mean sink attention above which a head counts as dormant [probability].
        sinks: See `scan`.
        out: A folder that keeps each checkpoint's report, and where an interrupted run continues.
            A checkpoint in a file is known by path, size and time; one that a function gives is
            known by its step alone.
        progress: Whether to draw a progress bar.
        **options: Passed on to `load_model`: device, dtype, ….

    Raises:
        ModelError: If a checkpoint's step cannot be told, two have the same, or one cannot be
            loaded.
        TextError: If a prompt has a single token, and the model a loss.
        ReportError: If the folder holds reports of other checkpoints, texts or settings.
    """
    named = by_step(checkpoints)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if texts is None:
        texts = usual_texts(next(iter(named.values())))
    run = _Checkpoints(model, texts, sinks, folder, options)
    for step, checkpoint in named.items():
        run.check(step, checkpoint)
    bar = tqdm(named.items(), unit="checkpoint", disable=not progress, leave=False)
    for step, checkpoint in bar:
        run.measure(step, checkpoint)
    return Dynamics(about=run.about(), reports=run.reports, loss=run.loss, parked=parked)


class _Checkpoints:
    """Loads one checkpoint after the other, scans it, and keeps what was found."""

    def __init__(
        self,
        model: str | Path | None,
        texts: Any,
        sinks: Any,
        folder: Path | None,
        options: dict[str, Any],
    ) -> None:
        self._model, self._folder, self._options = model, folder, options
        once = isinstance(sinks, Iterable) and not isinstance(sinks, str)
        self._sinks = tuple(sinks) if once else sinks
        self._source = as_texts(texts)
        self._texts: Texts | None = None
        self.reports: dict[int, SinkReport] = {}
        self.loss: dict[int, float] = {}

    def check(self, step: int, checkpoint: Any) -> None:
        """Whether the report that an earlier run left, if it did, is the one asked for.

        Raises:
            ReportError: If it is not, or hooks are in force on the checkpoint.
        """
        if isinstance(checkpoint, TransformerBridge):
            _partial.kept_in(self._folder, checkpoint)
        file = self._file(step)
        if file is None:
            return
        found = _beside(file).get("asked", {})
        for what, now in self._asked(checkpoint).items():
            if (then := found.get(what)) != now:
                raise ReportError(
                    f"The report of step {step} in {self._folder} was measured with another "
                    f"{what} ({then or 'not said'}; now {now}); name another folder, or delete it."
                )

    def _asked(self, checkpoint: Any) -> dict[str, str]:
        return asked_of(self._model, checkpoint, self._source, self._sinks, self._options)

    def _file(self, step: int) -> Path | None:
        """Where an earlier run left the report, if it did."""
        file = None if self._folder is None else self._folder / f"step-{step}.nc"
        return file if file is not None and file.exists() else None

    def measure(self, step: int, checkpoint: Any) -> None:
        """Scan a checkpoint, unless its report is there."""
        report = self._kept(step)
        if report is None:
            report = self._scanned(step, checkpoint)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.reports[step] = report

    def _scanned(self, step: int, checkpoint: Any) -> SinkReport:
        asked = self._asked(checkpoint)  # before a model in memory is wrapped
        model = self._load(checkpoint)
        self._check_shape(step, capabilities(model))
        prompts = self._prompts(model)
        loss = _loss(model, prompts)
        softmax = capabilities(model).softmax
        metrics = [metric for metric in METRICS if softmax or metric != "entropy"]
        report = scan(model, prompts, metrics=metrics, sinks=self._sinks, progress=False).to("cpu")
        if self._folder is not None:
            # The report comes last: where it is, the loss is too.
            beside = json.dumps({"loss": loss, "asked": asked}, indent=1)
            _partial.write_whole(self._folder / f"step-{step}.json", beside)
            report.save(self._folder / f"step-{step}.nc")
        if loss is not None:
            self.loss[step] = loss
        return report

    def _check_shape(self, step: int, can: Capabilities) -> None:
        """Curves over training are of one model: as many layers and heads in every checkpoint."""
        for first, report in list(self.reports.items())[:1]:
            there = (report.settings.n_layers, report.settings.n_heads)
            if (can.n_layers, can.n_heads) != there:
                raise ModelError(
                    f"Checkpoint {step} has {can.n_layers} layers of {can.n_heads} heads and "
                    f"checkpoint {first} has {there[0]} of {there[1]}; name checkpoints of one "
                    "model."
                )

    def _load(self, checkpoint: Any) -> Any:
        if callable(checkpoint) and not isinstance(checkpoint, nn.Module):
            checkpoint = checkpoint()
        if isinstance(checkpoint, nn.Module):
            return load_model(checkpoint)
        if isinstance(checkpoint, int):
            return load_model(self._named(checkpoint), checkpoint=checkpoint, **self._options)
        if is_snapshot(checkpoint):
            return laboratory_model(Path(checkpoint), **self._options)
        if self._model is not None and not Path(checkpoint).exists():
            return load_model(self._model, revision=str(checkpoint), **self._options)
        return load_model(checkpoint, **self._options)

    def _named(self, step: int) -> str | Path:
        if self._model is None:
            raise ModelError(
                f"Checkpoint {step} is a training step, but of no model; name the model."
            )
        return self._model

    def _prompts(self, model: Any) -> Texts:
        """The texts as the first model's tokens."""
        if self._texts is None:
            self._texts = self._source.tokenize(model).right_padded()
            for step, report in self.reports.items():
                self._check_same(step, report, self._texts)
        return self._texts

    def _kept(self, step: int) -> SinkReport | None:
        """The report that an earlier run left in the folder."""
        file = self._file(step)
        if file is None:
            return None
        report = load_report(file)
        others = [Texts(one.tokens, one.mask, bos="", source="") for one in self.reports.values()]
        for prompts in others if self._texts is None else [self._texts]:
            self._check_same(step, report, prompts)
        loss = _beside(file)["loss"]
        if loss is not None:
            self.loss[step] = loss
        return report

    def _check_same(self, step: int, report: SinkReport, prompts: Texts) -> None:
        own = Texts(report.tokens, report.mask, bos="", source="")
        if _partial.digest(own) != _partial.digest(prompts):
            raise ReportError(
                f"The report of step {step} in {self._folder} was measured on other tokens; name "
                "another folder, or delete it."
            )

    def about(self) -> str:
        """Model, T, BOS and texts in one line."""
        reports = list(self.reports.values())
        settings, prompts = reports[0].settings, len(reports[0].tokens)
        ends = dict.fromkeys((settings.model, reports[-1].settings.model))
        name = " to ".join(ends) if self._model is None else str(self._model)
        parts = (name, f"T = {settings.length:,}", f"BOS: {settings.bos}")
        return " · ".join([*parts, f"{prompts} × {settings.source}"])


def _beside(report: Path) -> dict[str, Any]:
    """What is kept with a report: the loss, and what was asked."""
    return json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))


def _loss(model: Any, prompts: Texts) -> float | None:
    """Mean over prompts of the next-token loss; None for a model without one."""
    try:
        partway = Partway(model)
    except UnsupportedError:
        return None
    with partway.opened():
        return float(PromptLosses(partway, with_predictions(prompts))().mean())
