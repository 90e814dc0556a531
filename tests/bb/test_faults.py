"""Damaged files, a full disk, a second process: one sentence each, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkscope import output
from sinkscope.bb import (
    BigramSource,
    ModelConfig,
    TrainConfig,
    compare,
    dynamics,
    load_model,
    train,
)
from sinkscope.bb.run_folder import CHECKPOINT, LOG, exclusive
from sinkscope.errors import ModelError, ReportError, SinkscopeError, TextError

from .test_cli import run as command

TINY = TrainConfig(
    model=ModelConfig(width=8, context=12), batch=4, length=12, steps=6, measure_every=3,
    measure_prompts=8, save_every=3,
)  # fmt: skip
QUIET = dict(device="cpu", progress=False)


def rewrite(path: Path, metadata: dict[str, Any] | None = None, **tensors: torch.Tensor) -> None:
    """Change a checkpoint's metadata (None: leave the entry out) and its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    kept |= {key: json.dumps(value) for key, value in (metadata or {}).items()}
    kept = {key: text for key, text in kept.items() if text != json.dumps(MISSING)}
    weights = {**load_file(path), **tensors}
    save_file({name: t for name, t in weights.items() if t.numel()}, path, kept)


MISSING = "missing"
CONFIG = json.loads(json.dumps(asdict(TINY)))
WEIGHT = "weights.layers.0.attn.q.weight"
DAMAGES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "no configuration": ({"config": MISSING}, {}, "says no config"),
    "a list for it": ({"config": [1, 2]}, {}, "no object of settings"),
    "null for it": ({"config": None}, {}, "no object of settings"),
    "an unknown setting": ({"config": {**CONFIG, "magic": 1}}, {}, "'magic', which is not known"),
    "an unknown attention": (
        {"config": {**CONFIG, "model": {**CONFIG["model"], "attention": "x"}}}, {},
        "attention is 'x'",
    ),
    "a rate that is a word": ({"config": {**CONFIG, "eps": "small"}}, {}, "eps is 'small'"),
    "a step that is a string": ({"step": "6"}, {}, "step is '6'"),
    "a negative step": ({"step": -1}, {}, "step is -1"),
    "a step that is true": ({"step": True}, {}, "step is True"),
    "a source that is null": ({"source": None}, {}, "TypeError"),
    "a missing weight": ({}, {WEIGHT: torch.empty(0)}, "lack layers.0.attn.q.weight"),
    "a misshapen weight": ({}, {WEIGHT: torch.zeros(8, 7)}, r"shape \(8, 7\)"),
    "a weight of another model": ({}, {"weights.extra": torch.zeros(1)}, "no extra"),
    "a weight that is NaN": ({}, {WEIGHT: torch.full((8, 8), torch.nan)}, "holds NaN"),
    "a momentum that is NaN": (
        {}, {"optimizer.0.0.exp_avg": torch.full((67, 8), torch.nan)}, "holds NaN",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and a snapshot; read-only."""
    folder = tmp_path_factory.mktemp("run")
    train(TINY.replace(snapshots=(3,)), folder, **QUIET)
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(damage, trained, tmp_path, capsys):
    metadata, tensors, sentence = DAMAGES[damage]
    folder = copied(trained, tmp_path / "run")
    for name in (CHECKPOINT, "step-000003.safetensors"):
        if not (name != CHECKPOINT and any(key.startswith("optimizer") for key in tensors)):
            rewrite(folder / name, metadata, **tensors)
            with pytest.raises(ModelError, match=sentence) as refused:
                load_model(folder / name)
            assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match=sentence):
        train(TINY, folder, **QUIET)
    code, out, err = command("bb", "dynamics", folder, capsys=capsys)
    assert (code, out) == (2, "") and "Traceback" not in err
    code, out, err = command("dynamics", folder / "step-000003.safetensors", capsys=capsys)
    if "optimizer.0.0.exp_avg" not in tensors:
        assert (code, out) == (2, "") and "Traceback" not in err


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff" * 40, b'{"a": 1}', b"\x08" + b"\0" * 7 + b"{"]
)
def test_a_file_that_is_no_checkpoint_is_one_sentence(content, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(content)
    for use in (load_model, lambda path: train(TINY, path.parent, **QUIET)):
        with pytest.raises(ModelError, match="cannot be read as a Bigram-Backcopy checkpoint"):
            use(tmp_path / CHECKPOINT)


LOGS = {
    "empty": b"",
    "binary": b"\xff\xfe\x00" * 9,
    "another table": b"a,b\n1,2\n",
    "a step that is a word": b"step,metric,layer,head,value\nsix,loss,-1,-1,1.0\n",
    "a negative step": b"step,metric,layer,head,value\n-6,loss,-1,-1,1.0\n",
    "a value that is a word": b"step,metric,layer,head,value\n6,loss,-1,-1,much\n",
    "a row cut short": b"step,metric,layer,head,value\n6,loss,-1,-1\n",
}


@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_is_one_sentence(damage, trained, tmp_path, capsys):
    folder = copied(trained, tmp_path / "run")
    (folder / LOG).write_bytes(LOGS[damage])
    for use in (lambda: train(TINY, folder, **QUIET), lambda: dynamics(folder)):
        with pytest.raises(ModelError, match=r"log\.csv cannot be read as the log of a run"):
            use()
    code, out, err = command("bb", "dynamics", folder, capsys=capsys)
    assert (code, out) == (2, "") and "Traceback" not in err


def test_a_log_that_is_a_folder_or_lacks_rows_is_one_sentence(trained, tmp_path):
    folder = copied(trained, tmp_path / "run")
    lines = (folder / LOG).read_bytes().splitlines(keepends=True)
    (folder / LOG).write_bytes(b"".join(lines[:-5]))
    with pytest.raises(ModelError, match="not the log that its checkpoint was saved with"):
        train(TINY, folder, **QUIET)
    (folder / LOG).unlink()
    (folder / LOG).mkdir()
    with pytest.raises(ModelError, match="cannot be read as the log of a run"):
        dynamics(folder)


def test_rows_of_steps_that_a_kill_undid_are_left_out(trained, tmp_path):
    """The log is written before the checkpoint, so it may be ahead."""
    folder = copied(trained, tmp_path / "run")
    with (folder / LOG).open("a") as log:
        log.write("9,loss,-1,-1,1.0\n")
    assert train(TINY, folder, **QUIET).to_frame()["step"].max() == 6


def test_a_log_reads_back_to_the_same_numbers(trained):
    """With values that have no short decimal, and without one."""
    frame = dynamics(trained, metrics=None)
    run = train(TINY, **QUIET).to_frame()
    assert frame["value"].tolist() == pytest.approx(run["value"].tolist(), abs=0, nan_ok=True)


def test_files_of_the_version_before_are_resumed(trained, tmp_path):
    """Without the log's digest, with `hold` for `clamp`, and the log with CSV's own line ends."""
    folder = copied(trained, tmp_path / "run")
    config = {("hold" if key == "clamp" else key): value for key, value in CONFIG.items()}
    rewrite(folder / CHECKPOINT, {"config": config, "log": MISSING})
    (folder / LOG).write_bytes((folder / LOG).read_bytes().replace(b"\n", b"\r\n"))
    longer, at_once = (train(TINY.replace(steps=9), place, **QUIET) for place in (folder, None))
    for one, other in zip(longer.model.parameters(), at_once.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_former_names_warn():
    with pytest.warns(DeprecationWarning, match="now called `clamp`"):
        assert TrainConfig(hold=("values",)) == TrainConfig(clamp=("values",))
    with pytest.warns(DeprecationWarning, match="now called `clamp`"):
        assert TrainConfig(clamp=("sink",)).hold == ("sink",)
    with pytest.warns(DeprecationWarning, match="now called `to_frame`"):
        assert len(train(TINY.replace(steps=1), **QUIET).frame())


def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path, monkeypatch, capsys):
    """Every write of a file fails in turn; the same command then goes on to the same end."""
    train(TINY.replace(steps=3), tmp_path, **QUIET)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(output.os, "fsync", full)
        with pytest.raises(ReportError, match="cannot be written: No space left on device"):
            train(TINY, tmp_path, **QUIET)
        folder = tmp_path / "other"
        code, out, err = command("bb", "train", "--steps", 1, "--out", folder, capsys=capsys)
        assert (code, out) == (2, "") and "No space left on device" in err
        assert "Traceback" not in err
        assert {file.name for file in folder.iterdir()} <= {".lock"}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    resumed, at_once = (train(TINY, place, **QUIET) for place in (tmp_path, None))
    for one, other in zip(resumed.model.parameters(), at_once.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_trainings_do_not_share_a_folder(tmp_path, capsys):
    """The lock is held by another process, and free again when that process is gone."""
    code = (
        "import sys, time; from sinkscope.bb.run_folder import exclusive\n"
        "with exclusive(sys.argv[1]):\n print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(ModelError, match="Another process is training in"):
            train(TINY, tmp_path, **QUIET)
        exit_code, out, err = command(
            "bb", "compare", "--steps", 1, "--out", tmp_path, capsys=capsys
        )
        assert (exit_code, out) == (2, "") and "Another process is training in" in err
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert train(TINY, tmp_path, **QUIET).log.rows


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    orphans = [
        f".{CHECKPOINT}.0123abcd.tmp", f".{LOG}.0123abcd.tmp", f"{CHECKPOINT}.partial",
        ".step-000003.safetensors.0a0a0a0a.tmp", f"{LOG}.partial",
    ]  # fmt: skip
    others = ["notes.tmp", ".checkpoint.tmp", "data.partial", ".mine.csv.0123abcd.tmp"]
    for name in (*orphans, *others):
        (tmp_path / name).write_text("half")
    train(TINY.replace(steps=1), tmp_path, **QUIET)
    kept = {file.name for file in tmp_path.iterdir()}
    assert kept == {*others, CHECKPOINT, LOG, ".lock"}


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ReportError, match="is a link and not a lock"), exclusive(tmp_path / "run"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be used for a run"):
        train(TINY, tmp_path / "file", **QUIET)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"attentions": ("softmax", "tanh")}, "attention is 'tanh'"),
        ({"optimizers": ("adamw", "adam")}, "optimizer is 'adam'"),
        ({"seeds": (1, -1)}, "seed is -1"),
        ({"attentions": ()}, "nothing to compare"),
        ({"config": TINY.replace(triggers=(70,))}, "must be symbol ids"),
    ],
)
def test_a_comparison_is_refused_before_any_training(wrong, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("sinkscope.bb.comparison.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SinkscopeError, match=sentence):
        compare(**{"config": TINY, "folder": tmp_path / "new", **QUIET, **wrong})
    assert not (tmp_path / "new").exists()


def test_the_task_of_a_text_is_counted_in_it(tmp_path, capsys):
    """On a text whose bigrams are few enough to count by hand: a b a c a b, k = 1 (a)."""
    file = tmp_path / "text.txt"
    file.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}abacab".encode())
    source = BigramSource.from_file(file)
    assert source.symbols == ("a", "b", "c") and source.name == "text.txt"
    assert source.transition.tolist() == [[0, 2 / 3, 1 / 3], [1, 0, 0], [1, 0, 0]]
    out = tmp_path / "run"
    asked = ("bb", "train", "--text", file, "-k", 1, "--steps", 2, "--json", "--out", out)
    assert command(*asked, capsys=capsys)[0] == 0
    model, task = load_model(out / CHECKPOINT)
    assert task.triggers == (0,) and torch.equal(task.source.transition, source.transition)
    assert model.config.vocab == task.vocab == 5
    code, _, err = command("bb", "train", "--steps", 2, "--out", out, capsys=capsys)
    assert code == 2 and "differs in" in err and "source" in err
    with pytest.raises(TextError, match=r"absent\.txt cannot be read: No such file"):
        BigramSource.from_file(tmp_path / "absent.txt")
    file.write_text("abacab", encoding="utf-16")
    assert torch.equal(BigramSource.from_file(file).transition, source.transition)
    file.write_text("abacab", encoding="utf-16-le")  # zero bytes would be symbols
    with pytest.raises(TextError, match="has zero bytes"):
        BigramSource.from_file(file)
    file.write_bytes(b"\xff\x00")
    code, _, err = command("bb", "train", "--text", file, "--steps", 2, capsys=capsys)
    assert code == 2 and "cannot be read as UTF-8 text" in err and "Traceback" not in err
