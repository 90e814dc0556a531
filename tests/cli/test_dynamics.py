"""`sinkscope bb train --snapshots`, then `sinkscope dynamics` on what it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope import bb
from sinkscope.cli import app
from sinkscope.errors import SinkscopeError, TextError
from sinkscope.experiments.dynamics import dynamics


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that kept two of them."""
    where = tmp_path_factory.mktemp("run")
    done = run("bb", "train", "--steps", 4, "--snapshots", "1, 4", "--out", where)
    assert done.exit_code == 0, done.output
    assert "1L softmax adamw, seed 42, step 4" in done.output
    assert "value norm of BOS" in done.output and " nat" in done.output
    return where


def test_the_command_says_what_python_says(folder, tmp_path) -> None:
    files = sorted(folder.glob("step-*.safetensors"))
    assert [file.name for file in files] == ["step-000001.safetensors", "step-000004.safetensors"]
    done = run("dynamics", *files, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    want = dynamics(None, files, progress=False)
    assert found["step"] == [1, 4]
    for name, curve in want.overview().items():
        torch.testing.assert_close(torch.tensor(found["curves"][name]), curve)
    assert {"dynamics.json", "dynamics.csv", "dynamics.html"} <= {
        file.name for file in tmp_path.iterdir()
    }
    # The loss that the run itself logged, on other sequences of the same task.
    model, task = bb.load_model(files[1])
    tokens = task.sample(64, 64, seed=9)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:])
    assert found["curves"]["loss"][1] == pytest.approx(float(nll), rel=0.02)


def test_words_come_without_json(folder) -> None:
    done = run("dynamics", folder / "step-000004.safetensors")
    assert done.exit_code == 0, done.output
    assert "One checkpoint, step 4:" in done.output and "bigram-backcopy" in done.output


def test_prompts_and_length_hold_for_snapshots_too(folder, tmp_path) -> None:
    file = folder / "step-000004.safetensors"
    done = run("dynamics", file, "--prompts", 3, "--length", 20, "--seed", 5, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "T = 20 " in done.output and " 3 × bigram-backcopy" in done.output
    report = ss.load_report(tmp_path / "step-4.nc")
    assert torch.equal(report.tokens, bb.load_model(file)[1].sample(3, 20, 5))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--length", 65), "whose context is 64; give 2 to 64"),
        (("--bos", "never"), "has a BOS policy of its own; leave out 'never'"),
    ],
)
def test_what_a_snapshots_task_cannot_be(options, reason, folder) -> None:
    done = run("dynamics", folder / "step-000004.safetensors", *options)
    assert isinstance(done.exception, TextError)
    assert reason in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("bb", "train", "--snapshots", "5"), "needs --out"),
        (("bb", "train", "--snapshots", "5,x", "--out", "."), "names no steps"),
        (("dynamics", "1000"), "name the model"),
    ],
)
def test_refusals(arguments, reason, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert isinstance(done.exception, SinkscopeError)
    assert reason in str(done.exception)
