"""Linked views in a notebook: choose a head to inspect, type a prompt to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ipywidgets as w
import plotly.graph_objects as go

from sinkscope.errors import ReportError, SinkscopeError
from sinkscope.explorer.session import (
    INTERVENTIONS,
    Where,
    head_pattern,
    model_of,
    scanned,
    scanned_again,
    scanned_text,
)
from sinkscope.explorer.widgets import (
    PlainViews,
    PromptBox,
    first_head,
    plain_views,
    show_in,
    why_not,
)
from sinkscope.output import number
from sinkscope.plot import heads, positions, strip
from sinkscope.plot.labels import about_line, axis_label, escaped, heading, in_words
from sinkscope.plot.pattern import attention_pattern
from sinkscope.plot.theme import Theme, palette
from sinkscope.plot.values import checked_index, interval_of

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_LONGEST_PATTERN = 1024  # positions: patterns of all heads of a layer are materialised
_STRIP = 120  # tokens


def explore(
    report_or_model: Any,
    texts: Any = None,
    *,
    model: Any = None,
    theme: Theme = None,
    widgets: bool | None = None,
) -> Explorer | PlainViews:
    """Show linked views of a model's sinks in a notebook.

    Click a head on the map: the attention that each position receives from it, its value norms, the
    residual norms of its layer and, if there is a model, its attention pattern are updated. With a
    model one can also measure a typed prompt, and compare an intervention.

    Args:
        report_or_model: A report, or a model (anything that `load_model` takes), which is scanned.
        texts: What to scan a model on; by default four prompts of prose.
        model: The model of a report, for patterns, prompts and interventions; anything that
            `load_model` takes.
        theme: "light", "dark", or the default.
        widgets: Whether to use widgets; by default where they work; elsewhere plain figures are
            returned, with the reason.

    Returns:
        The explorer, for display in a notebook; or plain figures.

    Raises:
        SinkscopeError: If the model or the texts cannot be measured, or the model is not the one
            that the report is of.
    """
    from sinkscope.report.report import SinkReport

    if isinstance(report_or_model, SinkReport):
        report = report_or_model
        model = None if model is None else model_of(report, model)
    else:
        model, report = scanned(report_or_model, texts)
    reason = why_not() if widgets is None else None if widgets else "widgets=False asked for them."
    return plain_views(report, reason, theme) if reason else Explorer(report, model, theme)


class Explorer:
    """The result of `explore`; every action of the interface is also a method.

    Attributes:
        before: The report of the unchanged model.
        after: The report under the last intervention, or None.
        layer, head: The chosen layer and head.
        prompt: The prompt whose tokens are shown.
        metric: Metric of the map.
        epsilon: Threshold of the map.
        figures: The figure widgets by name.
        widget: The whole interface as one widget.
    """

    def __init__(self, report: SinkReport, model: Any = None, theme: Theme = None) -> None:

        metrics = heads.head_metrics(report)
        if not metrics:
            raise SinkscopeError(
                "This report has no metric per head to explore; scan with sink_attention among "
                "the metrics."
            )
        self.before, self.after, self.model, self.theme = report, None, model, theme
        self.shown = "before"
        self._intervention: tuple[str, Where] | None = None
        self.metric = "sink_attention" if "sink_attention" in metrics else metrics[0]
        self.epsilon: float | None = report.settings.epsilon
        self.prompt = 0
        self.layer, self.head = first_head(report)
        self.figures = {name: go.FigureWidget() for name in self._drawers() if self._has(name)}
        self.panel = Panel(self, metrics)
        self.widget = self.panel.widget
        self._redraw(*self.figures)

    @property
    def report(self) -> SinkReport:
        """The displayed report: before or after the intervention."""
        return self.before if self.after is None or self.shown == "before" else self.after

    def choose(self, **changes: Any) -> None:
        """Choose a layer, head, prompt, metric, epsilon, or which report is shown.

        Args:
            changes: Any of layer, head, prompt, metric, epsilon and shown ("before", "after" or
                "change").

        Raises:
            ReportError: If there is no such layer, head, prompt or metric.
            SinkscopeError: If an argument has another name.
        """
        self._check(changes)
        changed = {name for name, value in changes.items() if getattr(self, name) != value}
        for name in changed:
            setattr(self, name, changes[name])
        if "metric" in changed and "epsilon" not in changes:
            unit = self.before.variables()[self.metric].unit
            self.epsilon = self.before.settings.epsilon if unit == "probability" else None
        self.panel.follow()
        self._redraw(*(name for name in self.figures if changed & _MOVED_BY[name]))

    def measure(self, text: str) -> None:
        """Measure a typed prompt instead of the report's, with the same settings.

        Raises:
            SinkscopeError: If there is no model, or the text cannot be measured.
        """
        self.before = scanned_text(self._needed_model(), text, self.before.settings)
        self.after, self.shown, self.prompt = None, "before", 0
        self._intervention = None
        self.panel.follow()
        self._redraw(*self.figures)

    def intervene(self, name: str, position: int = 0) -> None:
        """Measure the same tokens under an intervention, and show what changed.

        Args:
            name: One of `sinkscope.explorer.session.INTERVENTIONS`.
            position: The position, for interventions that have one.

        Raises:
            SinkscopeError: If there is no model, no such intervention, or the model does not
                allow it.
        """
        model = self._needed_model()
        if name not in INTERVENTIONS:
            raise SinkscopeError(
                f"There is no intervention {name!r}; choose from {_quoted(INTERVENTIONS)}."
            )
        where = Where(position, self.layer, self.head)
        with INTERVENTIONS[name](model, where):
            self.after = scanned_again(model, self.before)
        self._intervention = name, where
        self.shown = "change"
        self.panel.follow()
        self._redraw(*self.figures)

    # -- figures ---------------------------------------------------------------------------------

    def _drawers(self) -> dict[str, Any]:
        return {
            "map": self._map,
            "received": lambda: self._bars("received_attention", self.head),
            "values": lambda: self._bars("value_norm", self._kv_head),
            "residual": lambda: self._bars("residual_norm", None),
            "tokens": self._tokens,
            "pattern": self._pattern,
        }

    def _has(self, name: str) -> bool:
        """Whether the fields for a figure exist."""
        fields = {
            "received": "received_attention",
            "values": "value_norm",
            "residual": "residual_norm",
            "tokens": "received_peak",
        }
        if name == "pattern":
            return self.model is not None
        return name not in fields or getattr(self.before, fields[name]) is not None

    def _redraw(self, *names: str) -> None:
        drawers = self._drawers()
        for name in names:
            show_in(self.figures[name], drawers[name](), _WIDTHS[name])
        self.figures["map"].data[0].on_click(self._clicked)

    def _clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.point_inds:
            layer, column = points.point_inds[0]
            share = self.report.settings.n_heads // self._columns
            self.choose(layer=int(layer), head=int(column) * share)

    @property
    def _columns(self) -> int:
        return self.report[self.metric].shape[-1]

    @property
    def _kv_head(self) -> int:
        return self.head // self.report.settings.heads_per_kv_head

    def _map(self) -> go.Figure:
        if self.shown == "change" and self.after is not None:
            figure = heads.head_change(self.before, self.after, self.metric, theme=self.theme)
        else:
            figure = heads.head_map(
                self.report, self.metric, threshold=self.epsilon, theme=self.theme
            )
        figure.layout.sliders = ()
        column = self.head if self._columns == self.report.settings.n_heads else self._kv_head
        figure.add_shape(
            type="rect", x0=column - 0.5, x1=column + 0.5, y0=self.layer - 0.5,
            y1=self.layer + 0.5, line=dict(color=palette(self.theme).ink, width=2),
        )  # fmt: skip
        return figure

    def _bars(self, metric: str, head: int | None) -> go.Figure:
        figure = positions.by_position(
            self.report, metric, layer=self.layer, head=head, theme=self.theme
        )
        return figure.update_layout(height=320)

    def _tokens(self) -> go.Figure:
        return strip.token_strip(
            self.report, self.prompt, tokens=_STRIP, columns=12, theme=self.theme
        )

    def _pattern(self) -> go.Figure:
        """Draw the chosen head's pattern: unchanged, under the intervention, or the change."""
        real = self.report.mask[self.prompt]
        tokens = self.report.tokens[self.prompt][real][:_LONGEST_PATTERN]
        text = self.report.token_text
        pattern = self._head_pattern(tokens)
        said = "" if self.after is None else f", {self.shown}"
        return attention_pattern(
            pattern,
            None if text is None else text[self.prompt],
            about=self.report.settings,
            title=f"Prompt {self.prompt}, layer {self.layer}, head {self.head}{said}",
            theme=self.theme,
        )

    def _head_pattern(self, tokens: Any) -> Any:
        """[query key] of the report that is shown; of "change", after minus before."""
        model = self._needed_model()
        before = after = None
        if self._intervention is None or self.shown != "after":
            before = head_pattern(model, tokens, self.layer, self.head)
        if self._intervention is not None and self.shown != "before":
            name, where = self._intervention
            with INTERVENTIONS[name](model, where):
                after = head_pattern(model, tokens, self.layer, self.head)
        if before is None or after is None:
            return after if before is None else before
        return after - before

    # -- the rest --------------------------------------------------------------------------------

    def _check(self, changes: dict[str, Any]) -> None:
        """Refuse invalid choices before anything changes."""
        for name in changes:
            if name not in _CHOICES:
                raise SinkscopeError(
                    f"There is no {name!r} to choose in the explorer; choose from "
                    f"{', '.join(_CHOICES)}."
                )
        metrics = heads.head_metrics(self.before)
        if "metric" in changes and changes["metric"] not in metrics:
            raise ReportError(
                f"This report has no metric {changes['metric']!r} of every head; choose from "
                f"{_quoted(metrics)}."
            )
        views = ("before",) if self.after is None else ("before", "after", "change")
        if "shown" in changes and changes["shown"] not in views:
            how = " until intervene() has been called" if self.after is None else ""
            raise SinkscopeError(
                f"shown is {changes['shown']!r}; choose from {_quoted(views)}{how}."
            )
        for dim in ("layer", "head", "prompt"):
            if dim in changes:
                checked_index(self.report, dim, changes[dim])

    def _needed_model(self) -> Any:
        if self.model is None:
            raise SinkscopeError(
                "This needs a model: call explore(model), or explore(report, model=model)."
            )
        return self.model

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)

    def __repr__(self) -> str:
        return (
            f"Explorer of {self.before.settings.model}: layer {self.layer}, head {self.head}, "
            f"{self.metric}"
        )


_WIDTHS = {
    "map": 520, "received": 375, "values": 375, "residual": 375, "tokens": 1130, "pattern": 610,
}  # fmt: skip
_HEAD = {"layer", "head", "shown"}
_MOVED_BY = {
    "map": _HEAD | {"metric", "epsilon"},
    "received": _HEAD,
    "values": _HEAD,
    "residual": {"layer", "shown"},
    "tokens": {"prompt", "shown"},
    "pattern": _HEAD | {"prompt"},
}
"""The choices after which each figure is redrawn."""
_CHOICES = ("layer", "head", "prompt", "metric", "epsilon", "shown")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


_FIELD = {"description_width": "initial"}


class Panel:
    """Controls that change an explorer, and are updated when it changes otherwise."""

    def __init__(self, explorer: Explorer, metrics: list[str]) -> None:
        self._explorer = explorer
        self._following = False
        sizes = explorer.before.sizes
        self.metric = w.Dropdown(
            description="Metric", options=[(heading(name), name) for name in metrics]
        )
        self.epsilon = w.FloatSlider(
            description="ε", min=0, max=1, step=0.01, continuous_update=False
        )
        self.layer = w.BoundedIntText(
            description="Layer",
            min=0,
            max=sizes["layer"] - 1,
            style=_FIELD,
            layout=w.Layout(width="8em"),
        )
        self.head = w.BoundedIntText(
            description="Head", min=0, max=explorer.before.settings.n_heads - 1,
            style=_FIELD, layout=w.Layout(width="8em"),
        )  # fmt: skip
        self.prompt = w.Dropdown(description="Prompt", style=_FIELD, layout=w.Layout(width="9em"))
        self.shown = w.ToggleButtons(
            options=["before", "after", "change"], style={"button_width": "5.5em"}
        )
        self.about, self.said = w.HTML(), w.HTML()
        self.ask = PromptBox()
        self.what = w.Dropdown(
            description="Intervention", options=list(INTERVENTIONS), style=_FIELD,
            layout=w.Layout(width="30em"),
        )  # fmt: skip
        self.position = w.BoundedIntText(
            description="Position", min=0, max=sizes["position"] - 1,
            value=sizes["position"] // 2, style=_FIELD,  # position 0 already attends only to itself
            layout=w.Layout(width="10em"),
        )  # fmt: skip
        self.apply = w.Button(description="Before and after", icon="exchange")
        self.widget = self._laid_out()
        self.follow()
        self._listen()

    def follow(self) -> None:
        """Update the controls from the explorer's choices."""
        explorer = self._explorer
        self._following = True
        try:
            variable = explorer.before.variables()[explorer.metric]
            self.metric.value = explorer.metric
            self.epsilon.disabled = variable.unit != "probability" or explorer.shown == "change"
            if explorer.epsilon is not None:
                self.epsilon.value = explorer.epsilon
            self.layer.value, self.head.value = explorer.layer, explorer.head
            prompts = explorer.before.sizes["prompt"]
            if len(self.prompt.options) != prompts:
                self.prompt.options = list(range(prompts))
            self.prompt.value = explorer.prompt
            last = explorer.before.sizes["position"] - 1
            if last != self.position.max:  # another prompt
                self.position.max, self.position.value = last, (last + 1) // 2
            self.shown.value = explorer.shown
            self.shown.layout.display = "none" if explorer.after is None else ""
            self.about.value = f"<b>{about_line(explorer.report.settings)}</b>"
            self.said.value = self._sentence()
        finally:
            self._following = False

    def _sentence(self) -> str:
        """Describe the chosen head's value of the chosen metric."""
        explorer = self._explorer
        variable = explorer.report.variables()[explorer.metric]
        share = explorer.report.settings.n_heads // explorer.report[explorer.metric].shape[-1]
        at = explorer.layer, explorer.head // share
        mean, low, high = (end[at] for end in interval_of(explorer.report, explorer.metric))
        sure = "" if low != low else (
            f", 95 % interval {number(low)} to {number(high)}"
        )  # fmt: skip
        return escaped(
            f"Layer {at[0]}, {in_words(variable.dims[-1])} {at[1]}: "
            f"{axis_label(variable)} {number(mean)}{sure}."
        )

    def _listen(self) -> None:
        for name in ("metric", "epsilon", "layer", "head", "prompt", "shown"):
            getattr(self, name).observe(self._chooser(name), "value")
        self.ask.on_sent(lambda text: self._do("Measuring …", lambda: self._explorer.measure(text)))
        self.apply.on_click(lambda _: self._do("Measuring …", self._intervene))

    def _chooser(self, name: str) -> Callable[[dict[str, Any]], None]:
        def chosen(change: dict[str, Any]) -> None:
            if not self._following:
                self._explorer.choose(**{name: change["new"]})

        return chosen

    def _intervene(self) -> None:
        self._explorer.intervene(self.what.value, self.position.value)

    def _do(self, saying: str, act: Callable[[], None]) -> None:
        """Run a slow action with a progress bar, and show errors in its place."""
        with self._busy(saying):
            try:
                act()
            except SinkscopeError as error:
                self.said.value = f"<b>{escaped(str(error))}</b>"

    @contextmanager
    def _busy(self, saying: str) -> Iterator[None]:
        self.said.value = f"<progress></progress> {saying}"  # an indeterminate bar
        self.ask.disabled = self.apply.disabled = True
        try:
            yield
        finally:
            self.ask.disabled = self.apply.disabled = False

    def _laid_out(self) -> w.Widget:
        figures = self._explorer.figures
        lines = (("map", "pattern"), ("received", "values", "residual"), ("tokens",))
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        wide = w.Layout(flex_flow="row wrap", width="100%")
        rows: list[w.Widget] = [
            self.about,
            w.Box([self.metric, self.epsilon, self.layer, self.head, self.prompt], layout=wrap),
            w.Box([self.said, self.shown], layout=wrap),
            *(
                w.Box([figures[name] for name in line if name in figures], layout=wide)
                for line in lines
            ),
        ]
        if self._explorer.model is not None:
            rows.insert(2, self.ask)
            rows.insert(3, w.Box([self.what, self.position, self.apply], layout=wrap))
        return w.VBox(rows, layout=w.Layout(width="100%"))
