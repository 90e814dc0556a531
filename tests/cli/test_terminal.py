"""What the commands say reaches terminals of any encoding, and processes that are told to stop."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinkscope.cli._common import terminal
from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama as a folder, and ids for it."""
    where = tmp_path_factory.mktemp("made")
    BY_NAME["llama"].build().save_pretrained(where / "model")
    ids = BY_NAME["llama"].tokens(prompts=2, length=8).tolist()
    (where / "tokens.json").write_text(json.dumps(ids))
    return where / "model", where / "tokens.json"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_summary_reaches_a_terminal_of_any_encoding(made, encoding: str) -> None:
    model, ids = made
    done = subprocess.run(
        [sys.executable, "-m", "sinkscope", "scan", model, "--tokens", ids, "--metrics", "core"],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding)
    assert "sink" in out.lower() and "\\u2" not in out
    assert ("ε" in out) == (encoding == "utf-8")


SAID = "ε = 0.3 × 2 – ‖Δ‖ ≥ ∞ … ─│━ ρ 日 🙂"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"e = 0.3 x 2 - |d| >= inf ~ -|- rho \u65e5 \U0001f642"),
        ("cp437", r"ε = 0.3 x 2 - |d| ≥ ∞ ~ ─│- rho \u65e5 \U0001f642"),
        ("koi8-r", r"e = 0.3 x 2 - |d| ≥ inf ~ ─│- rho \u65e5 \U0001f642"),
        ("shift_jis", r"ε = 0.3 × 2 - ‖Δ‖ >= ∞ … ─│━ ρ 日 \U0001f642"),
    ],
)
def test_what_an_encoding_lacks_has_a_stand_in(encoding: str, shown: str, monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    with terminal():
        out.write(SAID)
    assert out.buffer.getvalue().decode(encoding) == shown


def test_a_posix_locale_is_enough() -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for asked, code in (("models",), 0), (("scan", "--help"), 0), (("scan", "‖nowhere‖"), 2):
        done = subprocess.run(
            [sys.executable, "-m", "sinkscope", *asked],
            env={name: v for name, v in os.environ.items() if name != "LANG"} | plain,
            capture_output=True,
        )
        assert done.returncode == code, done.stderr
        assert (done.stdout + done.stderr).decode("ascii") and b"Traceback" not in done.stderr
