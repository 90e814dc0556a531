"""`sinkscope report` and `sinkscope compare`: kept files, no model."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from sinkscope.cli import app
from sinkscope.errors import ReportError, SinkscopeError
from tests.report.factory import synthetic_report


@pytest.fixture
def kept(tmp_path):
    before = synthetic_report()
    after = dataclasses.replace(before, sink_attention=before.sink_attention / 2)
    return [r.save(tmp_path / f"{name}.nc") for r, name in ((before, "before"), (after, "after"))]


def test_report_shows_a_kept_report_and_makes_its_page(kept, tmp_path):
    done = CliRunner().invoke(app, ["report", str(kept[0])])
    assert done.exit_code == 0 and "Strongest sink heads" in done.stdout
    assert done.stdout.rstrip().endswith(f"wrote {tmp_path / 'before.html'}")
    assert "<title>Attention sinks of synthetic" in (tmp_path / "before.html").read_text("utf-8")
    done = CliRunner().invoke(app, ["report", str(kept[0]), "--json"])
    assert json.loads(done.stdout)["settings"]["model"] == "synthetic"


def test_compare_says_what_changed_and_draws_it(kept, tmp_path):
    done = CliRunner().invoke(app, ["compare", *map(str, kept)])
    assert done.exit_code == 0 and "sink_attention [probability]" in done.stdout
    assert "wrote" not in done.stdout
    path = tmp_path / "change.html"
    done = CliRunner().invoke(app, ["compare", *map(str, kept), "--page", str(path)])
    assert f"wrote {path}" in done.stdout
    page = path.read_text("utf-8")
    assert "What changed?" in page and "Sink attention: after minus before" in page


def test_reports_of_other_tokens_are_refused(kept, tmp_path):
    other = synthetic_report(seed=4).save(tmp_path / "other.nc")
    done = CliRunner().invoke(app, ["compare", str(kept[0]), str(other)])
    assert isinstance(done.exception, ReportError) and "their tokens differ" in str(done.exception)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_page_does_not_replace_a_report(kept, tmp_path, command):
    content = kept[0].read_bytes()
    files = map(str, kept if command == "compare" else kept[:1])
    done = CliRunner().invoke(app, [command, *files, "--page", str(kept[0])])
    assert isinstance(done.exception, SinkscopeError) and "end in .html" in str(done.exception)
    named = kept[0].rename(tmp_path / "r.html")
    if command == "report":
        done = CliRunner().invoke(app, [command, str(named)])
        assert isinstance(done.exception, ReportError) and "itself" in str(done.exception)
    assert named.read_bytes() == content
