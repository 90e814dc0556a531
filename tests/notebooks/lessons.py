"""The six lessons, and how a test reads them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]
CONFIG = FOLDER / "html" / "nbconvert_config.py"
FIGURE = "application/vnd.plotly.v1+json"
FOLDED = re.compile(
    r"<details><summary>(?P<title>.+?)</summary>\n\n```python\n(?P<code>.+?)\n```\n\n</details>",
    re.DOTALL,
)
"""A folded solution or check: text, since no notebook editor but JupyterLab opens code folded."""


def unfolded(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its folded solutions and checks as code, which a kernel runs."""
    for cell in notebook.cells:
        if found := FOLDED.fullmatch(cell.source):
            cell.cell_type, cell.source = "code", found["code"]
            cell.update(outputs=[], execution_count=None)
    return notebook
