"""What the commands say reaches terminals of any encoding, and processes that are told to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama as a folder, and ids for it."""
    where = tmp_path_factory.mktemp("made")
    BY_NAME["llama"].build().save_pretrained(where / "model")
    ids = BY_NAME["llama"].tokens(prompts=2, length=8).tolist()
    (where / "tokens.json").write_text(json.dumps(ids))
    return where / "model", where / "tokens.json"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
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
