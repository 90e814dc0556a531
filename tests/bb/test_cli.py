"""`sinkscope bb`: what it refuses, it refuses in a sentence."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from sinkscope.bb import ModelConfig, TrainConfig, growth_laws, train
from sinkscope.bb.checkpoint import load_checkpoint
from sinkscope.bb.training import Trainer
from tests.cli.test_commands import run


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("train", "--seed", -1), "Invalid value for '--seed'"),
        (("train", "--snapshots", "1, 5"), "snapshot 5 lies beyond the run's 2 steps"),
        (("train", "--heads", 3), "width 64 must be a multiple of the 3 heads"),
        (("compare", "--attention", ","), "--attention ',' names nothing"),
        (("train", "--device", "foo"), "sinkscope: There is no device 'foo'"),
        (("compare", "--device", "foo"), "sinkscope: There is no device 'foo'"),
        (("train", "--device", f"cuda:{torch.cuda.device_count()}"), "There is no device 'cuda:"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(command, sentence, tmp_path, capsys):
    code, out, err = run("bb", *command, "--steps", 2, "--out", tmp_path, capsys=capsys)
    assert code == 2 and out == ""
    assert sentence in err and "Traceback" not in err
    assert not list(tmp_path.rglob("*.*"))


def test_ctrl_c_says_from_where_the_run_goes_on(tmp_path, capsys, monkeypatch):
    """What is said is true: the run ends as one that nobody interrupted."""
    asked = ("bb", "train", "--steps", 6, "--layers", 1, "--json")
    _, whole, _ = run(*asked, capsys=capsys)
    step = Trainer._train_step

    def pressed(self: Trainer, tokens: torch.Tensor) -> torch.Tensor:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", pressed)
        code, out, err = run(*asked, "--out", tmp_path / "run", capsys=capsys)
    assert (code, out) == (130, "")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert f"the same command continues from {checkpoint}." in err and "Traceback" not in err
    assert load_checkpoint(checkpoint).step == 4
    code, out, _ = run(*asked, "--out", tmp_path / "run", capsys=capsys)
    assert code == 0 and json.loads(out) == json.loads(whole)


def test_a_model_with_several_heads_a_layer(tmp_path, capsys):
    arguments = ("--heads", 4, "--layers", 2, "--steps", 1, "--out", tmp_path / "run", "--json")
    code, _, _ = run("bb", "train", *arguments, capsys=capsys)
    assert code == 0
    config = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").config
    assert (config.model.heads, config.model.layers, config.model.d_head) == (4, 2, 16)


def test_several_operators_may_have_spaces_between_them_and_no_figure_is_a_dash(capsys):
    code, out, _ = run(
        "bb", "compare", "--attention", "softmax, relu", "--steps", 2, "--seeds", 1, "--layers", 1,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0 and "relu adamw" in out and "–" in out and "nan" not in out


def test_growth_laws_are_those_of_each_run(tmp_path, capsys):
    """Two runs that differ in their learning rate alone: what is fitted to each by itself."""
    config = TrainConfig(
        model=ModelConfig(width=8, context=12), batch=4, length=12, steps=400, measure_every=50,
        measure_prompts=8,
    )  # fmt: skip
    folders, want = [], []
    for rate in (3e-3, 1e-4):
        folders.append(tmp_path / str(rate))
        one = config.replace(learning_rate=rate)
        fits, _ = growth_laws(
            train(one, folders[-1], device="cpu", progress=False).to_frame(), start=200
        )
        name = f"1L softmax adamw, learning rate {rate}"
        want += [(name, *row) for row in fits[["metric", "law", "slope"]].itertuples(index=False)]
    code, out, _ = run("bb", "dynamics", *folders, "--json", capsys=capsys)
    assert code == 0
    laws = json.loads(out)["laws"]
    got = [(law["run"], law["metric"], law["law"], law["slope"]) for law in laws]
    assert [row[:3] for row in got] == [row[:3] for row in want]
    assert [row[3] for row in got] == pytest.approx([row[3] for row in want])
