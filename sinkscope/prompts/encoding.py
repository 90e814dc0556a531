"""Tokenisation without special tokens, of a whole text or of the beginning of a long one.

The ids of a text's beginning must equal those of the whole text. Since the last ids of a prefix may
depend on the following text (words, merges), two prefixes are encoded, one twice as long as the
other, and the ids on which both agree are used.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

from sinkscope.errors import TextError
from sinkscope.output import printable
from sinkscope.prompts.documents import Document, beginning

WHOLE = 1 << 20
"""Texts up to this many characters are encoded as a whole."""

_SHORTEST = 1 << 16  # characters of the shorter of two prefixes, at least
_CHARACTERS = 16  # … and per required token
_LONGEST = 1 << 24  # characters in which the tokens must be found, at least
_SPARSEST = 64  # … and per required token


def is_short(document: Document) -> TypeGuard[str]:
    """Whether a document is a string that is encoded as a whole."""
    return isinstance(document, str) and len(document) <= WHOLE


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each whole text.

    Raises:
        TextError: If a text contains half of a surrogate pair, which is not a character.
    """
    for text in texts:
        _check_characters(text)
    return tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )["input_ids"]


def first_ids(
    tokenizer: Any, document: Document, needed: int, name: str, before: str = "", after: str = ""
) -> list[int]:
    """At least the required number of ids from the beginning of a document, or all of its ids.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        document: A text, or a file of text that is read as far as needed.
        needed: Number of ids required.
        name: Name of the document in errors.
        before: Text before it, such as a blank line after the previous document.
        after: Text after it.

    Returns:
        The first ids of the whole document.

    Raises:
        TextError: If the ids are not found within 64 characters each (or 16 million).
    """
    size, shorter = WHOLE, None
    while True:
        text = beginning(document, size + 1)
        if len(text) <= size:
            return encode(tokenizer, [before + text + after])[0]
        if shorter is None:
            size = max(_SHORTEST, _CHARACTERS * needed)
        (ids,) = encode(tokenizer, [before + text[:size]])
        if shorter is not None:
            agreed = _common(shorter, ids)
            if agreed >= needed:
                return ids[:agreed]
            if size > max(_LONGEST, _SPARSEST * needed):
                raise TextError(
                    f"The first {size:,} characters of {name} are only {agreed:,} tokens, but "
                    f"{needed:,} are needed; give a text of words, or ask for fewer tokens."
                )
        shorter, size = ids, 2 * size


def _common(shorter: list[int], longer: list[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(shorter, longer, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = printable(text[max(0, error.start - 20) : error.start + 1])
        raise TextError(
            f"A text has half of a surrogate pair at character {error.start} ({around}), which "
            "is not a character; repair it with text.encode('utf-16', 'surrogatepass')"
            ".decode('utf-16', 'replace')."
        ) from None
