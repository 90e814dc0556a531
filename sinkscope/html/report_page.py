"""The one-file report: a page that needs no kernel and no network.

Its figures are those of this package. Clicking a head, sliding the threshold and sorting a table
are the page's own script, in ``assets`` as one reads it.
"""

from __future__ import annotations

import html
import re
from importlib import resources
from typing import TYPE_CHECKING

from sinkscope.html.data import page_data
from sinkscope.html.pack import script_json
from sinkscope.plot.labels import in_words, plain_about, readable
from sinkscope.report import summary as _summary

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_SCRIPTS = ("store.js", "figures.js", "tokens.js", "tables.js", "main.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def to_html(report: SinkReport) -> str:
    """A self-contained HTML page of a report: figures, tokens, tables, provenance.

    Nothing is fetched when it is opened, and its content-security policy forbids it. The tokens
    are data: whatever they contain is shown as text.

    Args:
        report: What a scan gave; fields that it lacks are left out of the page.

    Returns:
        The page, about 5 MB of it Plotly.
    """
    from plotly.offline import get_plotlyjs

    filled = {
        "title": html.escape(_summary.title_of(report)),
        "about": html.escape(plain_about(report.settings)),
        "facts": _definitions(_summary.facts_of(report)),
        "settings": _definitions(_settings(report)),
        "style": _asset("page.css"),
        "plotly": get_plotlyjs(),
        "data": script_json(page_data(report)),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    return _PLACE.sub(lambda place: filled[place[1]], _asset("page.html"))


def _asset(name: str) -> str:
    folder = resources.files("sinkscope.html") / "assets"
    return (folder / name).read_text(encoding="utf-8")


def _definitions(facts: list[tuple[str, str]]) -> str:
    """Label and text, one pair a line, as an HTML definition list's rows."""
    return "\n".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(readable(text))}</dd></div>"
        for label, text in facts
    )


def _settings(report: SinkReport) -> list[tuple[str, str]]:
    """All settings of the scan, as label and text."""
    plain = report.settings.to_dict()
    versions = plain.pop("versions")
    shown = {name: _shown(value) for name, value in plain.items()}
    shown |= {f"version of {name}": version for name, version in versions.items() if version}
    return [(in_words(name), text) for name, text in shown.items() if text]


def _shown(value: object) -> str:
    if isinstance(value, list):
        distinct = ["none" if one is None else one for one in dict.fromkeys(value)]
        if len(distinct) == 1:
            return f"{distinct[0]}, in all {len(value)}" if len(value) > 1 else str(distinct[0])
        return ", ".join("none" if one is None else str(one) for one in value)
    return "" if value is None else str(value)
