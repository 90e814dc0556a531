"""A folder of results belongs to one scan: nothing stale, nothing mixed, and Ctrl-C is answered."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sinkscope.cli import scan as command
from tests.cli.test_commands import run
from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    BY_NAME["llama"].build().save_pretrained(where)
    return where


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(BY_NAME["llama"].tokens(prompts=2, length=8).tolist()))
    return file


def files(folder: Path) -> list[str]:
    """The files of results in a folder; the lock is hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_second_scan_leaves_no_table_of_the_first(folder, ids, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    base = ("scan", folder, "--tokens", ids, "--out", out)
    assert run(*base, "--metrics", "core", capsys=capsys)[0] == 0
    assert (out / "heads.csv").exists()
    code, said, _ = run(*base, "--metrics", "residual", capsys=capsys)
    assert code == 0 and "no heads.csv" in said
    size = (out / "report.nc").stat().st_size / 1e6
    assert f"wrote {out / 'report.nc'}, {size:.3g} MB" in said
    assert files(out) == ["report.html", "report.nc"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_in_the_middle_leaves_nothing_unfinished(folder, ids, tmp_path, capsys) -> None:
    """Neither a partial file nor a lock that keeps the next scan out."""
    out, long = tmp_path / "out", tmp_path / "long.json"
    long.write_text(json.dumps(BY_NAME["llama"].tokens(prompts=4000, length=60).tolist()))
    command = [sys.executable, "-m", "sinkscope", "scan", folder, "--out", out, "--batch", 1]
    process = subprocess.Popen([*map(str, command), "--tokens", str(long)])
    while not (out / ".lock").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert files(out) == []
    assert run("scan", folder, "--out", out, "--tokens", ids, capsys=capsys)[0] == 0


def test_a_scan_on_two_devices(folder, ids, tmp_path, capsys) -> None:
    base = ("scan", folder, "--tokens", ids, "--metrics", "core", "--batch", 1, "--json")
    alone, shared = (
        run(*base, *more, capsys=capsys)[:2] for more in ((), ("--devices", "cpu,cpu"))
    )
    assert shared == alone and alone[0] == 0
    code, _, said = run(*base, "--devices", "cpu,cpu", "--device", "cpu", capsys=capsys)
    assert code != 0 and "--device cpu and --devices cpu,cpu are both given" in said


def test_two_processes_do_not_write_to_one_folder(folder, ids, tmp_path, capsys) -> None:
    script = (
        "import sys\nfrom sinkscope.output import locked\n"
        "with locked(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        code, _, said = run("scan", folder, "--tokens", ids, "--out", out, capsys=capsys)
        other.communicate()
    assert code == 2 and "Another process is writing to" in said
    assert files(out) == []
    assert run("scan", folder, "--tokens", ids, "--out", out, capsys=capsys)[0] == 0


@pytest.mark.parametrize("kept", ["nothing", "earlier", "half"])
def test_ctrl_c_says_what_is_kept(kept: str, tmp_path: Path, capsys) -> None:
    if kept == "earlier":
        (tmp_path / "report.nc").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), command.interruptible(tmp_path):
        if kept == "half":
            (tmp_path / "report.nc").write_text("new")
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert said.startswith("Interrupted; ") and said.count("\n") == 1
    sentence = {
        "nothing": "nothing was saved",
        "earlier": "report.nc in .* of an earlier scan",
        "half": "report.nc in .* written, the other files of this scan were not",
    }[kept]
    assert re.search(sentence, said)


def test_ctrl_c_without_a_folder(capsys) -> None:
    with pytest.raises(KeyboardInterrupt), command.interruptible(None):
        raise KeyboardInterrupt
    assert "nothing was saved" in capsys.readouterr().err


def test_a_scan_of_single_tokens_says_that_it_means_nothing(
    folder, tmp_path, capsys, recwarn
) -> None:
    file = tmp_path / "one.json"
    file.write_text("[[5], [6]]")
    code, said, _ = run("scan", folder, "--tokens", file, "--metrics", "core", capsys=capsys)
    assert code == 0 and "single token" in said and "--length of 2 or more" in said


def test_weights_of_zero_are_measured(tmp_path, ids, capsys) -> None:
    """Uniform attention, no norms, no peak; no division by them stops the page either."""
    model = BY_NAME["llama"].build()
    for weight in model.parameters():
        weight.data.zero_()
    model.save_pretrained(tmp_path / "zero")
    where = tmp_path / "out"
    code, said, _ = run("scan", tmp_path / "zero", "--tokens", ids, "--out", where, capsys=capsys)
    assert code == 0 and "wrote" in said
    assert files(where) == ["heads.csv", "report.html", "report.nc"]
    # Query i sees i + 1 keys alike, and those after the sink are averaged.
    uniform = sum(1 / (i + 1) for i in range(1, 8)) / 7
    heads = pd.read_csv(where / "heads.csv")["sink_attention [probability]"]
    assert np.allclose(heads, uniform, atol=1e-6)


ODD = {
    "a name longer than any": (["scan", "x" * 300], "x" * 100),
    "a text's name longer than any": (["scan", "{folder}", "--texts", "y" * 300], "no text source"),
    "a folder's name longer than any": ([*"scan {folder} --tokens {ids} --out".split(), "o" * 300],
                                        "too long"),
    "a CPU that is not there": ("scan {folder} --tokens {ids} --device cpu:99".split(), "cpu:99"),
    "a seed beyond 64 bits": ("scan bb-3l --seed 99999999999999999999".split(), "64 bits"),
    "a length beyond 64 bits": ("scan bb-3l --length 99999999999999999999".split(), "64 bits"),
    "a batch beyond 64 bits": ("scan {folder} --tokens {ids} --batch 99999999999999999999".split(),
                               "64 bits"),
    "a size beyond memory": ("bench --shape {folder} --sizes 99999999999999999999x8".split(),
                             "number of tokens of a batch"),
    "half a character": (["scan", "bb-3l", "--texts", "\ud83d"], "no text source"),
    "a zero byte": (["scan", "a\0b"], "cannot be the name"),
    "a threshold of nan": ("scan {folder} --tokens {ids} --epsilon nan".split(), "epsilon is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_values_end_in_a_sentence(case: str, folder, ids, capsys) -> None:
    arguments, sentence = ODD[case]
    filled = [word.format(folder=folder, ids=ids) for word in arguments]
    code, out, said = run(*filled, capsys=capsys)
    assert (code, out) == (2, "")
    assert sentence in said and "Traceback" not in said
