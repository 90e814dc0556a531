"""The page of an experiment: its question, its words and its figures, in one file of its own."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sinkscope.html.pack import script_json
from sinkscope.plot import theme
from sinkscope.plot.export import CONFIG
from sinkscope.plot.figure import LINE, ROOM

if TYPE_CHECKING:
    import plotly.graph_objects as go

THEMES = ("light", "dark")
_TOP = 32  # pixels above a plot for its buttons: the title is the page's own heading
_PLACE = re.compile(r"\{\{(\w+)\}\}")


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

    Figures are drawn for light and for dark screens; the page shows what the reader's system asks
    for, and light ones on paper. Tables and figures that are wider than a phone scroll by
    themselves.

    Args:
        result: What an experiment found.

    Returns:
        The page, about 5 MB of it Plotly. Nothing is fetched when it is opened.
    """
    from plotly.offline import get_plotlyjs

    drawn = {name: _figures(result, name) for name in THEMES}
    figures = {name: [_bare(one) for one in some] for name, some in drawn.items()}
    colours = {name: theme.palette(name) for name in THEMES}
    filled = {
        "title": html.escape(result.QUESTION),
        "about": html.escape(result.about),
        "words": "\n".join(_words(result.summary())),
        "figures": "\n".join(map(_section, itertools.count(), drawn["light"])),
        "light": _colours(colours["light"]),
        "dark": _colours(colours["dark"]),
        "font": theme.FONT,
        "plotly": get_plotlyjs(),
        "data": script_json({"config": CONFIG, **figures}),
    }
    return _PLACE.sub(lambda place: filled[place[1]], _PAGE)


def _figures(result: Result, name: str) -> list[go.Figure]:
    with _themed(name):
        return list(result.figures().values())


@contextmanager
def _themed(name: str) -> Iterator[None]:
    """Draw in one theme, whichever was set."""
    before = "dark" if theme.palette() is theme.DARK else "light"
    theme.set_theme(name)
    try:
        yield
    finally:
        theme.set_theme(before)


def _words(summary: str) -> Iterator[str]:
    """Sentences as paragraphs; lines that are set in, of tables and lists, as they stand."""
    for as_it_is, lines in itertools.groupby(summary.splitlines(), lambda line: line[:1] == " "):
        text = [html.escape(line) for line in lines]
        if as_it_is:
            yield '<pre tabindex="0">' + "\n".join(text) + "</pre>"
        else:
            yield from (f"<p>{line}</p>" for line in text)


def _section(number: int, figure: go.Figure) -> str:
    """A figure's heading, what it was measured on, and its place."""
    title = figure.layout.title
    return (
        f'<section><h2 id="figure-{number}">{_plain(title.text)}</h2>'
        f'<p class="about">{_plain(title.subtitle.text)}</p><div class="scroll">'
        f'<div class="figure" role="img" aria-labelledby="figure-{number}"></div></div></section>'
    )


def _plain(text: str) -> str:
    """Plotly text as HTML without its tags."""
    return html.escape(html.unescape(re.sub(r"<[^>]*>", " ", text)))


def _bare(figure: go.Figure) -> dict[str, Any]:
    """A figure as Plotly takes it, without the title that the page has as a heading."""
    spec = figure.to_plotly_json()
    layout = spec["layout"]
    title = layout.pop("title")
    gone = ROOM + LINE * title["subtitle"]["text"].count("<br>") - _TOP
    margin = layout["margin"]
    layout |= {"height": layout["height"] - gone, "margin": margin | {"t": margin["t"] - gone}}
    return {"data": spec["data"], "layout": layout}


def _colours(palette: theme.Palette) -> str:
    return f"--paper: {palette.paper}; --ink: {palette.ink}; --faint: {palette.faint}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- Nothing is fetched, and nothing may be. -->
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';
    img-src data: blob:">
<title>{{title}} {{about}}</title>
<style>
:root { color-scheme: light dark; {{light}} }
@media screen and (prefers-color-scheme: dark) { :root { {{dark}} } }
body {
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 {{font}};
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 0; break-after: avoid; }
h1, h2, p { overflow-wrap: anywhere; }
p { max-width: 80ch; margin: .6rem 0; }
.about { color: var(--faint); margin: 0; font-size: .9rem; }
pre { font-size: 13px; line-height: 1.45; overflow-x: auto; }
.scroll { overflow-x: auto; }
.figure { min-width: 640px; }
@media print {
  :root { color-scheme: light; }
  section { break-inside: avoid; }
  pre { font-size: 8pt; overflow: visible; }
  .modebar-container { display: none; }
}
/* While the print dialogue takes its picture: as wide as A4 and Letter allow. */
[data-print] body { width: 680px; }
</style>
</head>
<body>
<h1>{{title}}</h1>
<p class="about">{{about}}</p>
{{words}}
{{figures}}
<script>{{plotly}}</script>
<script type="application/json" id="drawn">{{data}}</script>
<script>
const drawn = JSON.parse(document.getElementById("drawn").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function show(printing) {
  document.documentElement.toggleAttribute("data-print", printing);
  const figures = structuredClone(drawn[dark.matches && !printing ? "dark" : "light"]);
  document.querySelectorAll(".figure").forEach((place, number) => {
    const { data, layout } = figures[number];
    // Printing does not wait until a figure has found its size by itself.
    if (printing) Object.assign(layout, { width: place.clientWidth, autosize: false });
    Plotly.react(place, data, layout, drawn.config);
  });
}
show(false);
dark.addEventListener("change", () => show(false));
addEventListener("beforeprint", () => show(true));
addEventListener("afterprint", () => show(false));
</script>
</body>
</html>
"""
