"""Sinks, drains, peaks and dormant heads over training, from one scan per checkpoint.

Guo, Pai, Bai, Jiao, Jordan and Mei 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835), who
follow OLMo-7B over 31 revisions.

1. Sort the checkpoints by training step. A checkpoint is anything that can be loaded as a model: a
   training step that TransformerLens knows, a Hub revision, a folder such as ``checkpoint-500``, a
   snapshot of a Bigram-Backcopy toy model, a model, or a function that makes one.
2. Load each, measure its loss, scan it on the same tokens, and free it before the next. Each report
   is saved, so that an interrupted run continues and later checkpoints can be added.
3. One curve per phenomenon against the step, and the step at which it is half-way.
4. The sink heads, those whose mean sink attention exceeds ε: how many appear and disappear between
   neighbouring checkpoints, and the Jaccard index of the two sets beside its value by chance (Xu
   2026, arXiv 2606.02378). For each head the step from which it remains a sink head.
   `sinkscope.experiments.seeds` compares the populations of several runs.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from sinkscope.capture.scan import scan
from sinkscope.errors import ModelError, ReportError, TextError, UnsupportedError
from sinkscope.experiments.partial_forward import Partway, PromptLosses, with_predictions
from sinkscope.experiments.result import Result, stacked, tidy
from sinkscope.experiments.resume import Kept, check, checkpoint_request, kept_in
from sinkscope.metrics import turnover
from sinkscope.metrics.heads import is_dormant
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model
from sinkscope.models.packaged import BUILT_IN, PACKAGES
from sinkscope.models.provenance import digest
from sinkscope.output import locked, number
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.texts import texts as make_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.renamed import argument, attribute
from sinkscope.report.report import SinkReport

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PER_HEAD = ("sink_attention", "sink_importance", "attention_entropy", "value_drain", "honor")
PER_LAYER = ("residual_peak", "sink_residual_norm")
METRICS = ("sink_attention", "values", "head_outputs", "residual", "entropy", "received")
"""Of these, `entropy` is left out where attention is not a softmax."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dynamics(Result):
    """The reports of a model's checkpoints.

    Attributes:
        reports: By training step, rising.
        loss: Mean next-token loss by step [nat]; without steps where the model has none.
        sink_threshold: Mean sink attention above which a head counts as dormant [probability].
    """

    QUESTION = "When in training do sinks, drains and peaks grow?"

    reports: dict[int, SinkReport]
    loss: dict[int, float]
    sink_threshold: float

    parked = attribute("parked", "sink_threshold")

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps."""
        return tuple(self.reports)

    def stacked(self, name: str) -> Float[Tensor, "step ..."]:
        """Mean over prompts of a field of the report, step by step."""
        return torch.stack([report.mean(name) for report in self.reports.values()])

    def overview(self) -> dict[str, Float[Tensor, "step"]]:
        """One curve for each phenomenon.

        Returns:
            sink_rate, of the first sink [share]; sink_attention, mean over heads [probability];
            dormant_share, of heads [share]; value_drain, median over layers and kv_heads [ratio];
            residual_peak, largest over layers [ratio]; and loss [nat] where there is one.
        """
        attention = self.stacked("sink_attention").flatten(1)
        rates = [report.sink_rate_at(report.settings.epsilon) for report in self.reports.values()]
        curves = {
            "sink_rate": torch.tensor(rates),
            "sink_attention": attention.mean(dim=1),
            "dormant_share": is_dormant(attention, self.sink_threshold).float().mean(dim=1),
            "value_drain": self.stacked("value_drain").flatten(1).quantile(0.5, dim=1),
            "residual_peak": self.stacked("residual_peak").amax(dim=1),
        }
        if self.loss:
            curves["loss"] = torch.tensor([self.loss[step] for step in self.steps])
        return curves

    def sink_heads(self, epsilon: float | None = None) -> Bool[Tensor, "step layer head"]:
        """The sink heads of every checkpoint; see `SinkReport.sink_heads`.

        Args:
            epsilon: Threshold [probability]; by default that of the scans.
        """
        return torch.stack([report.sink_heads(epsilon) for report in self.reports.values()])

    def turnover(self, epsilon: float | None = None) -> pd.DataFrame:
        """How the set of sink heads changes from one checkpoint to the next.

        Args:
            epsilon: See `sink_heads`.

        Returns:
            One row per step: step, sink_heads, appeared and disappeared since the step before
            [count], jaccard with it, and jaccard_by_chance if the heads of each layer were
            renumbered at random [share]. Values that need an earlier step are nan at the first one,
            and so is jaccard for two empty sets.
        """
        import pandas as pd

        population = self.sink_heads(epsilon)
        before = [population[0], *population[:-1]]
        rows = [
            {
                "step": step,
                "sink_heads": int(now.sum()),
                "appeared": float((now & ~then).sum()),
                "disappeared": float((then & ~now).sum()),
                "jaccard": turnover.jaccard(now, then),
                "jaccard_by_chance": turnover.jaccard_by_chance(now, then),
            }
            for step, now, then in zip(self.steps, population, before, strict=True)
        ]
        frame = pd.DataFrame(rows)
        frame.loc[0, ["appeared", "disappeared", "jaccard", "jaccard_by_chance"]] = float("nan")
        return frame

    def formation(self, epsilon: float | None = None) -> pd.DataFrame:
        """When each head became a sink head.

        Args:
            epsilon: See `sink_heads`.

        Returns:
            One row per head: layer, head, the step at which it first is a sink head (appeared), the
            step from which it is one at every later checkpoint (formed), -1 where there is none,
            and how many times it stopped being one (disappeared) [count].
        """
        population = self.sink_heads(epsilon)
        steps = torch.tensor([*self.steps, -1])  # index -1 is no step
        columns = {
            "appeared": steps[turnover.appeared(population)],
            "formed": steps[turnover.formed(population)],
            "disappeared": turnover.disappearances(population),
        }
        axes = {"layer": range(population.shape[1]), "head": range(population.shape[2])}
        frame = tidy(axes, **columns)
        return frame.astype(dict.fromkeys(columns, "int64"))

    def formation_step(self, epsilon: float | None = None) -> int | None:
        """The first step with at least half as many sink heads as the checkpoint that has most.

        Args:
            epsilon: See `sink_heads`.

        Returns:
            The step; None if no checkpoint has a sink head.
        """
        counts = self.sink_heads(epsilon).sum((1, 2))
        most = int(counts.max())
        return self.steps[int((2 * counts >= most).long().argmax())] if most else None

    def to_frame(self) -> pd.DataFrame:
        """One row per metric, step, layer and head: metric, step, layer, head, value.

        layer and head are -1 for the curves of `overview`, and head is for values of a layer;
        value_drain has a kv_head in `head`. A metric that one of the checkpoints does not have
        (entropy without a softmax) is left out. sink_heads, appeared, disappeared and jaccard are
        those of `turnover`.
        """
        pieces = [
            self._rows(name, curve[:, None, None], layers=[-1], heads=[-1])
            for name, curve in self.overview().items()
        ]
        changes = self.turnover()
        for name in ("sink_heads", "appeared", "disappeared", "jaccard"):
            values = torch.tensor(changes[name].to_numpy(dtype="float64"))
            pieces.append(self._rows(name, values[:, None, None], layers=[-1], heads=[-1]))
        for name in PER_LAYER:
            x = self.stacked(name)[:, :, None]
            pieces.append(self._rows(name, x, range(x.shape[1]), [-1]))
        for name in PER_HEAD:
            if any(getattr(report, name) is None for report in self.reports.values()):
                continue
            x = self.stacked(name)
            pieces.append(self._rows(name, x, range(x.shape[1]), range(x.shape[2])))
        return stacked(pieces)

    def _rows(
        self, metric: str, x: Float[Tensor, "step layer head"], layers: Any, heads: Any
    ) -> pd.DataFrame:
        axes = {"metric": [metric], "step": self.steps, "layer": layers, "head": heads}
        return tidy(axes, value=x[None])

    def statistics(self) -> dict[str, Any]:
        """The curves, and when each phenomenon appears."""
        curves = {name: curve.tolist() for name, curve in self.overview().items()}
        return {
            "step": list(self.steps),
            "curves": curves,
            "half_way": self.half_way(),
            "formation_step": self.formation_step(),
            "turnover": self.turnover().to_dict("records"),
            "heads": self.formation().to_dict("records"),
        }

    def half_way(self) -> dict[str, int | None]:
        """The first step at which each curve has covered half of its total change."""
        steps: dict[str, int | None] = {}
        for name, curve in self.overview().items():
            way = (curve - curve[0]) / (curve[-1] - curve[0])
            there = (way >= 0.5).nonzero()[:, 0]
            steps[name] = self.steps[int(there[0])] if len(there) else None
        return steps

    def summary(self) -> str:
        """First and last value of each curve, and when it was half-way between."""
        half = self.half_way()
        lines = [f"{len(self.steps)} checkpoints, steps {self.steps[0]:,} to {self.steps[-1]:,}:"]
        if len(self.steps) == 1:
            lines = [f"One checkpoint, step {self.steps[0]:,}:"]
        for name, curve in self.overview().items():
            first, last = (number(float(value)) for value in (curve[0], curve[-1]))
            when = "" if half[name] is None else f", half-way by step {half[name]:,}"
            lines.append(f"  {name.replace('_', ' ')} {first} → {last}{when}")
        lines.append(f"  {self._population()}")
        return "\n".join(lines)

    def _population(self) -> str:
        """The sink heads in one sentence."""
        step, heads = self.formation_step(), self.formation()
        if step is None:
            return "no head is a sink head at any step"
        counts = self.turnover()["sink_heads"]
        ever, left = int((heads["appeared"] >= 0).sum()), int((heads["disappeared"] > 0).sum())
        return (
            f"sink heads {counts.iloc[0]} → {counts.iloc[-1]}, half of the most by step {step:,}; "
            f"of {ever} that ever were one, {left} stopped being one at least once"
        )

    def figures(self) -> dict[str, go.Figure]:
        """One panel per phenomenon against the step."""
        from sinkscope.plot import training_curves

        frame = self.to_frame()
        curves = frame[(frame["layer"] == -1) & (frame["head"] == -1)].dropna(subset="value")
        return {"dynamics": training_curves(curves, about=self.about, log_steps=False)}


@argument("parked", "sink_threshold")
def dynamics(
    model: str | Path | None,
    checkpoints: Mapping[int, Any] | Iterable[Any],
    texts: Any = None,
    *,
    sink_threshold: float = 0.5,
    sinks: Any = (0,),
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Dynamics:
    """Scan every checkpoint of a model on the same texts.

    Args:
        model: The Hub model that steps and revisions are of; None if no checkpoint is one.
        checkpoints: Each a training step that TransformerLens knows for this model (an int); a Hub
            revision whose last number is the step, such as "step1000"; a folder likewise, such as
            "runs/checkpoint-500"; a toy-model snapshot, such as
            "runs/step-001000.safetensors"; or, in a mapping from step, any of these, anything that
            `load_model` takes, or a function without arguments that gives such a thing.
        texts: Prompts; by default 16 of prose, 256 tokens each, and for toy-model snapshots 16 of
            their own task, as long as their context. They are tokenised by the first checkpoint,
            and all get the same tokens.
        sink_threshold: Mean sink attention above which a head counts as dormant [probability].
        sinks: See `scan`.
        out: A folder in which each checkpoint's report is saved, and from which an interrupted run
            continues. A checkpoint in a file is identified by path, size and time; one that a
            function makes by its step alone.
        progress: Whether to draw a progress bar.
        **options: Passed on to `load_model`: device, dtype, ….

    Returns:
        The reports and losses by step.

    Raises:
        ModelError: If a checkpoint's step is unknown, two have the same, or one cannot be
            loaded.
        TextError: If a prompt has a single token, and the model a loss.
        ReportError: If the folder holds reports of other checkpoints, texts or settings, or another
            process is writing to it.
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
    with nullcontext() if folder is None else locked(folder):
        bar = tqdm(named.items(), unit="checkpoint", disable=not progress, leave=False)
        for step, checkpoint in bar:
            run.measure(step, checkpoint)
    return Dynamics(
        about=run.about(), reports=run.reports, loss=run.loss, sink_threshold=sink_threshold
    )


def by_step(checkpoints: Mapping[int, Any] | Iterable[Any]) -> dict[int, Any]:
    """Checkpoints by training step, in rising order.

    Returns:
        The checkpoints, by step.

    Raises:
        ModelError: If a step cannot be read off, or two checkpoints have the same.
    """
    if isinstance(checkpoints, Mapping):
        pairs = list(checkpoints.items())
    else:
        pairs = [(_step_of(checkpoint), checkpoint) for checkpoint in checkpoints]
    steps = [step for step, _ in pairs]
    if not steps or len(set(steps)) < len(steps):
        raise ModelError(
            f"Checkpoints have the steps {steps}; name at least one, and no step twice."
        )
    return dict(sorted(pairs))


def _step_of(checkpoint: Any) -> int:
    if isinstance(checkpoint, int):
        return checkpoint
    name = Path(checkpoint).name if isinstance(checkpoint, str | Path) else ""
    packaged = name in PACKAGES or name in BUILT_IN  # their numbers are sizes
    numbers = [] if packaged else re.findall(r"\d+", name)
    if not numbers:
        raise ModelError(
            f"The training step of checkpoint {checkpoint!r} cannot be told from its name; pass a "
            "mapping such as {500: checkpoint}."
        )
    return int(numbers[-1])


def is_snapshot(checkpoint: Any) -> bool:
    """Whether this is a snapshot of a Bigram-Backcopy toy model."""
    return isinstance(checkpoint, str | Path) and Path(checkpoint).suffix == ".safetensors"


def usual_texts(
    checkpoint: Any,
    *,
    prompts: int = 16,
    length: int | None = None,
    bos: str = "auto",
    seed: int = 0,
) -> Any:
    """Default texts: prose, or the task that a snapshot was trained on.

    Args:
        checkpoint: The first one.
        prompts: How many.
        length: Tokens of each; by default 256 of prose, and of a task the snapshot's context.
        bos: For prose; a task begins as in training.
        seed: Where prose is cut, and of the draws of a task.

    Raises:
        TextError: If a task is given another BOS policy, or prompts longer than the snapshot's
            context.
    """
    if not is_snapshot(checkpoint):
        return make_texts("prose", prompts=prompts, length=length or 256, bos=bos, seed=seed)
    from sinkscope import bb

    model, task = bb.load_model(checkpoint)
    context = model.config.context
    if bos != "auto":
        raise TextError(
            "A toy-model snapshot is scanned on the task that it was trained on, which has a BOS "
            f"policy of its own; leave out {bos!r}, or name texts."
        )
    if length is not None and not 1 < length <= context:
        raise TextError(
            f"Prompts of {length} tokens do not fit {Path(checkpoint).name}, whose context is "
            f"{context}; give 2 to {context}."
        )
    return bb.task_texts(prompts, length or context, seed, task)


def load_snapshot(file: Path, device: Any = "cpu", **options: Any) -> Any:
    """Load a snapshot written by `sinkscope.bb.train` as a bridge.

    Raises:
        ModelError: If any option but the device is given.
    """
    from sinkscope import bb

    if options:
        raise ModelError(
            f"{file.name} is a toy-model snapshot, which takes no option but the device."
        )
    model, task = bb.load_model(file)
    return bb.to_bridge(model.to(device), name=file.stem, task=task)


class _Checkpoints:
    """Loads one checkpoint after another, scans it, and saves the report."""

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
        """Refuse a report of an earlier run that was made for another request.

        Raises:
            ReportError: If it was, or hooks are in force on the checkpoint.
        """
        if isinstance(checkpoint, TransformerBridge):
            kept_in(self._folder, checkpoint)
        if self._folder is not None:
            check(self._file(step), self._request(checkpoint))

    def measure(self, step: int, checkpoint: Any) -> None:
        """Scan a checkpoint, unless its report is saved already."""
        file = None if self._folder is None else self._file(step)
        # The request is of the checkpoint as it was given, before it is wrapped.
        request = {} if file is None else self._request(checkpoint)
        with Kept(SinkReport, file, request) as kept:
            report, loss = kept.found, kept.also.get("loss")
            if report is None:
                report, loss = self._scanned(step, checkpoint)
                kept.write(report, loss=loss)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                self._check_tokens(step, report)
        self.reports[step] = report
        if loss is not None:
            self.loss[step] = loss

    def _request(self, checkpoint: Any) -> dict[str, Any]:
        return checkpoint_request(self._model, checkpoint, self._source, self._sinks, self._options)

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"step-{step}.nc"

    def _scanned(self, step: int, checkpoint: Any) -> tuple[SinkReport, float | None]:
        model = self._load(checkpoint)
        self._check_shape(step, capabilities(model))
        prompts = self._prompts(model)
        loss = _loss(model, prompts)
        softmax = capabilities(model).softmax
        metrics = [metric for metric in METRICS if softmax or metric != "entropy"]
        report = scan(model, prompts, metrics=metrics, sinks=self._sinks, progress=False)
        return report.to("cpu"), loss

    def _check_shape(self, step: int, caps: Capabilities) -> None:
        """Refuse a checkpoint whose number of layers or heads differs from the first."""
        for first, report in list(self.reports.items())[:1]:
            there = (report.settings.n_layers, report.settings.n_heads)
            if (caps.n_layers, caps.n_heads) != there:
                raise ModelError(
                    f"Checkpoint {step} has {caps.n_layers} layers of {caps.n_heads} heads and "
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
            return load_snapshot(Path(checkpoint), **self._options)
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
        """Return the texts, tokenised by the first model."""
        if self._texts is None:
            self._texts = self._source.tokenize(model).right_padded()
            for step, report in self.reports.items():
                self._check_same(step, report, self._texts)
        return self._texts

    def _check_tokens(self, step: int, report: SinkReport) -> None:
        """Refuse a saved report of other tokens than those of this run."""
        others = [Texts(one.tokens, one.mask, bos="", source="") for one in self.reports.values()]
        for prompts in others if self._texts is None else [self._texts]:
            self._check_same(step, report, prompts)

    def _check_same(self, step: int, report: SinkReport, prompts: Texts) -> None:
        own = Texts(report.tokens, report.mask, bos="", source="")
        if digest(own) != digest(prompts):
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


def _loss(model: Any, prompts: Texts) -> float | None:
    """Mean over prompts of the next-token loss; None for a model without one."""
    try:
        partway = Partway(model)
    except UnsupportedError:
        return None
    with partway.opened():
        return float(PromptLosses(partway, with_predictions(prompts))().mean())
