"""The atlas: a page with one row per report, which can be sorted, filtered and opened.

Each row has the numbers of `report.key_numbers` and a small head map. A click opens the row: what
the report says in words, its head map large, and the way to its full page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope.html.pack import packed
from sinkscope.html.page import asset, page
from sinkscope.plot.labels import in_words, readable, with_unit
from sinkscope.report.headline import headline
from sinkscope.report.key_numbers import KEY_NUMBERS, key_numbers
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_FILTERS = 30  # distinct values that a column's filter lists
_BYTE = 255

Row = tuple[Mapping[str, Any], "SinkReport", str | None]


def to_html(rows: Sequence[Row], about: str) -> str:
    """A self-contained page of many reports.

    Args:
        rows: For each the values of the grid's columns, its report, and where its full page is,
            relative to this one, if there is one.
        about: What was measured, in one line.

    Returns:
        The page, about 5 MB of it Plotly.
    """
    columns = _columns(rows)
    data = {
        "columns": columns,
        "rows": [_row(columns, *row) for row in rows],
        "filters": _filters(columns, rows),
    }
    return page("Atlas of attention sinks", about, asset("atlas.html"), data, _SCRIPTS)


_SCRIPTS = ("tables.js", "atlas.js")


def _columns(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The model, whatever else varies over the grid, and every number that some report has."""
    grid = [columns for columns, _, _ in rows]
    names = [
        name for name in grid[0] if name == "model" or len({str(one[name]) for one in grid}) > 1
    ]
    values = [key_numbers(report) for _, report, _ in rows]
    shown = [name for name in KEY_NUMBERS if any(one[name] not in (None, "") for one in values)]
    kinds = {name: _kind(grid, name) for name in names} | {
        name: _kind(values, name) for name in shown
    }
    return [
        {
            "name": name,
            "kind": kinds[name],
            "title": with_unit(in_words(name), KEY_NUMBERS.get(name, (None, ""))[0]),
            "about": KEY_NUMBERS.get(name, (None, ""))[1],
        }
        for name in (*names, *shown)
    ]


def _kind(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """The format of a column: "text" (left-aligned), "id" (verbatim) or "number" (three digits)."""
    kinds = {type(one[name]) for one in records} - {type(None)}
    if kinds <= {int}:
        return "id"
    return "number" if kinds <= {int, float} else "text"


def _row(
    columns: Sequence[Mapping[str, str]],
    grid: Mapping[str, Any],
    report: SinkReport,
    link: str | None,
) -> dict[str, Any]:
    values = {**grid, **key_numbers(report)}
    return {
        "values": [_plain(values[column["name"]]) for column in columns],
        "map": _map(report),
        "said": readable(headline(report)),
        "epsilon": report.settings.epsilon,
        "link": link,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return readable(value) if isinstance(value, str) else value


def _map(report: SinkReport) -> dict[str, Any] | None:
    """Mean sink attention of every head in steps of 1/254; 255 is undefined."""
    if report.sink_attention is None:
        return None
    mean = to_numpy(report.mean("sink_attention")).astype(float)
    steps = np.round(np.nan_to_num(mean).clip(0, 1) * (_BYTE - 1))
    return packed(np.where(np.isnan(mean), _BYTE, steps).astype(np.uint8))


def _filters(columns: Sequence[Mapping[str, str]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The columns of the grid with few distinct values, which become filters."""
    filters = []
    for index, column in enumerate(columns):
        if column["name"] in KEY_NUMBERS:
            continue
        values = list(dict.fromkeys(_plain(grid[column["name"]]) for grid, _, _ in rows))
        if 1 < len(values) <= _FILTERS:
            filters.append({"column": index, "values": values})
    return filters
