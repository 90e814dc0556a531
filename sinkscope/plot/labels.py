"""Text on figures: titles, axis labels, the settings of a report, and tokens."""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING

from sinkscope.report.labelled import Variable
from sinkscope.report.settings import Settings

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

About = Settings | str
"""The settings of the measurement: those of a report, or a line of text."""

_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"}
_LONGEST = 32  # characters of a token that are shown
_EXAMPLES = 3  # tokens listed in a hover at one position


def about_line(about: About) -> str:
    """Second line of a title: model, T, BOS, ε and the text, as Plotly text."""
    return escaped(about if isinstance(about, str) else plain_about(about))


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


def differences(reports: list[SinkReport]) -> str:
    """The line under a title for several reports: shared settings, and the values of the others."""
    parts = []
    for name, prefix in (
        ("model", ""), ("length", "T = "), ("bos", "BOS: "), ("epsilon", "ε = "), ("source", ""),
    ):  # fmt: skip
        values = list(dict.fromkeys(str(getattr(report.settings, name)) for report in reports))
        parts.append(prefix + (", ".join(values) if len(values) < 4 else f"{len(values)} values"))
    return " · ".join(parts)


def in_words(name: str) -> str:
    """A field's name as words: "sink_attention" is "sink attention"."""
    if name == "received_peak":  # a mean over layers and heads, which peaks at the sink
        return "mean received attention"
    special = {"ffn": "FFN", "honor": "HONOR", "kv": "KV"}
    return " ".join(special.get(word, word) for word in name.split("_"))


def heading(name: str) -> str:
    """A field's name as the start of a title: "Sink attention"."""
    text = in_words(name)
    return text[:1].upper() + text[1:]


def axis_label(variable: Variable) -> str:
    """A field's words with its unit: "sink attention [probability]"."""
    return with_unit(in_words(variable.name), variable.unit)


def with_unit(text: str, unit: str | None) -> str:
    """Text and unit; a pure number ("1") has none."""
    return f"{text} [{unit}]" if unit not in (None, "", "1") else text


def escaped(text: str) -> str:
    """Escape text for Plotly, which interprets a few HTML tags."""
    return html.escape(readable(text), quote=False)


def readable(text: str) -> str:
    """Text with its control and direction characters made visible, on one line."""
    return "".join(_visible(character) for character in text)


def shown_token(token: str) -> str:
    """Return a token as plain text, with spaces and controls visible, shortened if long."""
    text = token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…"
    if not text:
        return "∅"
    stripped = text.lstrip(" ")
    text = "␣" * (len(text) - len(stripped)) + stripped
    trailing = len(text) - len(text.rstrip(" "))
    return readable(text.rstrip(" ")) + "␣" * trailing


def plotly_token(token: str) -> str:
    """Return a token for a hover or an axis: escaped, with its writing direction isolated."""
    return isolated(html.escape(shown_token(token), quote=False))


def isolated(text: str) -> str:
    """Return text between marks that isolate its writing direction."""
    return f"\u2068{text}\u2069"


def _visible(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    category = unicodedata.category(character)
    invisible = category in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and character != "\u200d"
    return f"⟨U+{ord(character):04X}⟩" if invisible else character


def token_at(report: SinkReport, prompt: int, position: int) -> str:
    """A prompt's token as its text, or as its id where the report has no text; unescaped."""
    if report.token_text is not None and position < len(report.token_text[prompt]):
        return report.token_text[prompt][position]
    return f"id {int(report.tokens[prompt, position])}"


def hover_tokens(report: SinkReport, positions: list[int]) -> list[str]:
    """The tokens at each position over prompts, as Plotly text: the first few different ones."""
    mask, prompts = report.mask.tolist(), range(report.sizes["prompt"])
    texts = []
    for position in positions:
        tokens = dict.fromkeys(token_at(report, p, position) for p in prompts if mask[p][position])
        shown = ", ".join(plotly_token(token) for token in list(tokens)[:_EXAMPLES])
        texts.append(shown + (", …" if len(tokens) > _EXAMPLES else ""))
    return texts
