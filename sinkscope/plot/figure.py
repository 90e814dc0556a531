"""What every figure ends with, and how it reads a report."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.plot.theme import Theme, template
from sinkscope.report.labelled import Variable, to_numpy
from sinkscope.report.settings import Settings

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


# --- Words on figures: titles, axis labels, and tokens shown as text.

About = Settings | str
"""What a figure was measured on: the settings of a report, or a line of one's own."""

_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_LONGEST = 32  # characters of a token that are shown


def about_line(about: About) -> str:
    """Second line of a title: model, T, BOS, ε and the text, as Plotly text."""
    return escape(about if isinstance(about, str) else plain_about(about))


def plain_about(about: Settings) -> str:
    """Settings in one line, as plain text."""
    parts = (
        about.model,
        f"T = {about.length:,}",
        f"BOS: {about.bos}",
        f"ε = {about.epsilon:g}",
        f"sink: {about.sinks}",
        about.source,
        *(f"under {intervention}" for intervention in about.interventions),
    )
    return readable(" · ".join(parts))


def words(name: str) -> str:
    """A field's name as words: "sink_attention" is "sink attention"."""
    if name == "received_peak":  # a mean over layers and heads, which peaks at the sink
        return "mean received attention"
    special = {"ffn": "FFN", "honor": "HONOR", "kv": "KV"}
    return " ".join(special.get(word, word) for word in name.split("_"))


def heading(name: str) -> str:
    """A field's name as the start of a title: "Sink attention"."""
    text = words(name)
    return text[:1].upper() + text[1:]


def axis_label(variable: Variable) -> str:
    """A field's words with its unit: "sink attention [probability]"."""
    return with_unit(words(variable.name), variable.unit)


def with_unit(text: str, unit: str | None) -> str:
    """Text and unit; a pure number ("1") has none."""
    return f"{text} [{unit}]" if unit not in (None, "", "1") else text


def escape(text: str) -> str:
    """Text as Plotly text, which reads a few HTML tags: none of them is meant."""
    return html.escape(readable(text), quote=False)


def readable(text: str) -> str:
    """Text with its control and direction characters made visible, on one line."""
    return "".join(_visible(character) for character in text)


def shown_token(token: str) -> str:
    """A token as a reader should see it: spaces and controls visible, long ones cut; plain text."""
    text = token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…"
    if not text:
        return "∅"
    stripped = text.lstrip(" ")
    text = "␣" * (len(text) - len(stripped)) + stripped
    trailing = len(text) - len(text.rstrip(" "))
    return readable(text.rstrip(" ")) + "␣" * trailing


def plotly_token(token: str) -> str:
    """A token for a hover or an axis: escaped, its direction kept to itself."""
    return isolated(html.escape(shown_token(token), quote=False))


def isolated(text: str) -> str:
    """Text between marks that keep its writing direction to itself."""
    return f"\u2068{text}\u2069"


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    category = unicodedata.category(character)
    invisible = category in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and character != "\u200d"
    return f"⟨U+{ord(character):04X}⟩" if invisible else character


# --- The tokens at a position, for hovers and axes.

_EXAMPLES = 3


def text_at(report: SinkReport, prompt: int, position: int) -> str:
    """A prompt's token as its text, or as its id where the report has no text; unescaped."""
    if report.token_text is not None and position < len(report.token_text[prompt]):
        return report.token_text[prompt][position]
    return f"id {int(report.tokens[prompt, position])}"


def hover_tokens(report: SinkReport, positions: list[int]) -> list[str]:
    """The tokens at each position over prompts, as Plotly text: the first few different ones."""
    mask, prompts = report.mask.tolist(), range(report.sizes["prompt"])
    texts = []
    for position in positions:
        found = dict.fromkeys(text_at(report, p, position) for p in prompts if mask[p][position])
        shown = ", ".join(plotly_token(token) for token in list(found)[:_EXAMPLES])
        texts.append(shown + (", …" if len(found) > _EXAMPLES else ""))
    return texts


_intervals: WeakKeyDictionary[SinkReport, dict[Hashable, Interval]] = WeakKeyDictionary()

ROOM = 76  # pixels above the plot for the title and the line under it
_WIDTH = 800  # pixels of a plot in a figure 900 wide, between its margins
_KEY, _LETTER, _SMALL = 45, 8, 6  # pixels of a legend's key, and of a letter there and in `about`
_ROW, LINE = 20, 15  # pixels of a row of the legend, and of a further line of `about`
_DOT = " · "


class Interval(NamedTuple):
    """A mean over prompts with the ends of its 95 % interval; the ends are nan for one prompt."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def finish(
    figure: go.Figure,
    title: str,
    about: About,
    theme: Theme = None,
    *,
    height: int = 440,
) -> go.Figure:
    """Give a figure its title, the line that says what it was measured on, and its theme.

    Args:
        figure: with traces and axis titles.
        title: what it shows; Plotly text, so whatever comes from outside has to be escaped.
        about: settings of the report, or a line of one's own.
        theme: "light", "dark" or the default.
        height: in pixels; the width follows the page.
    """
    line = _broken(about_line(about))
    figure.update_layout(
        template=template(theme), title=dict(text=title, subtitle=dict(text=line)), height=height
    )
    above = ROOM + LINE * line.count("<br>")
    rows, panels = _legend_rows(figure), _has_panels(figure)
    if rows > 1 or (rows and panels):  # no room between the title and what is below it
        figure.update_layout(
            legend=dict(yref="container", y=0.01),
            margin_b=76 + _ROW * rows,
            height=height + _ROW * (rows - 1),
        )
    elif rows:
        above += 24
    return figure.update_layout(margin_t=above + (22 if panels else 0))


def _broken(line: str) -> str:
    """A line about a figure as Plotly text, on as many lines as `_WIDTH` needs."""
    lines = [""]
    for part in line.split(_DOT):
        longer = f"{lines[-1]}{_DOT}{part}" if lines[-1] else part
        if len(longer) <= _WIDTH // _SMALL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(part)
    return "<br>".join(lines)


def _legend_rows(figure: go.Figure) -> int:
    """Rows that the legend takes in a figure as wide as `plot.save` writes it; 0 without one.

    Plotly puts all entries in one row, or gives each as much room as the longest needs.
    """
    lines = [trace for trace in figure.data if trace.type in ("scatter", "bar")]
    names = {t.legendgroup or t.name: len(t.name or "") for t in lines if t.showlegend is not False}
    if len(lines) < 2 or not names:
        return 0
    widths = [_KEY + _LETTER * length for length in names.values()]
    if sum(widths) <= _WIDTH:
        return 1
    return -(-len(widths) // max(1, _WIDTH // max(widths)))


def _has_panels(figure: go.Figure) -> bool:
    """Whether the figure is divided into panels, which have titles of their own."""
    return "xaxis2" in figure.layout


def mean(report: SinkReport, name: str) -> np.ndarray:
    """A field's mean over prompts, without the prompt dimension."""
    return to_numpy(report.mean(name))


def interval(report: SinkReport, name: str, resamples: int = 2000) -> Interval:
    """A field's mean over prompts and its interval; nan ends where the field keeps no prompts."""
    if "prompt" not in report.variables()[name].dims:
        middle = mean(report, name)
        return Interval(middle, np.full_like(middle, np.nan), np.full_like(middle, np.nan))
    return remembered(report, (name, resamples), lambda: report.interval(name, resamples=resamples))


def remembered(report: SinkReport, key: Hashable, make: Callable[[], Any]) -> Interval:
    """An interval of a report, drawn once: figures of both themes, and clicks, ask for it again."""
    known = _intervals.setdefault(report, {})
    if key not in known:
        known[key] = Interval(*(to_numpy(end) for end in make()))
    return known[key]


def nanmean(figures: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the figures that are numbers; nan, without a warning, where there are none."""
    known = ~np.isnan(figures)
    counts = known.sum(axis=axis)
    sums = np.where(known, figures, 0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(figures.dtype)


def known(report: SinkReport, name: str) -> bool:
    """Whether a field was measured and some prompt defines it."""
    figures = getattr(report, name)
    return figures is not None and not (isinstance(figures, Tensor) and figures.isnan().all())


def require_known(report: SinkReport, name: str) -> None:
    """Refuse a field that was not measured, or that no prompt defines.

    Raises:
        ReportError: with the reason.
    """
    report._require(name)
    if not known(report, name):
        raise ReportError(
            f"{name} is nan in every prompt, so there is nothing to draw: it sets the sinks beside "
            "other positions; scan prompts that have some."
        )


def sink_positions(report: SinkReport) -> list[int]:
    """Positions that are a sink in any prompt."""
    return np.flatnonzero(to_numpy(report.sink_mask).any(axis=0)).tolist()


def choose(report: SinkReport, dim: str, index: int | None) -> int | None:
    """An index along a dimension, checked.

    Raises:
        ReportError: If the report has no such layer, head or prompt.
    """
    size = report.sizes[dim]
    if index is not None and not 0 <= index < size:
        raise ReportError(
            f"There is no {dim} {index} in this report; its {dim}s run from 0 to {size - 1}."
        )
    return index


def tick(size: int) -> int:
    """Spacing of the ticks of an axis of indices, so that about twenty are drawn."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if size <= 20 * step)


def layer_ticks(size: int) -> dict[str, int]:
    """Ticks of an axis of layers: Plotly's own, but never between two layers."""
    return dict(dtick=1) if size <= 10 else {}
