"""How `make notebooks-html` renders the lessons: pages that need no kernel and no network.

Formulas become MathML, figures become Plotly with one copy of plotly.js a page, links between
lessons point to pages, and solutions are folded (`lesson/index.html.j2`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import plotly.io
from latex2mathml.converter import convert
from nbconvert.preprocessors import Preprocessor
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs

from sinkscope.plot.export import CONFIG

FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)?)\$", re.DOTALL)


class Lesson(Preprocessor):
    """Turns what only a notebook can show into what any browser can."""

    def preprocess(
        self, nb: NotebookNode, resources: dict[str, Any]
    ) -> tuple[NotebookNode, dict[str, Any]]:
        """All cells, and plotly.js once."""
        resources["plotlyjs"] = get_plotlyjs()
        nb.metadata.title = nb.cells[0].source.splitlines()[0].lstrip("# ")
        nb.metadata.pop("widgets", None)
        return super().preprocess(nb, resources)

    def preprocess_cell(
        self, cell: NotebookNode, resources: dict[str, Any], index: int
    ) -> tuple[NotebookNode, dict[str, Any]]:
        """Formulas and links of text, figures of code."""
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_formula, cell.source).replace(".ipynb)", ".html)")
        else:
            # Progress bars are widgets, which need a kernel.
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
            for output in cell.outputs:
                data = output.get("data", {})
                if FIGURE in data:
                    data["text/html"] = _figure(data.pop(FIGURE))
        return cell, resources


def _formula(found: re.Match[str]) -> str:
    block = found["block"] is not None
    latex = " ".join((found["block"] or found["inline"]).split())
    # Markdown must not see emphasis in it.
    return convert(latex, display="block" if block else "inline").replace("*", "&#42;")


def _figure(figure: dict[str, Any]) -> str:
    return plotly.io.to_html(
        {name: figure[name] for name in ("data", "layout")},
        config=CONFIG,
        include_plotlyjs=False,
        include_mathjax=False,
        full_html=False,
        validate=False,
    )


c = get_config()  # nbconvert provides it
c.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
c.HTMLExporter.template_name = "lesson"
c.HTMLExporter.preprocessors = [Lesson]
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {"live"}  # widgets need a kernel
c.ExecutePreprocessor.timeout = 900
