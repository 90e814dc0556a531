"""The page of a report: its headline and a few large numbers, then every head.

Its figures are those of `sinkscope.plot`. Choosing a head, sliding the threshold and sorting a
table are the page's own scripts, in ``assets`` as one reads them.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from sinkscope.errors import ReportError
from sinkscope.html.data import page_data
from sinkscope.html.page import asset, filled, page
from sinkscope.plot.labels import in_words, plain_about, readable
from sinkscope.report import headline, summary
from sinkscope.report.patterns import HeadPatterns
from sinkscope.validation import shown

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_SCRIPTS = ("store.js", "patterns.js", "figures.js", "tokens.js", "tables.js", "main.js")


def to_html(report: SinkReport, patterns: HeadPatterns | None = None) -> str:
    """A self-contained HTML page of a report: figures, tokens, tables, provenance.

    Nothing is fetched when it is opened, and its content-security policy forbids it. The tokens
    are data: whatever they contain is shown as text.

    Args:
        report: What a scan gave; fields that it lacks are left out of the page.
        patterns: Attention patterns of its first prompts, which a report itself does not keep; see
            `sinkscope.capture.patterns.head_patterns`.

    Returns:
        The page, about 5 MB of it Plotly.

    Raises:
        ReportError: If `patterns` are none, but the name of a file, say.
    """
    if not isinstance(patterns, HeadPatterns | None):
        raise ReportError(
            "to_html returns the page as text, and takes attention patterns, not "
            f'{shown(patterns)}; write it with Path("page.html").write_text(report.to_html()).'
        )
    body = filled(
        asset("report.html"),
        headline=html.escape(readable(headline.headline(report))),
        numbers=_numbers(report),
        facts=_definitions(summary.facts_of(report)),
        terms=_definitions(list(headline.TERMS.items())),
        settings=_definitions(_settings(report)),
    )
    about = plain_about(report.settings)
    return page(summary.title_of(report), about, body, page_data(report, patterns), _SCRIPTS)


def _numbers(report: SinkReport) -> str:
    """The large numbers at the top, each with its label."""
    return "\n".join(
        f'<div title="{html.escape(term)}"><dt>{html.escape(what)}</dt>'
        f"<dd>{html.escape(value)}</dd></div>"
        for value, what, term in headline.numbers(report)
    )


def _definitions(facts: list[tuple[str, str]]) -> str:
    """Rows of a definition list; the definition of a term is shown on hover."""
    return "\n".join(
        f'<div><dt title="{html.escape(headline.TERMS.get(label, ""))}">{html.escape(label)}</dt>'
        f"<dd>{html.escape(readable(text))}</dd></div>"
        for label, text in facts
    )


def _settings(report: SinkReport) -> list[tuple[str, str]]:
    """All settings of the scan, as pairs of label and text."""
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
