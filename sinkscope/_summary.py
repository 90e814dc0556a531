"""A report at a glance, for the terminal and for a notebook: the same facts in both."""

from __future__ import annotations

import html
import io
import math
import re
from typing import TYPE_CHECKING, Any

from sinkscope import _findings as findings
from sinkscope._width import line_width

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

Fact = tuple[str, str]

_HEADS = 8
_UNDEFINED = "–"
_UNLIMITED = 10_000
_GLUE = "\ue000"
"""Stands for a space that no line is broken at; Rich breaks lines at no-break spaces too."""
_TITLES = {
    "layer": "layer",
    "head": "head",
    "sink_attention": "sink attention",
    "interval": "95 % interval",
    "sink_logit_gap": "logit gap",
    "attention_entropy": "entropy [nat]",
    "value_drain": "value drain",
    "honor": "HONOR",
}


_LINE = "border:0;border-bottom:1px solid rgba(128,128,128,.35);background:transparent"
_LEFT = f"{_LINE};padding:2px 12px 2px 0;text-align:left;vertical-align:top"
_RIGHT = f"{_LINE};padding:2px 10px;text-align:right;font-variant-numeric:tabular-nums"
_TABLE = "border-collapse:collapse;margin:.5em 0;color:inherit"


def as_text(report: SinkReport) -> str:
    """The summary as plain text, at most `line_width` columns wide."""
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column()
    for label, text in facts_of(report):
        facts.add_row(Text(label), Text(re.sub(r"(?<=\d) (?=[%×])", _GLUE, text)))
    parts = [title_of(report), _printed(facts, line_width())]
    columns, rows = heads_of(report)
    if rows:
        parts += [f"Strongest sink heads\n{table_as_text(columns, rows)}"]
    return "\n".join(parts)


def as_html(report: SinkReport) -> str:
    """The summary as HTML that inherits the notebook's colours, light or dark."""
    facts = "".join(
        f'<tr><th scope="row" style="{_LEFT};white-space:nowrap">{html.escape(label)}</th>'
        f'<td style="{_LEFT}">{html.escape(text)}</td></tr>'
        for label, text in facts_of(report)
    )
    columns, rows = heads_of(report)
    heads = f"<div>Strongest sink heads</div>{table_as_html(columns, rows)}" if rows else ""
    return (
        f'<div style="color:inherit;overflow-x:auto"><strong>{html.escape(title_of(report))}'
        f'</strong><table style="{_TABLE}"><tbody>{facts}</tbody></table>{heads}</div>'
    )


def table_as_text(columns: list[str], rows: list[list[str]]) -> str:
    """A table of text cells for the terminal, figures right-justified.

    Where it would be too wide, each word of a title has a line of its own.
    """
    from rich.cells import cell_len

    wide = _printed(_table(columns, rows), _UNLIMITED)
    if max(map(cell_len, wide.splitlines())) <= line_width():
        return wide
    broken = [re.sub(" (?!%)", "\n", column) for column in columns]
    return _printed(_table(broken, rows), line_width())


def _table(columns: list[str], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def table_as_html(columns: list[str], rows: list[list[str]]) -> str:
    """The same table for a notebook."""
    head = "".join(f'<th scope="col" style="{_RIGHT}">{html.escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_RIGHT}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _printed(renderable: Any, width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, legacy_windows=False, force_jupyter=False
    )
    console.print(renderable)
    lines = [line.rstrip() for line in out.getvalue().replace(_GLUE, " ").splitlines()]
    return "\n".join(line for line in lines if line)


def title_of(report: SinkReport) -> str:
    """What was measured, in one line."""
    return f"Attention sinks of {findings.plain(report.settings.model)}"


def facts_of(report: SinkReport) -> list[Fact]:
    """Label and text of everything there is to say; what was not measured is left out."""
    facts = [
        ("Model", findings.model(report)),
        ("Text", findings.text(report)),
        ("Sinks", findings.sinks(report)),
        ("Sink heads", findings.sink_heads(report)),
        ("Value drain", findings.value_drain(report)),
        ("Residual peak", findings.residual_peak(report)),
        ("Massive dims", findings.massive_dims(report)),
        ("Non-mixture dims", findings.nonmixture_dims(report)),
        ("Marked tokens", findings.marked_tokens(report)),
        ("Made with", findings.provenance(report)),
    ]
    return [(label, text) for label, text in facts if text is not None]


def heads_of(report: SinkReport) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of the table of the strongest heads; no rows without a figure."""
    if report.sink_attention is None or report.sink_attention.isnan().all():
        return [], []
    records = [_with_interval(record) for record in report.top_heads(_HEADS)]
    names = [name for name in _TITLES if name in records[0]]
    return (
        [_TITLES[name] for name in names],
        [[_cell(record[name]) for name in names] for record in records],
    )


def _with_interval(record: dict[str, Any]) -> dict[str, Any]:
    low, high = record["low"], record["high"]
    interval = _UNDEFINED if math.isnan(low) else f"{low:.3f} to {high:.3f}"
    return record | {"interval": interval}


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return _UNDEFINED if math.isnan(value) else f"{value:.3f}"
