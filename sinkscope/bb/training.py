"""Train a toy model, and measure sink, value drain and residual peak during training.

A run is determined by its configuration, its source and any given starting weights; otherwise
weights are drawn from the seed, and batch t from (seed, t). A run that is killed and resumed on the
same machine therefore ends with bitwise the same weights. The entry point is `train`.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from sinkscope.bb.checkpoint import Checkpoint, load_checkpoint
from sinkscope.bb.clamping import Clamp
from sinkscope.bb.config import TrainConfig
from sinkscope.bb.log import Log
from sinkscope.bb.measurement import Phenomena, measure
from sinkscope.bb.model import BackcopyTransformer, Tap, no_tap
from sinkscope.bb.optimizers import make_optimizers
from sinkscope.bb.run_folder import RunFolder, exclusive
from sinkscope.bb.source import BigramSource
from sinkscope.bb.task import Batches, BigramBackcopy, mixed_seed
from sinkscope.devices import chosen_device
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd

MAY_CHANGE = ("steps", "measure_every", "save_every", "snapshots")
"""Settings that may differ between a run and its resumption."""
EVALUATION = 2**31  # a seed stream not used in training


@dataclass
class Run:
    """A finished training run.

    Attributes:
        config: Its configuration.
        task: The task.
        model: The trained model, fp32, in evaluation mode.
        log: Its measurements.
    """

    config: TrainConfig
    task: BigramBackcopy
    model: BackcopyTransformer
    log: Log

    def to_frame(self) -> pd.DataFrame:
        """Return the log as a tidy frame with the columns step, metric, layer, head and value."""
        return self.log.to_frame()

    def frame(self) -> pd.DataFrame:
        """The former name of `to_frame`."""
        warnings.warn("`Run.frame` is now called `to_frame`.", DeprecationWarning, stacklevel=2)
        return self.to_frame()


def train(
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    *,
    source: BigramSource | None = None,
    start: BackcopyTransformer | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Run:
    """Train one model, or resume the run in `folder`.

    Args:
        config: The run; by default the paper's one-layer model and settings.
        folder: Folder for the checkpoint, the log and snapshots; None saves nothing.
        source: The bigram source; by default the English counts that come with sinkscope.
        start: Starting weights instead of the seed's; clamped quantities keep the values that
            *this* model computes.
        device: By default the GPU if there is one.
        progress: Show a bar with the loss and the three phenomena.

    Returns:
        The run: its model (in evaluation mode, fp32), task and log.

    Raises:
        ModelError: If `folder` holds a run with another configuration, source or start, or with
            more steps, or a damaged one; if another process trains there; if a snapshot is
            requested beyond the last step; if there is no such device.
        ReportError: If a file cannot be written; the last saved state is kept.
    """
    config = config if config is not None else TrainConfig()
    task = BigramBackcopy(source, config.triggers, config.bos)
    trainer = Trainer(config, task, start, chosen_device(device))
    with exclusive(folder) if folder is not None else nullcontext():
        if folder is not None:
            trainer.attach(RunFolder(folder))
        trainer.run(progress)
    return Run(trainer.config, trainer.task, trainer.model.eval(), trainer.log)


class Trainer:
    """The state of one run, and the training loop."""

    def __init__(
        self,
        config: TrainConfig,
        task: BigramBackcopy,
        start: BackcopyTransformer | None,
        device: str | torch.device,
    ) -> None:
        self.config, self.task, self.device = config, task, torch.device(device)
        if task.vocab != config.model.vocab:
            config = self.config = config.replace(vocab=task.vocab)
        self.model = BackcopyTransformer(config.model, seed=config.seed)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        self.start = None if start is None else _fingerprint(self.model)
        self.model.to(self.device)
        self.clamp = Clamp(config.clamp, self.model, task) if config.clamp else None
        self.optimizers = make_optimizers(self.model, config)
        self.batches = Batches(task, config.batch, config.length + 1, config.seed, self.device)
        self.evaluation = task.sample(
            config.measure_prompts, config.length, mixed_seed(EVALUATION, config.seed), "cpu"
        ).to(self.device)
        self.log = Log()
        self.step = 0
        self.folder: RunFolder | None = None
        on_gpu = self.device.type == "cuda"
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
        # The tap of a clamp is a new closure every batch, which a compiled graph would retrace.
        wanted = on_gpu if config.compile is None else config.compile
        compiled = wanted and self.clamp is None
        self.loss = torch.compile(next_token_loss) if compiled else next_token_loss

    def attach(self, folder: RunFolder) -> None:
        """Use this folder, and resume from the checkpoint in it if there is one."""
        record = folder.read()
        if record is not None:
            self._refuse_another_run(folder, record[0])
        self._refuse_missed_snapshots(folder, 0 if record is None else record[0].step)
        self.folder = folder
        if record is None:
            return
        saved, self.log = record
        self.step = saved.step
        self.model.load_state_dict(saved.weights)
        try:
            self.optimizers.load(saved.optimizer)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The checkpoint in {folder.path} holds no state of {self.config.optimizer} that "
                f"fits its weights ({error}); give another folder."
            ) from error

    def _refuse_another_run(self, folder: RunFolder, saved: Checkpoint) -> None:
        kept, ours = asdict(saved.config), asdict(self.config)
        differing = [k for k in ours if k not in MAY_CHANGE and ours[k] != kept[k]]
        theirs, source = saved.source, self.task.source
        tables = (theirs.marginal, source.marginal), (theirs.transition, source.transition)
        if not all(torch.equal(one, other) for one, other in tables):
            differing.append("source")
        if saved.start != self.start:
            differing.append("start")
        if differing:
            raise ModelError(
                f"{folder.path} holds a run that differs in {', '.join(differing)}; give another "
                "folder, or the same settings to resume it."
            )
        if saved.step > self.config.steps:
            raise ModelError(
                f"{folder.path} holds a run of {saved.step} steps, beyond the {self.config.steps} "
                "asked for; give another folder, or ask for as many."
            )

    def _refuse_missed_snapshots(self, folder: RunFolder, begun: int) -> None:
        """Refuse snapshots of steps before `begun`, unless they exist."""
        for step in self.config.snapshots:
            if step < begun and not folder.snapshot(step).exists():
                raise ModelError(
                    f"{folder.path} holds a run that is past snapshot {step}, at step {begun}; "
                    "leave it out, or give another folder."
                )

    def run(self, progress: bool) -> None:
        """Measure, save and train until the last step.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the current step is finished and saved.
        """
        config = self.config
        bar = tqdm(
            total=config.steps, initial=self.step, disable=not progress, unit="step", leave=False
        )
        loss: Tensor | None = None
        with bar, waiting_interrupt() as interrupted:
            while True:
                if config.measures_at(self.step) and self.step not in self.log:
                    bar.set_postfix_str(self._measure(loss))
                last, stop = self.step >= config.steps, interrupted()
                due = self.step % config.save_every == 0 or self.step in config.snapshots
                if last or stop or due:
                    self._save()
                if stop:
                    raise KeyboardInterrupt
                if last:
                    break
                loss = self._train_step(self.batches[self.step])
                self.step += 1
                bar.update()

    def _train_step(self, tokens: Int[Tensor, "prompt position"]) -> Float[Tensor, ""]:
        self.optimizers.zero_grad()
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with cast:
            tap = self.clamp.tap(tokens[:, :-1]) if self.clamp is not None else no_tap
            loss = self.loss(self.model, tokens, tap)
        loss.backward()
        self.optimizers.step()
        return loss.detach()

    def _measure(self, loss: Tensor | None) -> str:
        tap = self.clamp.tap(self.evaluation) if self.clamp is not None else no_tap
        phenomena = measure(self.model, self.task, self.evaluation, tap)
        if loss is not None:
            if not torch.isfinite(loss):
                raise ModelError(
                    f"The loss became {loss.item()} at step {self.step}; lower the learning rate."
                )
            self.log.add(self.step, "loss", loss.item())
        self.log.extend(self.step, phenomena)
        return summary(phenomena, loss)

    def _save(self) -> None:
        if self.folder is None:
            return
        state = Checkpoint(
            self.model.state_dict(),
            self.optimizers.tensors(),
            self.task.source,
            self.config,
            self.step,
            self.start,
            self.log.digest(),
        )
        self.folder.save(state, self.log)


def _fingerprint(model: BackcopyTransformer) -> str:
    """Return the hexadecimal SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def next_token_loss(
    model: BackcopyTransformer, tokens: Int[Tensor, "prompt position"], tap: Tap = no_tap
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of all next tokens, including the one after BOS [nat]."""
    logits = model(tokens[:, :-1], tap=tap)
    return F.cross_entropy(
        rearrange(logits.float(), "b t v -> (b t) v"), rearrange(tokens[:, 1:], "b t -> (b t)")
    )


def summary(phenomena: Phenomena, loss: Tensor | None) -> str:
    """Return the progress bar's text: loss, and the strongest sink, drain and peak."""
    parts = [
        f"loss {loss.item():.3f}" if loss is not None else "",
        f"sink {phenomena.sink_attention.nan_to_num(-1).max():.2f}",
        f"gap {phenomena.logit_gap.nan_to_num(-99).max():+.1f}",
        f"drain {phenomena.value_drain.nan_to_num(99).min():.2f}",
        f"peak {phenomena.residual_peak.max():.1f}",
    ]
    return "  ".join(part for part in parts if part)


@contextmanager
def waiting_interrupt() -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C until the end of a training step, so that the saved state is consistent.

    Yields:
        A function that returns whether Ctrl-C was pressed; pressed again, it raises
        KeyboardInterrupt at once. In other threads, or under another handler of SIGINT, nothing
        changes.
    """
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def load_model(path: str | Path) -> tuple[BackcopyTransformer, BigramBackcopy]:
    """Load the model and the task of a checkpoint or snapshot file.

    Returns:
        The model, fp32 on the CPU and in evaluation mode, and its task.

    Raises:
        ModelError: If there is no such file, or it is damaged or not a checkpoint of this task.
    """
    saved = load_checkpoint(path)
    model = BackcopyTransformer(saved.config.model)
    model.load_state_dict({name: value.float() for name, value in saved.weights.items()})
    return model.eval(), BigramBackcopy(saved.source, saved.config.triggers, saved.config.bos)
