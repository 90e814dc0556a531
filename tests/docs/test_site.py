"""The documentation builds without a warning, is complete, and asks nothing of the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import hooks

sys.path.pop(0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def own_pages(site: Path) -> list[Path]:
    """The pages made of the documentation, not the drawn lessons, which have tests of their own."""
    return [page for page in site.rglob("*.html") if page.parent != site / "lessons"]


def test_every_public_name_has_an_entry(site: Path) -> None:
    packages = ["", ".plot", ".experiments", ".interventions", ".metrics", ".bb"]
    for package in packages:
        full = f"sinkscope{package}"
        page = (site / "reference" / f"{full.rpartition('.')[2]}.html").read_text("utf-8")
        names = [one for one in hooks.public_names(full) if not hooks._is_package(one)]
        assert names
        for one in names:
            assert f'id="{one}"' in page, one


def test_every_field_and_every_command_is_listed(site: Path) -> None:
    from sinkscope.report.report import SinkReport

    fields = (site / "reference" / "fields.html").read_text("utf-8")
    for name in SinkReport.variables():
        assert f"<code>{name}</code>" in fields, name
    commands = (site / "commands.html").read_text("utf-8")
    for name in (
        "scan",
        "waiver",
        "dormant",
        "dynamics",
        "trace-peak",
        "life",
        "experts",
        "vocabulary",
        "spikes",
        "precision",
        "stream",
        "bench",
    ):
        assert f'id="sinkscope-{name}"' in commands, name
    assert 'id="sinkscope-bb-train"' in commands and "--snapshots" in commands


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)=["']?(?:https?:)?//""")
    imported = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//""")
    for page in own_pages(site):
        assert not loaded.search(page.read_text("utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not imported.search(sheet.read_text("utf-8")), sheet


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "concepts.html").read_text("utf-8")
    assert page.count('display="block"') >= 10
    assert "\\frac" not in page and "\\operatorname" not in page
    assert 'class="arithmatex"' not in page


def test_pages_adapt_to_phones_and_to_the_dark(site: Path) -> None:
    page = (site / "index.html").read_text("utf-8")
    assert re.search(r"""name=["']?viewport["']? content=["']width=device-width""", page)
    assert "(prefers-color-scheme: dark)" in page


def test_the_keyboard_reaches_tables_that_scroll(site: Path) -> None:
    page = (site / "results.html").read_text("utf-8")
    assert page.count("<table") > 5 and page.count("<table") == page.count('<table tabindex="0"')
