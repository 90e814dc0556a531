"""The explorer's controls and how they are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from sinkscope.errors import SinkscopeError
from sinkscope.plot import _figure, _labels
from sinkscope.plot._prompt_box import PromptBox
from sinkscope.plot._whatif import INTERVENTIONS

if TYPE_CHECKING:
    from sinkscope.plot.explorer import Explorer

_FIELD = {"description_width": "initial"}


class Panel:
    """Controls that change an explorer, and follow it when it is changed otherwise."""

    def __init__(self, explorer: Explorer, metrics: list[str]) -> None:
        self._explorer = explorer
        self._following = False
        sizes = explorer.before.sizes
        self.metric = w.Dropdown(
            description="Metric", options=[(_labels.heading(name), name) for name in metrics]
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
            value=sizes["position"] // 2, style=_FIELD,  # position 0 sees only itself already
            layout=w.Layout(width="10em"),
        )  # fmt: skip
        self.apply = w.Button(description="Before and after", icon="exchange")
        self.widget = self._laid_out()
        self.follow()
        self._listen()

    def follow(self) -> None:
        """Show in the controls what the explorer has chosen."""
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
            self.about.value = f"<b>{_labels.about_line(explorer.report.settings)}</b>"
            self.said.value = self._sentence()
        finally:
            self._following = False

    def _sentence(self) -> str:
        """The chosen head's figure of the chosen metric, in words."""
        explorer = self._explorer
        variable = explorer.report.variables()[explorer.metric]
        share = explorer.report.settings.n_heads // explorer.report[explorer.metric].shape[-1]
        at = explorer.layer, explorer.head // share
        mean, low, high = (end[at] for end in _figure.interval(explorer.report, explorer.metric))
        sure = "" if low != low else (
            f", 95 % interval {_labels.number(low)} to {_labels.number(high)}"
        )  # fmt: skip
        return _labels.escape(
            f"Layer {at[0]}, {_labels.words(variable.dims[-1])} {at[1]}: "
            f"{_labels.axis_label(variable)} {_labels.number(mean)}{sure}."
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
        """Do something that takes a while; what goes wrong is said beside the controls."""
        with self._busy(saying):
            try:
                act()
            except SinkscopeError as error:
                self.said.value = f"<b>{_labels.escape(str(error))}</b>"

    @contextmanager
    def _busy(self, saying: str) -> Iterator[None]:
        self.said.value = saying
        self.ask.disabled = self.apply.disabled = True
        try:
            yield
        finally:
            self.ask.disabled = self.apply.disabled = False

    def _laid_out(self) -> w.Widget:
        figures = self._explorer.figures
        beside = [figures[name] for name in ("received", "values", "residual") if name in figures]
        below = [figures[name] for name in ("tokens", "pattern") if name in figures]
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        rows: list[w.Widget] = [
            self.about,
            w.Box([self.metric, self.epsilon, self.layer, self.head, self.prompt], layout=wrap),
            w.Box([self.said, self.shown], layout=wrap),
            w.Box([_cell([figures["map"]]), _cell(beside)], layout=w.Layout(flex_flow="row wrap")),
            *(_cell([figure]) for figure in below),
        ]
        if self._explorer.model is not None:
            rows.insert(2, self.ask)
            rows.insert(3, w.Box([self.what, self.position, self.apply], layout=wrap))
        return w.VBox(rows)


def _cell(figures: list[Any]) -> w.VBox:
    return w.VBox(figures, layout=w.Layout(flex="0 0 auto"))
