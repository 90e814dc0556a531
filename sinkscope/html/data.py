"""Everything that the page of a report shows, as one object ready for JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope.html import views
from sinkscope.html.pack import Pack
from sinkscope.html.tables import tables
from sinkscope.html.tokens import tokens
from sinkscope.plot import heads
from sinkscope.plot.labels import axis_label, heading, in_words
from sinkscope.plot.scales import log_bar
from sinkscope.plot.values import interval_of, is_known, mean_of
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.patterns import HeadPatterns
    from sinkscope.report.report import SinkReport

_WHOLE = 65535  # stands for a probability of 1 in the page's two-byte numbers
_FIRST = ("sink_attention", "sink_importance", "first_token_attention")


def page_data(report: SinkReport, patterns: HeadPatterns | None = None) -> dict[str, Any]:
    """Arrays, figures, tokens and tables of a report."""
    pack = Pack()
    fields = [name for name in heads.head_metrics(report) if is_known(report, name)]
    metrics = [_metric(report, pack, name) for name in _ordered(fields)]
    names = [metric["name"] for metric in metrics]
    drawn = views.views(report, pack, names)
    patterns_data = {} if patterns is None else _patterns(report, patterns, pack, drawn)
    linked = any(name in drawn for name in ("received", "values", "residual"))
    return {
        "epsilon": report.settings.epsilon,
        "causal": report.settings.causal,
        "sizes": {
            "layer": report.settings.n_layers,
            "head": report.settings.n_heads,
            "kv_head": report.settings.n_kv_heads,
            "position": report.sizes["position"],
        },
        "start": _strongest_head(report, names),
        "metrics": metrics,
        "columns": [n for n, field in report.variables().items() if field.tabled and n in names],
        "arrays": pack.arrays,
        "lists": views.names(report) if linked else {},
        "views": drawn,
        "tokens": tokens(report),
        "tables": tables(report),
        **patterns_data,
    }


def _patterns(
    report: SinkReport, patterns: HeadPatterns, pack: Pack, drawn: dict[str, views.View]
) -> dict[str, Any]:
    """The arrays and figure of the attention patterns, and the offsets of their cells."""
    pack.add("patterns.cells", to_numpy(patterns.cells))
    received = np.nan_to_num(to_numpy(patterns.received))
    pack.add("patterns.received", np.round(_WHOLE * received).astype(int))
    drawn["pattern"] = views.pattern(report)
    length = int(report.mask[list(patterns.prompts)].sum(dim=1).max())
    first = patterns.first.tolist()
    return {"patterns": {"prompts": list(patterns.prompts), "first": first, "length": length}}


def _ordered(names: list[str]) -> list[str]:
    """The metrics in the order of the page's menu, the most useful ones first."""
    return sorted(names, key=lambda name: (*_FIRST, name).index(name))


def _metric(report: SinkReport, pack: Pack, name: str) -> dict[str, Any]:
    """The description of a metric for the head map; its values go into the pack."""
    variable = report.variables()[name]
    values = interval_of(report, name, views.RESAMPLES)
    has_interval = not np.isnan(values.low).all()
    pack.add(f"{name}.mean", values.mean)
    if has_interval:
        pack.add(f"{name}.ends", np.stack([values.low, values.high], axis=-1))
    cells = heads.heatmap(values, variable)
    low, high = float(cells.zmin), float(cells.zmax)
    finite = values.mean[np.isfinite(values.mean)]
    share = variable.unit in ("probability", "share")
    return {
        "name": name,
        "heading": heading(name),
        "label": axis_label(variable),
        "about": _named(report, variable.about),
        "dim": variable.dims[-1],
        "interval": has_interval,
        "range": [low, high],
        "log": heads.is_ratio(variable),
        "ticks": log_bar(low, high) if heads.is_ratio(variable) else {},
        "slider": [0, 1]
        if share or not finite.size
        else [float(finite.min()), float(finite.max())],
        "threshold": report.settings.epsilon if variable.unit == "probability" else None,
        "scale": "diverging" if low < 0 else "sequential",
        "hover": cells.hovertemplate,
    }


def _named(report: SinkReport, about: str) -> str:
    """Replace the names of fields in a sentence by words."""
    names = sorted(report.variables(), key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda n: in_words(n[0]), about)


def _strongest_head(report: SinkReport, metrics: list[str]) -> dict[str, Any]:
    """The head selected when the page opens: the one with the highest sink attention."""
    start: dict[str, Any] = {"metric": metrics[0] if metrics else None, "layer": 0, "head": 0}
    if report.sink_attention is not None:
        mean = np.nan_to_num(mean_of(report, "sink_attention"), nan=-1.0)
        start["layer"], start["head"] = (
            int(i) for i in np.unravel_index(mean.argmax(), mean.shape)
        )
    return start
