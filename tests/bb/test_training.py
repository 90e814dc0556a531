"""Training: the same bits after a kill, honest files, and each optimiser's own rule."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sinkscope.bb import BackcopyTransformer, BigramSource, ModelConfig, TrainConfig, train
from sinkscope.bb.checkpoint import load_checkpoint
from sinkscope.bb.optimizers import make_optimizers
from sinkscope.bb.run_folder import CHECKPOINT, LOG
from sinkscope.bb.training import Trainer, load_model, next_token_loss
from sinkscope.errors import ModelError

TINY = TrainConfig(
    model=ModelConfig(layers=2, heads=2, width=16, context=16),
    batch=8,
    length=16,
    steps=40,
    learning_rate=3e-3,
    measure_every=7,
    measure_prompts=4,
    save_every=5,
)


def weights(model: BackcopyTransformer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def start_training(config: TrainConfig, folder: Path) -> subprocess.Popen:
    """The run in a process of its own, as a user would start it."""
    code = (
        "import json, sys; from sinkscope.bb import TrainConfig, train;"
        "train(TrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], device='cpu')"
    )
    arguments = [sys.executable, "-c", code, json.dumps(asdict(config)), str(folder)]
    return subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env=dict(os.environ))


def reached(folder: Path) -> int:
    """The step of the checkpoint in a folder, read from its header."""
    if not (folder / CHECKPOINT).exists():
        return -1
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return int(json.loads(file.metadata()["step"]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_ends_on_the_same_bits(tmp_path, optimizer):
    config = TINY.replace(optimizer=optimizer, steps=400, learning_rate=3e-3)
    straight = train(config, device="cpu", progress=False)
    for goal in (20, 200):
        process = start_training(config, tmp_path)
        deadline = time.monotonic() + 120
        while reached(tmp_path) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert goal <= reached(tmp_path) < 400
    resumed = train(config, tmp_path, device="cpu", progress=False)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert resumed.log.rows == straight.log.rows


def test_an_interrupted_run_is_saved_where_it_was(tmp_path, monkeypatch):
    """Ctrl-C in the middle of step 17; saves of its own come at 0 and at the end only."""
    config = TINY.replace(save_every=1000)
    straight = train(config, device="cpu", progress=False)
    step = Trainer._train_step

    def interrupted(self, tokens):
        if self.step == 16:
            signal.raise_signal(signal.SIGINT)
        return step(self, tokens)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", interrupted)
        train(config, tmp_path, device="cpu", progress=False)
    assert reached(tmp_path) == 17
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(config, tmp_path, device="cpu", progress=False)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert resumed.log.rows == straight.log.rows


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    def stuck(self, tokens):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Trainer, "_train_step", stuck)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, device="cpu", progress=False)
    assert reached(tmp_path) == 0


def test_a_run_is_a_function_of_its_configuration(tmp_path):
    one = train(TINY, device="cpu", progress=False)
    same = train(TINY, tmp_path, device="cpu", progress=False)
    other = train(TINY.replace(seed=43), device="cpu", progress=False)
    assert torch.equal(weights(one.model), weights(same.model))
    assert not torch.equal(weights(one.model), weights(other.model))


def test_stopping_and_going_on_longer_equals_training_longer_at_once(tmp_path):
    for optimizer in ("adamw", "sgd", "muon"):
        config = TINY.replace(optimizer=optimizer, steps=23)
        folder = tmp_path / optimizer
        train(config.replace(steps=11), folder, device="cpu", progress=False)
        longer = train(config, folder, device="cpu", progress=False)
        at_once = train(config, device="cpu", progress=False)
        assert torch.equal(weights(longer.model), weights(at_once.model)), optimizer


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(TINY, tmp_path, device="cpu", progress=False)
    written = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    again = train(TINY, tmp_path, device="cpu", progress=False)
    assert torch.equal(weights(first.model), weights(again.model))
    assert first.log.rows == again.log.rows
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns >= written


def test_checkpoint_holds_model_task_and_configuration(tmp_path):
    source = BigramSource.synthetic(12, seed=5)
    config = TINY.replace(vocab=14, triggers=(3, 1), steps=5, snapshots=(3,))
    run = train(config, tmp_path, source=source, device="cpu", progress=False)
    model, task = load_model(tmp_path / CHECKPOINT)
    assert torch.equal(weights(model), weights(run.model))
    assert task.triggers == (3, 1)
    assert torch.equal(task.source.transition, source.transition)
    assert load_checkpoint(tmp_path / CHECKPOINT).config == config
    halfway, _ = load_model(tmp_path / "step-000003.safetensors")
    same = train(config.replace(steps=3), source=source, device="cpu", progress=False)
    assert torch.equal(weights(halfway), weights(same.model))
    assert not [file for file in tmp_path.iterdir() if file.suffix in (".partial", ".tmp")]


def test_a_snapshot_that_never_comes_is_refused(tmp_path):
    config = TINY.replace(steps=4)
    with pytest.raises(ModelError, match="snapshot 5 lies beyond the run's 4 steps"):
        train(config.replace(snapshots=(2, 5)), tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.iterdir())
    train(config.replace(snapshots=(2,)), tmp_path, device="cpu", progress=False)
    train(config.replace(snapshots=(2, 4, 6), steps=6), tmp_path, device="cpu", progress=False)
    kept = {file.name for file in tmp_path.glob("step-*")}
    assert kept == {f"step-00000{step}.safetensors" for step in (2, 4, 6)}
    with pytest.raises(ModelError, match="is past snapshot 3, at step 6"):
        train(config.replace(snapshots=(2, 3), steps=6), tmp_path, device="cpu", progress=False)


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(TINY.replace(steps=2), tmp_path, device="cpu", progress=False)
    with pytest.raises(ModelError, match="differs in seed, batch|differs in batch, seed"):
        train(TINY.replace(seed=1, batch=4), tmp_path, device="cpu", progress=False)
    with pytest.raises(ModelError, match="differs in source"):
        source = BigramSource.synthetic(65, seed=1)
        train(TINY.replace(steps=2), tmp_path, source=source, device="cpu", progress=False)
    (tmp_path / LOG).unlink()
    with pytest.raises(ModelError, match="missing beside its checkpoint"):
        train(TINY.replace(steps=2), tmp_path, device="cpu", progress=False)


def test_a_run_goes_on_from_its_own_start_and_source_only(tmp_path):
    """Clamped values are those of the start; the marginal says how sequences begin."""
    start = BackcopyTransformer(TINY.model, seed=7)
    source = BigramSource.synthetic(65, seed=1)
    turned = BigramSource(source.marginal.flip(0), source.transition)
    config = TINY.replace(clamp=("values",), triggers=(1, 2, 3), steps=12)
    given = dict(source=source, start=start, device="cpu", progress=False)
    at_once = train(config, **given)
    train(config.replace(steps=5), tmp_path, **given)
    for name, other in (
        ("start", {"start": None}),
        ("start", {"start": BackcopyTransformer(TINY.model, seed=8)}),
        ("source", {"source": turned}),
    ):
        with pytest.raises(ModelError, match=f"differs in {name};"):
            train(config, tmp_path, **{**given, **other})
    same = {"start": copy.deepcopy(start), "source": BigramSource.synthetic(65, seed=1)}
    resumed = train(config, tmp_path, **{**given, **same})
    assert torch.equal(weights(resumed.model), weights(at_once.model))


def test_a_broken_checkpoint_is_one_sentence(tmp_path):
    train(TINY.replace(steps=1), tmp_path, device="cpu", progress=False)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be read as a Bigram-Backcopy checkpoint"):
        train(TINY.replace(steps=1), tmp_path, device="cpu", progress=False)
    with pytest.raises(ModelError, match="There is no checkpoint"):
        load_model(tmp_path / "absent.safetensors")


def test_first_steps_follow_the_optimisers_rules():
    """SGD and AdamW by hand, from gradients taken here."""
    for optimizer in ("sgd", "adamw"):
        config = TINY.replace(optimizer=optimizer, learning_rate=0.01, weight_decay=0.1)
        trainer = Trainer(config, _task(), None, "cpu")
        before = weights(trainer.model).double()
        tokens = trainer.batches[0]
        loss = next_token_loss(trainer.model, tokens)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients]).double()
        trainer._train_step(tokens)
        if optimizer == "sgd":
            expected = before - 0.01 * (gradient + 0.1 * before)
        else:  # bias-corrected first moments are g and g^2
            expected = before - 0.01 * (gradient / (gradient.abs() + 1e-8) + 0.1 * before)
        moved = weights(trainer.model).double()
        torch.testing.assert_close(
            moved, expected, atol=1e-4 if optimizer == "adamw" else 5e-7, rtol=0
        )


def test_muon_moves_matrices_orthogonally_and_leaves_the_rest_to_adamw():
    config = TINY.replace(optimizer="muon", weight_decay=0.0)
    model = BackcopyTransformer(config.model, seed=0)
    muon, adamw = make_optimizers(model, config).parts
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in inside}
    assert names == {
        f"layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc_in", "mlp.fc_out")
    }
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert len(inside) + len(others) == len(list(model.parameters()))
    trainer = Trainer(config, _task(), None, "cpu")
    before = trainer.model.layers[0].mlp.fc_in.weight.detach().clone()
    trainer._train_step(trainer.batches[0])
    weight = trainer.model.layers[0].mlp.fc_in.weight
    step, gradient = map(torch.linalg.svdvals, (weight.detach() - before, weight.grad))
    assert step.median() > 0.6 * step.max()  # orthogonal steps have equal singular values
    assert gradient.median() < 0.4 * gradient.max()


def _task():
    from sinkscope.bb import BigramBackcopy

    return BigramBackcopy()


def test_divergence_is_reported(tmp_path):
    config = TINY.replace(optimizer="sgd", learning_rate=1e6, measure_every=1)
    with pytest.raises(ModelError, match="lower the learning rate"):
        train(config, device="cpu", progress=False)


def test_bf16_and_fp32_learn_alike():
    config = TINY.replace(steps=60)
    full = train(config, device="cpu", progress=False).to_frame()
    half = train(config.replace(precision="bf16"), device="cpu", progress=False).to_frame()
    risks = [f[(f.metric == "bigram_risk") & (f.step == 60)].value.item() for f in (full, half)]
    start = full[(full.metric == "bigram_risk") & (full.step == 0)].value.item()
    assert risks[0] < start - 0.5
    assert risks[1] == pytest.approx(risks[0], abs=0.05)
    assert risks[1] != risks[0]


def test_what_is_clamped_stays():
    config = TINY.replace(steps=30)
    start = BackcopyTransformer(config.model, seed=9)
    free = train(config, start=start, device="cpu", progress=False).to_frame()
    for clamp, metric in (("values", "value_norm"), ("logits", "logit_gap")):
        clamped = train(
            config.replace(clamp=(clamp,)), start=start, device="cpu", progress=False
        ).to_frame()
        curve = clamped[clamped.metric == metric].groupby(["layer", "head"])["value"]
        moving = free[free.metric == metric].groupby(["layer", "head"])["value"]
        # The clamped value still passes through W_O, which trains: only the vector stays.
        if clamp == "logits":
            assert (curve.std() < 1e-6).all()
        assert (moving.std() > 1e-3).all()
    forced = train(config.replace(clamp=("sink",)), device="cpu", progress=False).to_frame()
    assert (forced[forced.metric == "sink_attention"].value > 0.999).all()
    with pytest.raises(ModelError, match="must name some of values, logits, sink"):
        train(config.replace(clamp=("keys",)), device="cpu", progress=False)


def test_clamped_values_are_the_starting_models():
    from sinkscope.bb.clamping import Clamp
    from sinkscope.bb.model import recorder

    start = BackcopyTransformer(TINY.model, seed=1)
    later = BackcopyTransformer(TINY.model, seed=2)
    task = _task()
    tokens = task.sample(3, 16)
    first, record_first = recorder("hook_v")
    now, record = recorder("hook_v")
    with torch.no_grad():
        start(tokens, tap=record_first)
        clamp = Clamp(("values",), start, task).tap(tokens)
        later(tokens, tap=lambda name, value: record(name, clamp(name, value)))
    for name, value in now.items():
        assert torch.equal(value[:, 0], first[name][:, 0])
        assert not torch.equal(value[:, 1:], first[name][:, 1:])


def test_impossible_configurations_are_refused():
    with pytest.raises(ModelError, match="expected one of adamw, sgd, muon"):
        TrainConfig(optimizer="adam")
    with pytest.raises(ModelError, match="do not fit a context of 256"):
        TrainConfig(length=300)
    with pytest.raises(ModelError, match="precision is 'fp8'"):
        TrainConfig(precision="fp8")
    for name in ("layers", "heads", "width"):
        with pytest.raises(ModelError, match=f"{name} is 0; expected a whole number from 1"):
            ModelConfig(**{name: 0})
    for name in ("batch", "measure_every", "measure_prompts", "save_every"):
        with pytest.raises(ModelError, match=f"{name} is 0; expected a whole number from 1"):
            TrainConfig(**{name: 0})
    with pytest.raises(ModelError, match="seed is -1; expected a whole number from 0"):
        TrainConfig(seed=-1)


def test_paper_settings_are_the_defaults():
    config = TrainConfig()
    assert (config.model.layers, config.model.width, config.model.vocab) == (1, 256, 67)
    assert (config.batch, config.length, config.steps, config.seed) == (512, 256, 10_000, 42)
    assert (config.learning_rate, config.weight_decay, config.betas) == (3e-4, 1e-4, (0.9, 0.99))
    assert config.replace(optimizer="sgd").learning_rate == 0.03
    assert config.replace(attention="relu", layers=3).model.layers == 3
