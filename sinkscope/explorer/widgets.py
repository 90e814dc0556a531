"""Whether widgets work, plain figures in their place, and figures in widgets."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import plotly.graph_objects as go
import traitlets

from sinkscope.plot import heads, layers, positions, rates, strip
from sinkscope.plot.export import CONFIG
from sinkscope.plot.theme import Theme
from sinkscope.plot.values import is_known, mean_of

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


class PromptBox(anywidget.AnyWidget):
    """A text box for a prompt, with a button to measure it.

    Attributes:
        disabled: Whether the button is disabled.
    """

    _esm = Path(__file__).with_suffix(".js")
    disabled = traitlets.Bool(False).tag(sync=True)

    def on_sent(self, handle: Callable[[str], None]) -> None:
        """Call a function with the text of the box whenever the button is pressed."""

        def heard(_widget: Any, content: dict[str, Any], _buffers: Any) -> None:
            handle(content["text"])

        self.on_msg(heard)


def why_not() -> str | None:
    """Return why widgets do not work here, and what to do; None where they work."""
    missing = [name for name in ("ipywidgets", "anywidget") if not importlib.util.find_spec(name)]
    if missing:
        return (
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip "
            "install 'sinkscope[notebook]', and start the kernel again."
        )
    if "google.colab" in sys.modules:
        return (
            "Colab shows them only after: from google.colab import output; "
            "output.enable_custom_widget_manager(). Then call explore(…, widgets=True)."
        )
    if "IPython" not in sys.modules:
        return "this is not a notebook; use JupyterLab or VS Code."
    shell = sys.modules["IPython"].get_ipython()
    if getattr(shell, "kernel", None) is None:
        return "this is not a Jupyter kernel; use JupyterLab or VS Code."
    return None


@dataclass(frozen=True)
class PlainViews:
    """Plain figures instead of the explorer, which are not linked and need no kernel.

    Attributes:
        reason: Why there is no explorer.
        figures: The figures by name.
    """

    reason: str
    figures: dict[str, go.Figure]

    def __repr__(self) -> str:
        return (
            f"Plain figures ({', '.join(self.figures)}) instead of the linked explorer: "
            f"{self.reason} report.to_html() gives the linked views in a browser."
        )

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({"text/plain": repr(self)}, raw=True)
        for figure in self.figures.values():
            figure.show(config=CONFIG)


def plain_views(report: SinkReport, reason: str, theme: Theme) -> PlainViews:
    """Return the figures for which the report has the fields, at its strongest sink head."""
    layer, head = first_head(report)
    kv_head = head // report.settings.heads_per_kv_head
    draw = {
        "sink_attention": lambda: heads.head_map(report, theme=theme),
        "received_attention": lambda: positions.by_position(
            report, layer=layer, head=head, theme=theme
        ),
        "value_norm": lambda: positions.by_position(
            report, "value_norm", layer=layer, head=kv_head, theme=theme
        ),
        "residual_peak": lambda: layers.residual_norms(report, theme=theme),
        "sink_importance": lambda: rates.sink_rate(report, theme=theme),
        "received_peak": lambda: strip.token_strip(report, theme=theme),
    }
    made = {name: make() for name, make in draw.items() if is_known(report, name)}
    return PlainViews(reason, made)


_FLAT = 0.9  # a head with more sink attention attends to little else


def first_head(report: SinkReport) -> tuple[int, int]:
    """Return the initial layer and head: the largest mean sink attention of at most 0.9.

    For a head that attends to nothing else every figure is flat. If there is no other, the
    strongest head; if sink attention was not measured, the first.
    """
    if report.sink_attention is None:
        return 0, 0
    mean = np.nan_to_num(mean_of(report, "sink_attention"), nan=-1.0)
    telling = np.where(mean <= _FLAT, mean, -1.0)
    at = int(telling.argmax() if telling.max() > 0 else mean.argmax())
    return divmod(at, mean.shape[1])


def show_in(widget: go.FigureWidget, figure: go.Figure, width: int) -> None:
    """Put a figure into a figure widget of a fixed width [pixel].

    A notebook draws widgets before they are placed on the page, when text and width cannot be
    measured; so the width is given, and the title is one short line.
    """
    figure.layout.title.subtitle = None
    figure.update_layout(title=dict(x=0.01, xref="container", font_size=14))
    figure.layout.title.text = _short(figure.layout.title.text, width)
    figure.update_layout(width=width, margin_t=figure.layout.margin.t - 22)
    figure.layout.height -= 22
    for trace in figure.data:
        trace.update({name: _without_nan(trace[name]) for name in _GRIDS if name in trace})
    with widget.batch_update():
        if [trace.type for trace in widget.data] != [trace.type for trace in figure.data]:
            widget.data = ()
            widget.add_traces(figure.data)
        else:
            for old, new in zip(widget.data, figure.data, strict=True):
                old.update(new.to_plotly_json(), overwrite=True)
        widget.layout = figure.layout


_LETTER = 7.5  # pixels of a letter of a title


def _short(title: str, width: int) -> str:
    """Shorten a title to its first clause if it does not fit the figure."""
    if len(title) * _LETTER <= width:
        return title
    return re.split(r"; | \(", title)[0]


_GRIDS = ("z", "customdata")


def _without_nan(grid: Any) -> Any:
    """Return a grid with None for nan, since widgets send grids as JSON."""
    if not isinstance(grid, np.ndarray) or grid.dtype.kind != "f" or not np.isnan(grid).any():
        return grid
    return np.where(np.isnan(grid), None, grid.astype(object))
