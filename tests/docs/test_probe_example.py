"""The example that trains a probe runs from beginning to end, where scikit-learn is installed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "prose_or_code.py"


def test_the_probe_is_trained_and_tested_on_other_prompts(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(small_model), "12"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "sink attention is higher on code in" in out
    found = re.findall(r"ROC AUC ([\d.]+) on 8 prompts not trained on", out)
    assert len(found) == 4 and all(0 <= float(area) <= 1 for area in found)
