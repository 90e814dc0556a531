"""The page of an experiment: its question, its findings in words, and its figures."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sinkscope.html.page import page
from sinkscope.plot import theme
from sinkscope.plot.figure import LINE, ROOM

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TOP = 32  # pixels above a plot for its buttons: the title is the page's own heading


@runtime_checkable
class Result(Protocol):
    """What a page needs of a result; the results of all experiments have it."""

    QUESTION: str

    @property
    def about(self) -> str:
        """Model and texts in one line."""
        ...

    def summary(self) -> str:
        """The findings, in words."""
        ...

    def figures(self) -> dict[str, go.Figure]:
        """The figures by name."""
        ...


def to_html(result: Result) -> str:
    """Render the question, the findings in words, and each figure under its own heading.

    Tables and figures that are wider than a phone scroll by themselves.

    Args:
        result: What an experiment found.

    Returns:
        The page, about 5 MB of it Plotly. Nothing is fetched when it is opened.
    """
    with _in_light():
        figures = list(result.figures().values())
    said = "\n".join(_paragraphs(result.summary()))
    sections = "\n".join(map(_section, itertools.count(), figures))
    body = f'<section class="card said">\n{said}\n</section>\n{sections}'
    data = {"figures": [_untitled(figure) for figure in figures]}
    return page(result.QUESTION, result.about, body, data, ("experiment.js",))


@contextmanager
def _in_light() -> Iterator[None]:
    """Draw in light colours whatever the theme; the page maps them to the dark palette."""
    before = "dark" if theme.palette() is theme.DARK else "light"
    theme.set_theme("light")
    try:
        yield
    finally:
        theme.set_theme(before)


def _paragraphs(summary: str) -> Iterator[str]:
    """Sentences as paragraphs; indented lines (tables, lists) verbatim."""
    for indented, lines in itertools.groupby(summary.splitlines(), lambda line: line[:1] == " "):
        text = [html.escape(line) for line in lines]
        if indented:
            yield '<pre tabindex="0">' + "\n".join(text) + "</pre>"
        else:
            yield from (f"<p>{line}</p>" for line in text)


def _section(number: int, figure: go.Figure) -> str:
    """The heading of a figure, the data that it was measured on, and its container."""
    title = figure.layout.title
    return (
        f'<section class="card"><h2 id="figure-{number}">{_plain(title.text)}</h2>'
        f'<p class="about">{_plain(title.subtitle.text)}</p><div class="scroll">'
        f'<div class="figure wide" role="figure" aria-labelledby="figure-{number}"></div></div>'
        "</section>"
    )


def _plain(text: str) -> str:
    """Plotly text as HTML without its tags."""
    return html.escape(html.unescape(re.sub(r"<[^>]*>", " ", text)))


def _untitled(figure: go.Figure) -> dict[str, Any]:
    """A figure as a Plotly dict, without the title, which the page shows as a heading."""
    spec = figure.to_dict()
    layout = spec["layout"]
    layout.pop("template", None)
    title = layout.pop("title")
    trimmed = ROOM + LINE * title["subtitle"]["text"].count("<br>") - _TOP
    margin = layout["margin"]
    margin = margin | {"t": margin["t"] - trimmed}
    layout |= {"height": layout["height"] - trimmed, "margin": margin}
    return {"data": spec["data"], "layout": layout}
