"""Train a laboratory model and watch the three phenomena while it trains.

A run is a function of its configuration, its source and the start that it was given, if any: other
weights come from the seed, batch t from (seed, t).
A run that was killed and resumed on the same machine ends on the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
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

from sinkscope.bb.checkpoint import Checkpoint, Log, load_checkpoint, save_checkpoint
from sinkscope.bb.config import TrainConfig
from sinkscope.bb.holds import Holds
from sinkscope.bb.measurement import Phenomena, measure
from sinkscope.bb.model import BackcopyTransformer, Tap, no_tap
from sinkscope.bb.optimizers import make_optimizers
from sinkscope.bb.source import BigramSource
from sinkscope.bb.task import Batches, BigramBackcopy, mixed_seed
from sinkscope.devices import chosen_device
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd


# --- A Ctrl-C that waits until a training step is over, so that what is saved is whole.


@contextmanager
def waiting_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only answers the question that is yielded; a second one stops all.

    Where Ctrl-C would not raise KeyboardInterrupt (other threads, other handlers), nothing changes.
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


CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"
MAY_CHANGE = ("steps", "measure_every", "save_every", "snapshots")  # between a run and its resume
EVALUATION = 2**31  # a seed stream that training never draws from


@dataclass
class Run:
    """A finished (or resumed and finished) training run."""

    config: TrainConfig
    task: BigramBackcopy
    model: BackcopyTransformer
    log: Log

    def frame(self) -> pd.DataFrame:
        """The log, tidy: step, metric, layer, head, value."""
        return self.log.frame()


def train(
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    *,
    source: BigramSource | None = None,
    start: BackcopyTransformer | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Run:
    """Train one model, or go on with the run that `folder` holds.

    Args:
        config: the run; the paper's one-layer one when left out.
        folder: where checkpoints and the log go; None keeps nothing on disk.
        source: the bigram source; the shipped English counts when left out.
        start: begin from these weights instead of the seed's (and hold *its* values or logits).
        device: the GPU if there is one, when left out.
        progress: show a bar with the loss and the three phenomena.

    Returns:
        the run: its model (in eval mode, fp32), task and log.

    Raises:
        ModelError: when `folder` holds a run of another configuration, source or start, or one
            that has gone on for more steps; when a snapshot is asked for that the run does not come
            to; when there is no such device.
    """
    config = config if config is not None else TrainConfig()
    task = BigramBackcopy(source, config.triggers, config.bos)
    trainer = Trainer(config, task, start, chosen_device(device))
    if folder is not None:
        trainer.attach(Path(folder))
    trainer.run(progress)
    return Run(trainer.config, trainer.task, trainer.model.eval(), trainer.log)


class Trainer:
    """The moving parts of one run, and the loop."""

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
        self.holds = Holds(config.hold, self.model, task) if config.hold else None
        self.optimizers = make_optimizers(self.model, config)
        self.batches = Batches(task, config.batch, config.length + 1, config.seed, self.device)
        self.evaluation = task.sample(
            config.measure_prompts, config.length, mixed_seed(EVALUATION, config.seed), "cpu"
        ).to(self.device)
        self.log = Log()
        self.step = 0
        self.folder: Path | None = None
        on_gpu = self.device.type == "cuda"
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
        # A hold's tap is a new closure every batch, which a compiled graph would have to re-trace.
        wanted = on_gpu if config.compile is None else config.compile
        compiled = wanted and self.holds is None
        self.loss = torch.compile(next_token_loss) if compiled else next_token_loss

    def attach(self, folder: Path) -> None:
        """Use this folder, and go on from the checkpoint in it if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        saved = load_checkpoint(folder / CHECKPOINT) if (folder / CHECKPOINT).exists() else None
        if saved is not None:
            self._refuse_another_run(saved)
        self._refuse_missed_snapshots(0 if saved is None else saved.metadata["step"])
        if saved is None:
            return
        self.model.load_state_dict(saved.weights)
        self.optimizers.load(saved.optimizer)
        self.step = saved.metadata["step"]
        self.log = Log.read(folder / LOG, until=self.step)

    def _refuse_another_run(self, saved: Checkpoint) -> None:
        kept = asdict(TrainConfig.from_dict(saved.metadata["config"]))
        ours = asdict(self.config)
        differing = [k for k in ours if k not in MAY_CHANGE and ours[k] != kept[k]]
        theirs, source = saved.source, self.task.source
        tables = (theirs.marginal, source.marginal), (theirs.transition, source.transition)
        if not all(torch.equal(one, other) for one, other in tables):
            differing.append("source")
        if saved.metadata.get("start") != self.start:
            differing.append("start")
        if differing:
            raise ModelError(
                f"{self.folder} holds a run that differs in {', '.join(differing)}: "
                f"give another folder, or the same ones to go on with it"
            )
        if saved.metadata["step"] > self.config.steps:
            raise ModelError(
                f"{self.folder} holds a run of {saved.metadata['step']} steps, beyond the "
                f"{self.config.steps} asked for: give another folder, or ask for as many"
            )

    def _refuse_missed_snapshots(self, begun: int) -> None:
        """Refuse steps that a run from step `begun` on does not come to, unless they are kept."""
        for step in self.config.snapshots:
            if step > self.config.steps:
                raise ModelError(
                    f"snapshot {step} lies beyond the run's {self.config.steps} steps: leave it "
                    f"out, or ask for more steps"
                )
            if step < begun and not self._snapshot(step).exists():
                raise ModelError(
                    f"{self.folder} holds a run that is past snapshot {step}, at step {begun}: "
                    f"leave it out, or give another folder"
                )

    def run(self, progress: bool) -> None:
        """Measure, save and step until the last step is done.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the running step is done and saved.
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
            tap = self.holds.tap(tokens[:, :-1]) if self.holds is not None else no_tap
            loss = self.loss(self.model, tokens, tap)
        loss.backward()
        self.optimizers.step()
        return loss.detach()

    def _measure(self, loss: Tensor | None) -> str:
        tap = self.holds.tap(self.evaluation) if self.holds is not None else no_tap
        found = measure(self.model, self.task, self.evaluation, tap)
        if loss is not None:
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the loss became {loss.item()} at step {self.step}: lower the learning rate"
                )
            self.log.add(self.step, "loss", loss.item())
        self.log.extend(self.step, found)
        return summary(found, loss)

    def _save(self) -> None:
        if self.folder is None:
            return
        self.log.write(self.folder / LOG)
        state = Checkpoint(
            self.model.state_dict(),
            self.optimizers.tensors(),
            self.task.source,
            {"step": self.step, "config": asdict(self.config), "start": self.start},
        )
        if self.step in self.config.snapshots:
            weights_only = dataclasses.replace(state, optimizer={})
            save_checkpoint(self._snapshot(self.step), weights_only)
        save_checkpoint(self.folder / CHECKPOINT, state)

    def _snapshot(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{step:06d}.safetensors"


def _fingerprint(model: BackcopyTransformer) -> str:
    """Hexadecimal SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def next_token_loss(
    model: BackcopyTransformer, tokens: Int[Tensor, "prompt position"], tap: Tap = no_tap
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every next token, the one after BOS included [nat]."""
    logits = model(tokens[:, :-1], tap=tap)
    return F.cross_entropy(
        rearrange(logits.float(), "b t v -> (b t) v"), rearrange(tokens[:, 1:], "b t -> (b t)")
    )


def summary(found: Phenomena, loss: Tensor | None) -> str:
    """One line for the progress bar: loss, sink, drain and peak (the strongest head and layer)."""
    parts = [
        f"loss {loss.item():.3f}" if loss is not None else "",
        f"sink {found.sink_attention.nan_to_num(-1).max():.2f}",
        f"gap {found.logit_gap.nan_to_num(-99).max():+.1f}",
        f"drain {found.value_drain.nan_to_num(99).min():.2f}",
        f"peak {found.residual_peak.max():.1f}",
    ]
    return "  ".join(part for part in parts if part)


def load_model(path: str | Path) -> tuple[BackcopyTransformer, BigramBackcopy]:
    """The model and task of a checkpoint or snapshot file, in fp32 on the CPU."""
    saved = load_checkpoint(Path(path))
    config = TrainConfig.from_dict(saved.metadata["config"])
    model = BackcopyTransformer(config.model)
    model.load_state_dict({name: value.float() for name, value in saved.weights.items()})
    return model.eval(), BigramBackcopy(saved.source, config.triggers, config.bos)
