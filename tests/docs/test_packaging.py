"""Wheel and sdist hold what they should, and nothing says another version than pyproject.toml."""

from __future__ import annotations

import email
import os
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import hatchling.build
import pytest

from tests.docs.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str], str]:
    """The names in the wheel, those in the sdist, and the wheel's metadata."""
    folder = tmp_path_factory.mktemp("dist")
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        wheel = folder / hatchling.build.build_wheel(str(folder))
        sdist = folder / hatchling.build.build_sdist(str(folder))
    finally:
        os.chdir(here)
    with zipfile.ZipFile(wheel) as file:
        metadata = next(name for name in file.namelist() if name.endswith("/METADATA"))
        in_wheel, text = file.namelist(), file.read(metadata).decode()
    with tarfile.open(sdist) as file:
        in_sdist = [name.partition("/")[2] for name in file.getnames()]
    return in_wheel, in_sdist, text


def test_the_wheel_holds_the_whole_package_and_nothing_else(built) -> None:
    in_wheel, _, _ = built
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sinkscope").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "sinkscope/py.typed",
        "sinkscope/__init__.pyi",
        "sinkscope/plot/__init__.pyi",
    } <= package
    assert {name for name in in_wheel if not name.startswith("sinkscope-")} == package


def test_the_sdist_can_be_tested_and_documented(built) -> None:
    _, in_sdist, _ = built
    for name in (
        "pyproject.toml", "constraints.txt", "Makefile", "mkdocs.yml", "README.md", "LICENSE",
        "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "docs/hooks.py", "docs/smollm2.png",
        "sinkscope/py.typed", "tests/conftest.py", "tests/docs/test_packaging.py",
        "examples/readme_picture.py", "notebooks/01_what_is_an_attention_sink.ipynb",
    ):  # fmt: skip
        assert name in in_sdist, name
    assert not [name for name in in_sdist if re.search(r"(^|/)(out|\.venv|__pycache__)/", name)]


def test_metadata(built) -> None:
    metadata = email.message_from_string(built[2])
    assert metadata["Name"] == "sinkscope" and metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Measure, explain and control attention sinks" in metadata.get_payload()
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    for page in ("README.md", "docs/howto/cite.md"):
        text = (ROOT / page).read_text("utf-8")
        assert re.search(r"version = \{(.*?)\}", text)[1] == version, page
