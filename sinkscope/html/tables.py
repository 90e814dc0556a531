"""The tables of the page: one row per position, dim or layer rather than per prompt."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope.metrics.positions import last_quarter
from sinkscope.output import and_more
from sinkscope.plot.labels import axis_label, shown_token, token_at
from sinkscope.report.labelled import to_numpy
from sinkscope.report.summary import runs

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_ROWS = 200  # of a table
_STRONGEST = 50  # tokens, over all prompts, that are grouped by position
_EXAMPLES = 3  # tokens named in one cell
_LEFT_OUT = (
    "Without the last quarter of each prompt, which few queries see; sinks are never left out."
)
Table = dict[str, Any]


def tables(report: SinkReport) -> dict[str, Table]:
    """Tables by name; empty ones are left out."""
    made = {"tokens": _tokens(report), "massive": _massive(report), "dims": _dims(report)}
    return {name: table for name, table in made.items() if table is not None and table["rows"]}


def token_fields(report: SinkReport) -> list[str]:
    """The fields with one value per token, received attention first."""
    names = [
        name for name in report.measured("prompt", "position") if report[name].is_floating_point()
    ]
    return sorted(names, key=lambda name: name != "received_peak")


def _tokens(report: SinkReport) -> Table | None:
    """The tokens with the highest received attention, grouped by position."""
    names = token_fields(report)
    if not names:
        return None
    values = [np.nan_to_num(to_numpy(report[name]), nan=-np.inf) for name in names]
    seen, about = to_numpy(report.mask), ""
    if report.settings.causal:  # as `rates.sink_rate` has it
        seen, about = (
            to_numpy(report.mask & ~last_quarter(report.mask) | report.sink_mask),
            _LEFT_OUT,
        )
    ranked = np.where(seen, values[0], -np.inf)
    strongest = np.argsort(-ranked, axis=None, kind="stable")[: min(_STRONGEST, int(seen.sum()))]
    positions: dict[int, list[int]] = defaultdict(list)
    for prompt, position in zip(*np.unravel_index(strongest, ranked.shape), strict=True):
        positions[int(position)].append(int(prompt))
    columns = (
        "position", "prompts", "strongest in prompt", "tokens",
        *(f"{axis_label(report.variables()[name])}, largest" for name in names),
    )  # fmt: skip
    rows = []
    for position, prompts in positions.items():
        tokens = Counter(shown_token(token_at(report, prompt, position)) for prompt in prompts)
        named = and_more([token for token, _ in tokens.most_common(_EXAMPLES)], len(tokens))
        largest = [float(value[prompts, position].max()) for value in values]
        rows.append([position, len(prompts), prompts[0], named, *largest])
    return _table(columns, rows) | {"about": about}


def _massive(report: SinkReport) -> Table | None:
    """Massive activations by dim and position, with their layers, prompts and sizes."""
    if report.massive is None:
        return None
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for record in report.massive_activations():
        groups[record["dim"], record["position"]].append(record)
    columns = (
        "dim", "position", "layers", "prompts", "largest value [activation]", "largest ratio",
    )  # fmt: skip
    rows = [
        [
            dim,
            position,
            runs({record["layer"] for record in records}),
            len({record["prompt"] for record in records}),
            max((record["value"] for record in records), key=abs),
            max(record["ratio"] for record in records),
        ]
        for (dim, position), records in groups.items()
    ]
    return _table(columns, sorted(rows, key=lambda row: -abs(row[4])))


def _dims(report: SinkReport) -> Table | None:
    """Non-mixture dims, one row per layer and dim."""
    if report.ffn_sink_mean is None:
        return None
    columns = ("layer", "dim", "value [activation]", "over median", "over mixed", "share")
    rows = [
        [r["layer"], r["dim"], r["value"], r["over_median"], r["over_mixed"], r["share"]]
        for r in report.nonmixture_dims()
    ]
    return _table(columns, rows)


def _table(columns: tuple[str, ...], rows: list[list[Any]]) -> Table:
    """Columns and rows, with numbers to six digits; `of` is the number of rows before the cut.

    Kinds say how a column is written: "id" as it is, "text" as it is and to the left, "number" to
    three digits.
    """
    kinds = {int: "id", str: "text", float: "number"}
    return {
        "columns": columns,
        "kinds": [kinds[type(cell)] for cell in rows[0]] if rows else [],
        "rows": [[_rounded(cell) for cell in row] for row in rows[:_ROWS]],
        "of": len(rows),
    }


def _rounded(cell: Any) -> Any:
    if not isinstance(cell, float):
        return cell
    return float(f"{cell:.6g}") if np.isfinite(cell) else None
