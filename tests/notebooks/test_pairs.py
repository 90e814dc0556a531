"""A lesson is two files that say the same: a source that people read, a notebook that they open."""

from __future__ import annotations

import re

import jupytext
import nbformat
import pytest

from tests.notebooks.lessons import FOLDED, FOLDER, NAMES, SOURCES

UPDATE = "jupytext --update --to ipynb notebooks/0*.py brings the notebooks up to their sources"


def test_there_are_six_and_no_notebook_without_a_source():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_source_and_notebook_agree(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    written = jupytext.read(source)
    assert [cell.cell_type for cell in notebook.cells] == [c.cell_type for c in written.cells]
    for cell, own in zip(notebook.cells, written.cells, strict=True):
        assert cell.source == own.source, UPDATE
        for name in ("tags", "jupyter", "cellView"):
            assert cell.metadata.get(name) == own.metadata.get(name), UPDATE


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_notebook_carries_no_outputs_and_is_valid(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert set(notebook.metadata) == {"jupytext", "kernelspec"}, "nothing of whoever ran it last"


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_lesson_asks_for_predictions_and_has_solved_exercises(source):
    notebook = jupytext.read(source)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.count("> **Predict") >= 4
    asked = re.findall(r"^\*\*(\d)\.\*\*", prose, re.MULTILINE)
    solved = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
    assert len(asked) >= 4 and len(solved) == len(asked)
    assert all(FOLDED.fullmatch(cell.source) for cell in solved), "no editor shows these open"
    assert "(harder)" in prose
    for part in ("**Goals.**", "**Prerequisites.**", "**Time.**", "## Discuss", "## Read on"):
        assert part in prose


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_guess_has_its_place_before_the_result(source):
    cells = jupytext.read(source).cells
    for number, cell in enumerate(cells):
        if "> **Predict" not in cell.source:
            continue
        guess, result = cells[number + 1 : number + 3]
        assert guess.source.startswith("guess = ") and "reveal" in result.metadata["tags"]
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.source.lstrip().startswith("assert")]


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_links_between_lessons_lead_somewhere(source):
    for linked in re.findall(r"\]\(([^)#]+\.ipynb)\)", source.read_text(encoding="utf-8")):
        assert (FOLDER / linked).exists(), linked
