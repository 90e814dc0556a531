"""Text as token ids, without special tokens: whole, or of a long text only the beginning needed.

The ids of a text's beginning are those that the whole text would have there. A tokenizer looks a
little ahead (words, merges), so the last ids of a prefix may change with what follows; therefore
two prefixes are encoded, one twice as long as the other, and the ids on which both agree are kept.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeGuard

from sinkscope.errors import TextError
from sinkscope.output import printable
from sinkscope.prompts.documents import Document, beginning

WHOLE = 1 << 20
"""Characters up to which a text is encoded whole."""

_SHORTEST = 1 << 16  # characters of the shorter of two prefixes, at least
_CHARACTERS = 16  # … and for each token that is needed
_LONGEST = 1 << 24  # characters among which the tokens have to be found, at least
_SPARSEST = 64  # … and for each token that is needed


def is_short(document: Document) -> TypeGuard[str]:
    """Whether a document is a string that is encoded whole."""
    return isinstance(document, str) and len(document) <= WHOLE


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each text, whole.

    Raises:
        TextError: If a text holds half of a surrogate pair, which is no character.
    """
    for text in texts:
        _check_characters(text)
    return tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )["input_ids"]


def first_ids(
    tokenizer: Any, document: Document, needed: int, name: str, before: str = "", after: str = ""
) -> list[int]:
    """At least as many ids of a document as are needed, from its beginning, or all that it has.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        document: A text, or a file of text that is read as far as needed.
        needed: How many ids.
        name: What to call the document in an error.
        before: Text in front of it, such as a blank line after the document before.
        after: Text behind it.

    Returns:
        Ids that the whole document has at its beginning.

    Raises:
        TextError: If the ids needed do not come within 64 characters each (or 16 million).
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
                    f"The first {size:,} characters of {name} are only {agreed:,} tokens, and "
                    f"{needed:,} are needed; give a text of words, or ask for fewer tokens."
                )
        shorter, size = ids, 2 * size


def _common(shorter: list[int], longer: list[int]) -> int:
    """How many ids are the same from the beginning."""
    pairs = zip(shorter, longer, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = printable(text[max(0, error.start - 20) : error.start + 1])
        raise TextError(
            f"A text has half of a surrogate pair at character {error.start} ({around}), which "
            "is no character; repair it with text.encode('utf-16', 'surrogatepass')"
            ".decode('utf-16', 'replace')."
        ) from None
