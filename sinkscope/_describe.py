"""What a terminal shows of a model's capabilities."""

from __future__ import annotations

from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sinkscope._metric_of import metric_of

if TYPE_CHECKING:
    from sinkscope.capabilities import Capabilities


def describe(capabilities: Capabilities) -> RenderableType:
    """Tables for a terminal or a notebook: what the model is, what can be measured, and where."""
    return Group(_structure(capabilities), _figures(capabilities), _signals(capabilities))


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """The same without colours."""
    page = StringIO()
    Console(file=page, width=width, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())


def _structure(can: Capabilities) -> Table:
    table = Table(title=can.architecture, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "layers": str(can.n_layers),
        "heads": _heads(can),
        "widths": f"d_model {can.d_model}, d_head {can.d_head}, d_mlp {can.d_mlp or '-'}",
        "context": f"{can.n_ctx or '-'} positions, {can.positions} position scheme",
        "attention": _attention(can),
        "windows": _runs(can.windows),
        "blocks": ("parallel" if can.parallel_blocks else "sequential")
        + (", mixture of experts" if can.moe else ""),
        "output head": "trained" if can.lm_head else "not trained: losses mean nothing",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _heads(can: Capabilities) -> str:
    if can.n_heads == can.n_kv_heads:
        return str(can.n_heads)
    return f"{can.n_heads} query, {can.n_kv_heads} key/value"


def _attention(can: Capabilities) -> str:
    words = ["causal" if can.causal else "bidirectional"]
    words.append("softmax" if can.softmax else "not a softmax")
    if can.learned_sinks:
        words.append("learned sinks")
    if can.gated:
        words.append("gated outputs")
    if can.softcap is not None:
        words.append(f"scores capped at {can.softcap:g}")
    words.append(f"scale {_runs(tuple(round(scale, 6) for scale in can.scales))}")
    return ", ".join(words)


def _runs(values: tuple[int | float | None, ...]) -> str:
    """For example "512 in layers 0-4 · full in layer 5"; one word where all layers agree."""

    def word(value: int | float | None) -> str:
        return "full" if value is None else f"{value:g}"

    if len(set(values)) == 1:
        return word(values[0])
    parts = []
    for value, group in groupby(range(len(values)), key=values.__getitem__):
        layers = list(group)
        span = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        parts.append(f"{word(value)} in {span}")
    return " · ".join(parts)


def _figures(can: Capabilities) -> Table:
    table = Table(
        title="Figures on the stock path",
        caption="metric: what a scan is asked for to measure it",
        title_justify="left",
    )
    table.add_column("figure", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("")
    for figure in can.available:
        table.add_row(figure, metric_of(figure) or "-", Text("yes", style="green"))
    for figure, reason in can.unavailable.items():
        table.add_row(figure, metric_of(figure) or "-", Text(f"no: {reason}", style="yellow"))
    return table


def _signals(can: Capabilities) -> Table:
    table = Table(
        title="Checked hook points",
        caption=f"{len(can.hooks)} hook points fire in all",
        title_justify="left",
    )
    table.add_column("signal", no_wrap=True)
    table.add_column("hook point")
    for signal, hook in can.signals.items():
        table.add_row(signal, Text(hook))
    return table
