"""The page of an experiment: its question, what was found in words, and its figures."""

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
    """What a page is made of; every result of an experiment has it."""

    QUESTION: str

    @property
    def about(self) -> str:
        """Model and texts in one line."""
        ...

    def summary(self) -> str:
        """What was found, in words."""
        ...

    def figures(self) -> dict[str, go.Figure]:
        """The figures by name."""
        ...


def to_html(result: Result) -> str:
    """What was asked, what was found in words, and every figure under a heading of its own.

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
    """Draw in light colours, whichever theme was set: the page gives them their dark twins."""
    before = "dark" if theme.palette() is theme.DARK else "light"
    theme.set_theme("light")
    try:
        yield
    finally:
        theme.set_theme(before)


def _paragraphs(summary: str) -> Iterator[str]:
    """Sentences as paragraphs; indented lines, of tables and lists, as they stand."""
    for indented, lines in itertools.groupby(summary.splitlines(), lambda line: line[:1] == " "):
        text = [html.escape(line) for line in lines]
        if indented:
            yield '<pre tabindex="0">' + "\n".join(text) + "</pre>"
        else:
            yield from (f"<p>{line}</p>" for line in text)


def _section(number: int, figure: go.Figure) -> str:
    """A figure's heading, what it was measured on, and its place."""
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
    """A figure as Plotly takes it, without the title that the page has as a heading."""
    spec = figure.to_dict()
    layout = spec["layout"]
    layout.pop("template", None)
    title = layout.pop("title")
    gone = ROOM + LINE * title["subtitle"]["text"].count("<br>") - _TOP
    margin = layout["margin"]
    layout |= {"height": layout["height"] - gone, "margin": margin | {"t": margin["t"] - gone}}
    return {"data": spec["data"], "layout": layout}
