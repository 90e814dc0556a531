"""The page's tables and tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope._tidy import to_numpy
from sinkscope.plot import _labels, _tokens
from sinkscope.plot._page.pack import packed

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

_ROWS = 200  # of a table of records
_TOKENS = 2**15  # that the page carries, over all prompts
_LEAST = 256  # of a long prompt: of many prompts the page carries the first, not a word of each
_LEFT_OUT = (
    "Without the last quarter of each prompt, which few queries see; sinks are never left out."
)
QUANTITIES = ("received_peak", "residual_outlier")

Table = dict[str, Any]


def tables(report: SinkReport) -> dict[str, Table]:
    """Tables of records by name; those without a row are left out."""
    made = {"tokens": _strongest_tokens(report)}
    if report.massive is not None:
        records = sorted(report.massive_activations(), key=lambda r: -abs(r["value"]))
        columns = ("layer", "dim", "value [activation]", "ratio", "prompt", "position", "token")
        rows = [
            [
                r["layer"],
                r["dim"],
                r["value"],
                r["ratio"],
                r["prompt"],
                r["position"],
                _text(report, r),
            ]
            for r in records[:_ROWS]
        ]
        made["massive"] = _table(columns, rows, len(records))
    if None not in (report.ffn_sink, report.ffn_mixed_max, report.ffn_sink_median):
        records = report.nonmixture_dims()
        columns = ("layer", "dim", "value [activation]", "over median", "over mixed", "share")
        rows = [
            [r["layer"], r["dim"], r["value"], r["over_median"], r["over_mixed"], r["share"]]
            for r in records[:_ROWS]
        ]
        made["dims"] = _table(columns, rows, len(records))
    return {name: table for name, table in made.items() if table["rows"]}


def tokens(report: SinkReport) -> dict[str, Any] | None:
    """The prompts' tokens and what each receives; None where nothing was measured of tokens.

    Of many prompts the first, `of` says how many there were; of long texts the beginning, `shown`
    positions of each prompt.
    """
    measured = [name for name in QUANTITIES if getattr(report, name) is not None]
    if not measured:
        return None
    of, length = report.mask.shape
    prompts = min(of, _TOKENS // _LEAST)
    shown = min(length, _TOKENS // prompts)
    lengths = report.mask[:prompts].sum(dim=1).tolist()
    return {
        "of": of,
        "shown": shown,
        "lengths": lengths,
        "prompts": [
            [
                _labels.shown_token(_tokens.text_at(report, prompt, position))
                for position in range(min(lengths[prompt], shown))
            ]
            for prompt in range(prompts)
        ],
        "quantities": [
            {
                "name": name,
                "label": _labels.axis_label(report.variables()[name]),
                "about": report.variables()[name].about,
                "values": packed(to_numpy(report[name])[:prompts, :shown]),
            }
            for name in measured
        ],
    }


def _strongest_tokens(report: SinkReport) -> Table:
    """The tokens that receive most, over all prompts."""
    measured = [name for name in QUANTITIES if getattr(report, name) is not None]
    columns = (
        "prompt",
        "position",
        "token",
        *(_labels.axis_label(report.variables()[n]) for n in measured),
    )
    if not measured:
        return _table(columns, [], 0)
    values = [np.nan_to_num(to_numpy(report[name]), nan=-np.inf) for name in measured]
    seen, about = to_numpy(report.mask), ""
    if report.settings.causal:  # as `rates.sink_rate` has it
        seen, about = seen & ~_last_quarters(seen) | to_numpy(report.sink_mask), _LEFT_OUT
    received = np.where(seen, values[0], -np.inf)
    strongest = np.argsort(-received, axis=None, kind="stable")[: min(50, int(seen.sum()))]
    rows = []
    for prompt, position in zip(*np.unravel_index(strongest, values[0].shape), strict=True):
        where = {"prompt": int(prompt), "position": int(position)}
        figures = [float(value[prompt, position]) for value in values]
        rows.append([*where.values(), _text(report, where), *figures])
    return _table(columns, rows, len(rows)) | {"about": about}


def _last_quarters(mask: np.ndarray) -> np.ndarray:
    """The last quarter of every prompt's real positions [prompt position]."""
    lengths = mask.sum(axis=1, keepdims=True)
    return np.arange(mask.shape[1]) >= lengths - lengths // 4


def _text(report: SinkReport, record: dict[str, Any]) -> str:
    return _labels.shown_token(_tokens.text_at(report, record["prompt"], record["position"]))


def _table(columns: tuple[str, ...], rows: list[list[Any]], of: int) -> Table:
    """Columns and rows, figures to six digits; `of` is how many rows there were.

    Kinds say how a column is written: "id" as it is, "text" as it is and to the left, "number" to
    three digits.
    """
    kinds = {int: "id", str: "text", float: "number"}
    return {
        "columns": columns,
        "kinds": [kinds[type(cell)] for cell in rows[0]] if rows else [],
        "rows": [[_rounded(cell) for cell in row] for row in rows],
        "of": of,
    }


def _rounded(cell: Any) -> Any:
    if not isinstance(cell, float):
        return cell
    return float(f"{cell:.6g}") if np.isfinite(cell) else None
