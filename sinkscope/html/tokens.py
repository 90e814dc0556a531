"""The tokens of the prompts as running text, coloured by a value per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.html.pack import packed
from sinkscope.html.tables import token_fields
from sinkscope.plot.labels import axis_label, shown_token, token_at
from sinkscope.report.labelled import to_numpy

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

_TOKENS = 2**15  # that the page carries, over all prompts
_LEAST = 256  # of a long prompt: of many prompts the page carries the first, not a word of each


def tokens(report: SinkReport) -> dict[str, Any] | None:
    """The tokens of the prompts with their values; None where no value per token was measured.

    Of many prompts the first, `of` says how many there were; of long texts the beginning, `shown`
    positions of each prompt.
    """
    measured = token_fields(report)
    if not measured and report.received_attention is None:
        return None
    of, length = report.mask.shape
    prompts = min(of, _TOKENS // _LEAST)
    shown = min(length, _TOKENS // prompts)
    lengths = report.mask[:prompts].sum(dim=1).tolist()
    texts = [
        [token_at(report, prompt, position) for position in range(min(lengths[prompt], shown))]
        for prompt in range(prompts)
    ]
    return {
        "of": of,
        "shown": shown,
        "lengths": lengths,
        "prompts": [[_as_text(token) for token in row] for row in texts],
        "spaced": _spaced(texts, report.token_text is not None),
        "quantities": [
            {
                "name": name,
                "label": axis_label(report.variables()[name]),
                "about": report.variables()[name].about,
                "values": packed(to_numpy(report[name])[:prompts, :shown]),
            }
            for name in measured
        ],
    }


def _as_text(token: str) -> str:
    """A token with its own spaces, for a line of text; blank tokens are made visible."""
    shown = shown_token(token)
    word = shown.strip("␣")
    if not word:
        return shown
    before = len(shown) - len(shown.lstrip("␣"))
    after = len(shown) - len(shown.rstrip("␣"))
    return " " * before + word + " " * after


def _spaced(texts: list[list[str]], has_text: bool) -> bool:
    """Whether the tokens contain their spaces, so that none is added between them."""
    return has_text and any(token[:1] == " " for row in texts for token in row)
