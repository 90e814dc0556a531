"""The skeleton of all pages: one template, style and theme switch, and no network requests.

A page is one file. Its figures are sent once, in light colours; `assets/theme.js` gives each colour
its dark twin when the reader, or the system, asks for dark. What the theme is, and whatever else
is chosen on a page, stands in the address, so that a link or a reload shows the same.
"""

from __future__ import annotations

import html
import re
from importlib import resources
from typing import Any

from sinkscope.html.pack import script_json
from sinkscope.plot.scales import colour_scale
from sinkscope.plot.theme import DARK, LIGHT, Palette, template

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page(title: str, about: str, body: str, data: dict[str, Any], scripts: tuple[str, ...]) -> str:
    """A page that needs no network.

    Args:
        title: Plain text, heading and title.
        about: Plain text, the line under the heading.
        body: HTML of what follows.
        data: What the scripts read; text in it is only ever shown as text.
        scripts: Names of files in `assets`, run in this order after the theme's.

    Returns:
        The HTML, about 5 MB of it Plotly.
    """
    from plotly.offline import get_plotlyjs

    return filled(
        asset("skeleton.html"),
        title=html.escape(title),
        about=html.escape(about),
        body=body,
        style=asset("look.css"),
        plotly=get_plotlyjs(),
        data=script_json({**data, "themes": _themes()}),
        script="\n".join(asset(name) for name in ("theme.js", *scripts)),
    )


def filled(text: str, **places: str) -> str:
    """A template with each {{name}} replaced."""
    return _PLACE.sub(lambda place: places[place[1]], text)


def asset(name: str) -> str:
    """Read a text file from the package's assets."""
    return (resources.files("sinkscope.html") / "assets" / name).read_text(encoding="utf-8")


def _themes() -> dict[str, Any]:
    """Templates and colours of both themes, and the dark counterpart of each light colour."""
    both = {"light": LIGHT, "dark": DARK}
    themes: dict[str, Any] = {
        name: {
            "template": template(name).to_plotly_json(),
            "sequential": colour_scale(False, colours),
            "diverging": colour_scale(True, colours),
            "ink": colours.ink,
            "paper": colours.paper,
            "sink": colours.sink,
        }
        for name, colours in both.items()
    }
    return themes | {"twins": twins()}


def twins() -> dict[str, str]:
    """Map each colour of the light palette to its counterpart in the dark one.

    Text on buttons is left out: pages have no Plotly buttons, and in light it is the ink.
    """
    return dict(zip(_colours(LIGHT), _colours(DARK), strict=True))


def _colours(palette: Palette) -> list[str]:
    """The colours of a palette in a fixed order."""
    single = (palette.paper, palette.ink, palette.faint, palette.grid, *palette.muted)
    scale = (colour for _, colour in palette.diverging)
    return [*single, palette.sink, palette.other, *palette.series, *scale]
