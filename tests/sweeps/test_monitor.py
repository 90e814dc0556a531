"""Watching a model train changes nothing about the training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import sinkscope as ss
from sinkscope.errors import SinkscopeWarning, UnsupportedError
from tests.sweeps.conftest import tiny

TEXTS = ss.token_ids([[1 + (3 * p + i) % 200 for i in range(16)] for p in range(3)])


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model, its gradients and the random generators that training depends on.

    But Python's, from which the checks of types in these tests draw: see the last test.
    """
    return {
        "weights": {k: x.clone() for k, x in model.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "random": (np.random.get_state()[1].tolist(), torch.get_rng_state()),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_measurement_leaves_no_trace(family: str) -> None:
    model = tiny(family).train()
    model(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
    before = state(model)
    monitor = ss.Monitor(model, TEXTS)
    monitor.log(0)
    after = state(model)
    assert [name for name in before if not equal(before[name], after[name])] == []


def test_what_is_logged_is_the_attention_of_plain_transformers() -> None:
    model = tiny().train()
    monitor = ss.Monitor(model, TEXTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        found = monitor.log(step)
        model.eval()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            patterns = model(TEXTS.tokens, output_attentions=True).attentions
        model.train()
        mean = torch.stack([pattern[:, :, 1:, 0].mean() for pattern in patterns]).mean()
        assert found["sink/sink_attention"] == pytest.approx(float(mean), abs=1e-5)
        model(TEXTS.tokens, labels=TEXTS.tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    curve = [float(report.mean("sink_attention").mean()) for report in monitor.reports.values()]
    assert len(set(curve)) == 3


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([1 + (7 * index + i) % 200 for i in range(12)])
        return {"input_ids": ids, "labels": ids}


class Seen(TrainerCallback):
    """What the trainer tells those that it logs to."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append((state.global_step, dict(logs)))


def train(folder: Path, watched: dict | None, *, told: bool = True) -> tuple[Any, Trainer, Seen]:
    """Six steps with dropout, momentum and shuffled data, with a `SinkCallback` or without."""
    model = tiny("gpt2")
    seen = Seen()
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=2, save_strategy="no", report_to=[], seed=3, disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[seen])
    callback = None
    if watched is not None:
        callback = ss.SinkCallback(TEXTS, every=2, trainer=trainer if told else None, **watched)
        trainer.add_callback(callback)
    trainer.train()
    return callback, trainer, seen


def test_a_trainer_reaches_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    _, alone, untold = train(tmp_path, None)
    callback, watched, seen = train(tmp_path, {"out": tmp_path / "sinks", "name": "mine"})
    assert equal(dict(alone.model.state_dict()), dict(watched.model.state_dict()))
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (alone, watched)]
    assert moments[0] and equal(*moments)
    # The loss is logged as often as without it, and the sinks beside it.
    losses = [[(step, log["loss"]) for step, log in one.logs if "loss" in log]
              for one in (untold, seen)]  # fmt: skip
    assert losses[0] and losses[0] == losses[1]
    steps = [step for step, log in seen.logs if "sink/sink_attention" in log]
    assert steps == [0, 2, 4, 6] == list(callback.monitor.reports)
    cells = ss.open_sweep(tmp_path / "sinks")
    assert cells.values("checkpoint") == steps and cells.values("model") == ["mine"]
    for step in steps:
        assert cells.report(checkpoint=step).equals(callback.monitor.reports[step])
    curves = cells.dynamics()
    assert curves.steps == tuple(steps)
    assert equal(curves.overview(), callback.monitor.dynamics().overview())


def test_without_the_trainer_the_numbers_go_to_its_history(tmp_path: Path) -> None:
    _, trainer, seen = train(tmp_path, {}, told=False)
    history = [entry for entry in trainer.state.log_history if "sink/sink_attention" in entry]
    assert [entry["step"] for entry in history] == [0, 2, 4, 6]
    assert not any("sink/sink_attention" in log for _, log in seen.logs)


def test_whoever_else_is_logged_to_is_warned_of(tmp_path: Path) -> None:
    callback = ss.SinkCallback(TEXTS)
    model = tiny()
    arguments = TrainingArguments(str(tmp_path), report_to=["tensorboard"], use_cpu=True)
    fake = type("State", (), dict(is_world_process_zero=True, global_step=0, log_history=[]))
    with pytest.warns(SinkscopeWarning, match="tensorboard"):
        callback.on_train_begin(arguments, fake, None, model=model)


def test_only_rank_zero_measures(tmp_path: Path) -> None:
    callback, model = ss.SinkCallback(TEXTS, every=1, out=tmp_path / "sinks"), tiny()
    other = type("State", (), dict(is_world_process_zero=False, global_step=1, log_history=[]))
    callback.on_train_begin(None, other, None, model=model)
    callback.on_step_end(None, other, None, model=model)
    assert callback.monitor is None and not (tmp_path / "sinks").exists()


def test_sharded_weights_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = tiny()

    with pytest.raises(UnsupportedError, match=r"sharded over processes \(FSDP\)"):
        ss.Monitor(FullyShardedDataParallel(), TEXTS)
    model = tiny()
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="ZeRO-3"):
        ss.Monitor(model, TEXTS)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_lightning_trainer(tmp_path: Path) -> None:
    """As Lightning calls it; its own package takes part where it is installed."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny("gpt2").train()

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def trained(*callbacks):
        lightning.seed_everything(0)
        module = Module()
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", callbacks=list(callbacks), logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Data(), 4, shuffle=True))
        return dict(module.state_dict())

    callback = ss.SinkCallback(TEXTS, every=2)
    assert equal(trained(), trained(callback))
    assert list(callback.monitor.reports) == [0, 2, 4]
    assert "pytorch_lightning" in sys.modules


def test_pythons_random_generator_is_left_as_it_was() -> None:
    """In a process of its own, importing included: a library draws from it when it is imported."""
    script = (
        "import random\n"
        "from transformers import TrainerCallback\n"
        "from tests.sweeps.conftest import tiny\n"
        "import sinkscope as ss\n"
        "model, state = tiny(), random.getstate()\n"
        "ss.Monitor(model, ss.token_ids([[1, 2, 3, 4, 5]])).log(0)\n"
        "ss.SinkCallback\n"
        "assert random.getstate() == state\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
