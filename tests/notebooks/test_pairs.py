"""A lesson is two files that say the same: a source that people read, a notebook that they open."""

from __future__ import annotations

import re
from itertools import pairwise

import jupytext
import nbformat
import pytest
import torch

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


def checking(source):
    """The functions `check` and `is_right` of a lesson, as it defines them after its answers."""
    (cell,) = [c for c in jupytext.read(source).cells if "How answers are checked" in c.source]
    return cell.source[cell.source.index("solved = set()") :]


def test_all_lessons_check_answers_in_the_same_way():
    assert len({checking(source) for source in SOURCES}) == 1


@pytest.mark.parametrize(
    ("expected", "answer", "said"),
    [
        (0.25, None, "put your answer in the place of None."),
        (0.25, 0.2502, "right."),
        (0.25, torch.tensor(0.25), "right."),
        (0.25, 0.2505, "not yet. Look again."),
        (0.25, "0.5", "the answer is a number; yours is '0.5'."),
        (0.25, [0.25, 0.3], "the answer is a number; yours is [0.25, 0.3]."),
        (0.25, torch.ones(2), "the answer is a number; yours is tensor([1., 1.])."),
        (44, 19, "not yet. Look again."),
        ((18, 6), [18, torch.tensor(6)], "right."),
        ((18, 6), (18, 7), "not yet. Look again."),
        ((18, 6), (18,), "the answer is a pair of numbers; yours is (18,)."),
        ((18, 6), 18, "the answer is a pair of numbers; yours is 18."),
        ("both", "both", "right."),
        ("both", "the first", "not yet. Look again."),
        ("both", 2, "the answer is a text in quotes; yours is 2."),
    ],
)
def test_every_answer_gets_one_sentence(expected, answer, said, capsys):
    lesson = {"ANSWERS": {1: (expected, "Look again.")}}
    exec(checking(SOURCES[0]), lesson)
    lesson["check"](1, answer)
    assert capsys.readouterr().out == f"Exercise 1: {said}\n"
    assert lesson["solved"] == ({1} if said == "right." else set())


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_solution_is_its_answer_and_asserts_nothing_of_the_others(source):
    for cell in jupytext.read(source).cells:
        if "solution" in cell.metadata.get("tags", []):
            assert "solved" not in cell.source and cell.source.count("check(") == 1


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_a_prediction_asks_for_what_its_cell_takes(source):
    """Where the cell holds names with None, the question says how large a number may be."""
    cells = jupytext.read(source).cells
    for cell, guess in pairwise(cells):
        if "> **Predict" in cell.source and "None" in guess.source:
            asked = cell.source[cell.source.index("> **Predict") :].replace("\n> ", " ")
            assert re.search(r"0 to |[Hh]ow many|\bnats?\b|ratio|perplexity", asked), asked


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_links_between_lessons_lead_somewhere(source):
    for linked in re.findall(r"\]\(([^)#]+\.ipynb)\)", source.read_text(encoding="utf-8")):
        assert (FOLDER / linked).exists(), linked
