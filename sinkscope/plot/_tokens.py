"""The tokens at a position, for hovers and axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.plot import _labels as labels

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

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
        shown = ", ".join(labels.plotly_token(token) for token in list(found)[:_EXAMPLES])
        texts.append(shown + (", …" if len(found) > _EXAMPLES else ""))
    return texts
