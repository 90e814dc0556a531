"""Everything the page shows, as one object ready for JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope.html import views
from sinkscope.html.pack import Pack, packed
from sinkscope.plot import heads
from sinkscope.plot.labels import axis_label, heading, in_words, shown_token, token_at
from sinkscope.plot.scales import colour_scale, value_range
from sinkscope.plot.theme import palette, template
from sinkscope.plot.values import interval_of, is_known, mean_of
from sinkscope.report.fields import SinkFields
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


# --- The page's tables and tokens.

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
                shown_token(token_at(report, prompt, position))
                for position in range(min(lengths[prompt], shown))
            ]
            for prompt in range(prompts)
        ],
        "quantities": [
            {
                "name": name,
                "label": axis_label(report.variables()[name]),
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
        *(axis_label(report.variables()[n]) for n in measured),
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
    return shown_token(token_at(report, record["prompt"], record["position"]))


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


_FIRST = ("sink_attention", "sink_importance", "first_token_attention")


def page_data(report: SinkReport) -> dict[str, Any]:
    """Arrays, figures of both themes, tokens and tables of a report."""
    pack = Pack()
    fields = [name for name in heads.head_metrics(report) if is_known(report, name)]
    metrics = [_metric(report, pack, name) for name in _ordered(fields)]
    names = [metric["name"] for metric in metrics]
    drawn = {theme: views.views(report, pack, names, theme) for theme in ("light", "dark")}
    linked = any(name in drawn["light"] for name in ("received", "values", "residual"))
    return {
        "epsilon": report.settings.epsilon,
        "causal": report.settings.causal,
        "sizes": {
            "layer": report.settings.n_layers,
            "head": report.settings.n_heads,
            "kv_head": report.settings.n_kv_heads,
        },
        "start": _strongest_head(report, names),
        "metrics": metrics,
        "columns": [n for n, field in report.variables().items() if field.tabled and n in names],
        "arrays": pack.arrays,
        "lists": views.names(report) if linked else {},
        "views": drawn,
        "themes": {theme: _theme(theme) for theme in ("light", "dark")},
        "tokens": tokens(report),
        "tables": tables(report),
    }


def _ordered(names: list[str]) -> list[str]:
    """The metrics one looks at first, first."""
    return sorted(names, key=lambda name: (*_FIRST, name).index(name))


def _metric(report: SinkReport, pack: Pack, name: str) -> dict[str, Any]:
    """What the head map needs to know of a metric; its figures go into the pack."""
    variable = report.variables()[name]
    figures = interval_of(report, name, views.RESAMPLES)
    known = not np.isnan(figures.low).all()
    pack.add(f"{name}.mean", figures.mean)
    if known:
        pack.add(f"{name}.ends", np.stack([figures.low, figures.high], axis=-1))
    low, high = value_range(figures.mean, variable.unit)
    finite = figures.mean[np.isfinite(figures.mean)]
    share = variable.unit in ("probability", "share")
    cells = heads.heatmap(figures, variable)
    return {
        "name": name,
        "heading": heading(name),
        "label": axis_label(variable),
        "about": _named(variable.about),
        "dim": variable.dims[-1],
        "interval": known,
        "range": [low, high],
        "slider": [0, 1]
        if share or not finite.size
        else [float(finite.min()), float(finite.max())],
        "threshold": report.settings.epsilon if variable.unit == "probability" else None,
        "scale": "diverging" if low < 0 else "sequential",
        "hover": cells.hovertemplate,
    }


def _named(about: str) -> str:
    """A sentence with the fields' names in words."""
    names = sorted(SinkFields.variables(), key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(names)})\b", lambda name: in_words(name[0]), about)


def _strongest_head(report: SinkReport, metrics: list[str]) -> dict[str, Any]:
    """Where the page starts: the head with the most attention to the sink."""
    start: dict[str, Any] = {"metric": metrics[0] if metrics else None, "layer": 0, "head": 0}
    if report.sink_attention is not None:
        mean = np.nan_to_num(mean_of(report, "sink_attention"), nan=-1.0)
        start["layer"], start["head"] = (
            int(i) for i in np.unravel_index(mean.argmax(), mean.shape)
        )
    return start


def _theme(name: str) -> dict[str, Any]:
    """A theme's template and colours for the script."""
    colours = palette(name)
    return {
        "template": template(name).to_plotly_json(),
        "sequential": colour_scale(False, colours),
        "diverging": colour_scale(True, colours),
        "ink": colours.ink,
        "paper": colours.paper,
        "faint": colours.faint,
        "sink": colours.sink,
    }
