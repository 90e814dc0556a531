"""How `make notebooks-html` renders the lessons: pages that need no kernel and no network.

Formulas become MathML, figures become Plotly with one copy of plotly.js a page, links between
lessons point to pages, and solutions are folded (`lesson/index.html.j2`). Pages and figures follow
the reader's light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from nbconvert.preprocessors import Preprocessor
from nbformat import NotebookNode
from plotly.offline import get_plotlyjs

from sinkscope.html.pack import script_json
from sinkscope.plot.export import CONFIG
from sinkscope.plot.theme import DARK, LIGHT

FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)?)\$", re.DOTALL)


class Lesson(Preprocessor):
    """Turns what only a notebook can show into what any browser can."""

    def preprocess(
        self, nb: NotebookNode, resources: dict[str, Any]
    ) -> tuple[NotebookNode, dict[str, Any]]:
        """All cells, and what the page's script needs, once."""
        resources["plotlyjs"] = get_plotlyjs()
        page = dict(config=CONFIG, dark=dict(_dark_colours()), button=DARK.button)
        resources["page"] = script_json(page)
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
    """A place of the figure's height, and the figure for the page's script to draw there."""
    height = figure["layout"].get("height", 450)
    data = script_json({name: figure[name] for name in ("data", "layout")})
    return (
        f'<div class="lesson-scroll"><div class="lesson-figure" style="height:{height}px"></div></div>'
        f'<script type="application/json">{data}</script>'
    )


def _dark_colours() -> Iterator[tuple[str, str]]:
    """The light theme's colours and what stands for each in the dark one, opaque and let through."""
    pairs = [
        (getattr(LIGHT, name), getattr(DARK, name)) for name in ("paper", "ink", "faint", "grid")
    ]
    pairs += [(LIGHT.sink, DARK.sink), (LIGHT.other, DARK.other)]
    pairs += zip(LIGHT.muted + LIGHT.series, DARK.muted + DARK.series, strict=True)
    scales = zip(LIGHT.diverging, DARK.diverging, strict=True)
    for light, dark in [*pairs, *((one[1], other[1]) for one, other in scales)]:
        yield light, dark
        yield _faint(light), _faint(dark)


def _faint(colour: str) -> str:
    """A colour as it begins where Plotly lets it through: "rgba(213,94,0,"."""
    return f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},"


c = get_config()  # nbconvert provides it
c.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
c.HTMLExporter.template_name = "lesson"
c.HTMLExporter.preprocessors = [Lesson]
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {"live"}  # widgets need a kernel
c.ExecutePreprocessor.timeout = 900
