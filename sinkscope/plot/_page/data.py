"""Everything the page shows, as one object ready for JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkscope._fields import SinkFields
from sinkscope.plot import _figure, _labels, heads
from sinkscope.plot._page import tables, views
from sinkscope.plot._page.pack import Pack
from sinkscope.plot._scales import colour_scale, value_range
from sinkscope.plot.theme import palette, template

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

_FIRST = ("sink_attention", "sink_importance", "first_token_attention")
_COLUMNS = (
    "sink_attention", "sink_importance", "attention_entropy", "sink_logit_gap",
    "learned_sink_mass", "value_drain", "value_drain_out", "head_output_norm_out", "honor",
)  # fmt: skip
"""What stands in the table of heads, where it was measured."""


def page_data(report: SinkReport) -> dict[str, Any]:
    """Arrays, figures of both themes, tokens and tables of a report."""
    pack = Pack()
    fields = [name for name in heads.head_metrics(report) if _figure.known(report, name)]
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
        "columns": [name for name in _COLUMNS if name in names],
        "arrays": pack.arrays,
        "lists": views.names(report) if linked else {},
        "views": drawn,
        "themes": {theme: _theme(theme) for theme in ("light", "dark")},
        "tokens": tables.tokens(report),
        "tables": tables.tables(report),
    }


def _ordered(names: list[str]) -> list[str]:
    """The metrics one looks at first, first."""
    return sorted(names, key=lambda name: (*_FIRST, name).index(name))


def _metric(report: SinkReport, pack: Pack, name: str) -> dict[str, Any]:
    """What the head map needs to know of a metric; its figures go into the pack."""
    variable = report.variables()[name]
    figures = _figure.interval(report, name, views.RESAMPLES)
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
        "heading": _labels.heading(name),
        "label": _labels.axis_label(variable),
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
    return re.sub(rf"\b({'|'.join(names)})\b", lambda name: _labels.words(name[0]), about)


def _strongest_head(report: SinkReport, metrics: list[str]) -> dict[str, Any]:
    """Where the page starts: the head with the most attention to the sink."""
    start: dict[str, Any] = {"metric": metrics[0] if metrics else None, "layer": 0, "head": 0}
    if report.sink_attention is not None:
        mean = np.nan_to_num(_figure.mean(report, "sink_attention"), nan=-1.0)
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
