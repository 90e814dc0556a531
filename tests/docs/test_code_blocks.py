"""What the README and the documentation tell people to type works as it stands there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

import sinkscope as ss
from sinkscope.capture.observers import base
from sinkscope.cli import app
from tests.docs.pages import PAGES, REAL, Block, blocks, commands, name

PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
BB = {page for page in PYTHON if "bb" in name(page).split("/")}  # trains: tests/bb has it
REAL_PAGES = [page for page in PYTHON if page.read_text(encoding="utf-8").startswith(REAL)]
SMALL_PAGES = [page for page in PYTHON if page not in REAL_PAGES and page not in BB]


def test_there_are_pages_of_both_kinds() -> None:
    assert len(SMALL_PAGES) >= 10 and REAL_PAGES


@pytest.fixture(scope="module")
def reports(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reports of two jobs."""
    folder = tmp_path_factory.mktemp("jobs") / "runs"
    model = ss.load_model(small_model)
    for job, text in enumerate(("the quick brown fox", "jumps over the lazy dog")):
        (folder / str(job)).mkdir(parents=True)
        ss.scan(model, ss.texts([text]), progress=False).save(folder / str(job) / "report.nc")
    return folder


@pytest.fixture
def readers_folder(
    tmp_path: Path, small_model: Path, reports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working folder with the files that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)  # no browser
    monkeypatch.setattr(base, "_registered", {k: list(v) for k, v in base._registered.items()})
    Path("runs").symlink_to(reports)
    Path("checkpoints").mkdir()
    for step in (1000, 8000):
        Path("checkpoints", f"step{step}").symlink_to(small_model)


def run(page: Path, model: str) -> dict:
    """Run a page's blocks in order, as a reader would in one notebook."""
    namespace: dict = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language == "python":
            exec(compiled(page, block, model), namespace)
    return namespace


def compiled(page: Path, block: Block, model: str):
    """A block with another model in SmolLM2's place, whose errors name the page's own line."""
    source = block.text.replace('"smollm2-135m")', f"{model!r})").replace(
        '"smollm2-135m",', f"{model!r},"
    )
    return compile("\n" * (block.line - 1) + source, str(page), "exec")


@pytest.mark.parametrize("page", SMALL_PAGES, ids=name)
def test_python_blocks_run(page: Path, readers_folder: None, small_model: Path) -> None:
    run(page, str(small_model))


@pytest.mark.real
@pytest.mark.parametrize("page", REAL_PAGES, ids=name)
def test_python_blocks_run_on_a_trained_model(page: Path, readers_folder: None, smollm2) -> None:
    run(page, "smollm2-135m")


@pytest.mark.parametrize("page", sorted(BB), ids=name)
def test_names_exist_where_running_takes_too_long(page: Path) -> None:
    used = {
        node.attr
        for block in blocks(page)
        if block.language == "python"
        for node in ast.walk(ast.parse(block.text))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bb"
    }
    assert used and used <= set(ss.bb.__all__)


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize(
    ("page", "line"), COMMANDS, ids=[f"{name(page)}: {line}" for page, line in COMMANDS]
)
def test_commands_are_accepted(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not words:
            assert command.invoke_without_command, f"{line}: which command?"
            return
        assert words[0] in command.commands, f"{line}: no such command"
        command = command.commands[words.pop(0)]
    command.make_context("sinkscope", words)  # parses and checks every option, and runs nothing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_named_in_the_text_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands
    named = re.findall(r"`sinkscope ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(known)


HOW_TO = [page for page in PYTHON if page.parent.name == "howto"]


@pytest.mark.parametrize("page", HOW_TO, ids=name)
def test_how_to_pages_are_short(page: Path) -> None:
    code = [
        line
        for block in blocks(page)
        if block.language == "python"
        for line in block.text.splitlines()
        if line.strip()
    ]
    assert len(code) <= 15
