"""The figures of the page: those of `plot`, with arrays that change replaced by references."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from sinkscope.html.pack import Pack
from sinkscope.plot import dims, heads, layers, positions, rates
from sinkscope.plot.bars import add_uniform, bars, hover_names, mark_few, uniform_level
from sinkscope.plot.bins import Bins, bins
from sinkscope.plot.figure import ROOM, finish
from sinkscope.plot.scales import is_wide, y_scale
from sinkscope.plot.theme import LIGHT
from sinkscope.plot.values import interval_of, is_known, mean_of, sink_positions

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_TOP = 8  # pixels above a plot or its legend: titles stand in the page's own headings
_BUTTONS = 22  # pixels of Plotly's buttons, which would lie on a colour bar's topmost label

RESAMPLES = 500
"""Bootstrap resamples for the intervals in the page's hovers, which show three digits."""
_CELLS = 400_000
"""Layers × heads × bins of received attention that the page carries: about 2 MB, and 1 MB for the
position of each value in its bin."""

View = dict[str, Any]
_THEME = "light"  # that figures are sent in: the page knows the dark colours


def views(report: SinkReport, pack: Pack, metrics: list[str]) -> dict[str, View]:
    """All figures whose fields the report has, defined in at least one prompt, by name.

    Args:
        report: What a scan gave.
        pack: Where the arrays go.
        metrics: Names of the head map's metrics.
    """
    made: dict[str, View] = {}
    if metrics:
        made["map"] = _map(report, metrics[0])
    for name, (field, at) in _LINKED.items():
        if is_known(report, field):
            made[name] = _linked(report, pack, field, at)
    if is_known(report, "received_by_distance"):
        made["queries"] = _queries(report, pack)
    for name, (fields, draw) in _STATIC.items():
        if all(is_known(report, field) for field in fields):
            made[name] = view(draw(report, theme=_THEME))
    if "rate" in made:  # the script draws the line at the threshold
        made["rate"]["layout"] |= dict(shapes=[], annotations=[])
    if "positions" in made:
        _name_columns(report, pack, made["positions"])
    return made


def page_bins(report: SinkReport) -> Bins:
    """The bins of the bars; fewer where there are many heads, to keep the file small."""
    sizes = report.sizes
    heads_of_model = report.settings.n_layers * report.settings.n_heads
    longest = int(np.clip(_CELLS // heads_of_model, 64, 1024))
    return bins(sizes["position"], longest, keep=sink_positions(report))


def view(figure: go.Figure, depends: tuple[str, ...] = ()) -> View:
    """A figure for the page: title separate, no template, no buttons."""
    spec = figure.to_dict()
    layout = spec["layout"]
    for name in ("template", "updatemenus", "sliders"):
        layout.pop(name, None)
    title = layout.pop("title", {}).get("text", "")
    bars = any(trace["type"] == "heatmap" for trace in spec["data"])
    top = _TOP + (_BUTTONS if bars else 0)
    layout.get("margin", {}).update(t=layout["margin"]["t"] - ROOM + top)
    layout["height"] -= ROOM - top
    return {
        "data": spec["data"],
        "layout": layout,
        "title": html.unescape(re.sub(r"<[^>]*>", "", title)),
        "depends": list(depends),
    }


def _map(report: SinkReport, metric: str) -> View:
    """The frame of the head map; the script fills in metric, threshold and selection."""
    variable = report.variables()[metric]
    figures = interval_of(report, metric, RESAMPLES)
    figure = heads.empty_map(heads.heatmap(figures, variable), variable, LIGHT)
    heads.mark_without_attention(figure, report.settings)
    height = int(np.clip(150 + 19 * report.settings.n_layers, 320, 900)) + ROOM - _TOP
    finish(figure, "", report.settings, _THEME, height=height)
    made = view(figure, ("metric", "epsilon", "layer", "head"))
    cells = made["data"][0]
    for name in ("z", "customdata", "hovertemplate", "zmin", "zmax", "colorscale"):
        cells.pop(name, None)
    below = dict(type="heatmap", showscale=False, hoverinfo="skip", xgap=1, ygap=1, zmin=0, zmax=1)
    muted = LIGHT.muted[1]
    made["data"].append(below | {"colorscale": [[0, muted], [1, muted]]})
    return made


def _linked(report: SinkReport, pack: Pack, field: str, at: tuple[str, ...]) -> View:
    """Bars over positions for the selected layer and head."""
    places = page_bins(report)
    every = mean_of(report, field)
    figures = places.maximum(every)
    pack.add(field, figures)
    _pack_names(report, pack, places)
    variable = report.variables()[field]
    figure = bars(report, variable, places, figures[(0,) * len(at)], _THEME)
    levels = [uniform_level(report, field, layer) for layer in range(report.settings.n_layers)]
    if levels[0] is not None:
        add_uniform(figure, places, levels[0], _THEME)
        mark_few(figure, report, LIGHT)
        pack.add(f"{field}.uniform", places.maximum(np.stack(levels)))
    figure.update_yaxes(**y_scale(field in positions.LOG_METRICS and is_wide(every)))
    finish(figure, "", report.settings, _THEME, height=330)
    made = view(figure, at)
    for trace, take in zip(made["data"], ("sinks", "others"), strict=False):
        trace["y"] = pack.ref(field, *at, take=take)
        trace["text"] = {"$list": take}
    if levels[0] is not None:
        made["data"][2]["y"] = pack.ref(f"{field}.uniform", "layer")
    if places.binned:  # a click on a bin chooses its largest position
        pack.add(f"{field}.peak", places.argmax(every))
        made["peak"] = f"{field}.peak"
        made["note"] = f"Maxima of {len(places.first):,} bins."
    return made


def _pack_names(report: SinkReport, pack: Pack, places: Bins) -> None:
    sinks = np.isin(places.first, sink_positions(report))
    pack.add("sinks", np.flatnonzero(sinks))
    pack.add("others", np.flatnonzero(~sinks))


def names(report: SinkReport) -> dict[str, list[str]]:
    """Hover labels of the bars (sinks and others) and of the columns of the map."""
    places = page_bins(report)
    sinks = np.isin(places.first, sink_positions(report))
    called = np.array(hover_names(report, places), dtype=object)
    return {
        "sinks": called[sinks].tolist(),
        "others": called[~sinks].tolist(),
        "columns": hover_names(report, positions.map_bins(report)),
    }


def _queries(report: SinkReport, pack: Pack) -> View:
    """Attention to the sink by query position, in the selected head."""
    pack.add("received_by_distance", mean_of(report, "received_by_distance"))
    figure = layers.attention_by_query(report, 0, 0, theme=_THEME)
    figure.update_layout(height=330)
    made = view(figure, ("layer", "head"))
    trace = made["data"][0]
    trace["y"] = pack.ref("received_by_distance", "layer", "head")
    trace["hovertemplate"] = "queries from %{x}<br>attention to the sink: %{y:,.3~r}<extra></extra>"
    trace["line"] = dict(color=LIGHT.sink)
    made["layout"]["yaxis"] |= dict(range=[0, 1.02])
    made["layout"]["showlegend"] = False
    return made


def pattern(report: SinkReport) -> View:
    """The frame of a head's attention pattern; the script fills in its cells."""
    cells = go.Heatmap(
        zmin=0, zmax=1, hoverongaps=False,
        colorbar=dict(title=dict(text="attention [probability]", side="right")),
        hovertemplate="%{text}<br>largest attention [probability]: %{z:,.2~r}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(cells)
    plain = dict(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="key", **plain)
    figure.update_yaxes(title_text="query", autorange="reversed", **plain)
    finish(figure, "", report.settings, _THEME, height=470)
    return view(figure, ("layer", "head"))


def _name_columns(report: SinkReport, pack: Pack, made: View) -> None:
    """The hover of the map by column, since a label per cell would dominate the file size."""
    made["data"][0]["text"] = {"$list": "columns"}
    places = positions.map_bins(report)
    if places.binned:
        figures = positions.mean_over_heads(report, "received_attention")
        pack.add("map.peak", places.argmax(figures))
        made["peak"] = "map.peak"


_LINKED: dict[str, tuple[str, tuple[str, ...]]] = {
    "received": ("received_attention", ("layer", "head")),
    "values": ("value_norm", ("layer", "kv_head")),
    "residual": ("residual_norm", ("layer",)),
}
_STATIC: dict[str, tuple[tuple[str, ...], Callable[..., go.Figure]]] = {
    "layers": (
        ("residual_peak", "sink_residual_norm", "median_residual_norm"),
        layers.residual_norms,
    ),
    "drains": (("value_drain",), layers.value_drains),
    "chance": (("initial_sink_attention",), layers.chance_levels),
    "drain-chance": (
        ("initial_value_drain",),
        functools.partial(layers.chance_levels, quantity="value_drain"),
    ),
    "rate": (("sink_importance",), rates.sink_rate),
    "dims": (("ffn_sink_mean",), dims.nonmixture_dims),
    "massive": (("massive",), dims.massive_activations),
    "positions": (("received_attention",), positions.position_map),
    "embeddings": (("position_embedding_norm",), positions.position_embedding_norms),
}
