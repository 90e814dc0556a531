"""The class of every token of a vocabulary, such as special, whitespace or the start of a word.

It is determined from the tokenizer's pieces. The classes are disjoint; the first that fits is used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.prompts.tokens import token_strings

CLASSES = (
    "special",
    "unused",
    "byte",
    "whitespace",
    "digits",
    "punctuation",
    "word start",
    "continuation",
)
"""Classes of tokens, in the order in which they are tried.

=================== ========================================================================
special             a special token of the tokenizer, such as BOS or a chat marker
unused              a row of the embedding without a token, or a token named `<unused…>`
byte                a single byte (``<0x0A>``), or bytes that are not a whole character
whitespace          only spaces, tabs and line breaks
digits              only digits, with or without a space in front
punctuation         only punctuation and symbols, with or without a space in front
word start          anything else with a space in front
continuation        anything else without one: the inside of a word, or a word at a line's start
=================== ========================================================================
"""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "ï¿½"
"""U+FFFD itself in byte-level vocabularies, which is a character and not part of one."""
_UNUSED = re.compile(r"[<\[]unused\d+[>\]]")


def token_classes(tokenizer: Any, ids: Sequence[int]) -> tuple[list[str], Int[Tensor, "token"]]:
    """Text and class of tokens.

    Args:
        tokenizer: The model's Hugging Face tokenizer.
        ids: Token ids; those without an entry in the tokenizer are "unused".

    Returns:
        The text of each token, spaces kept, and the index of its class in `CLASSES`.
    """
    row = torch.tensor([list(ids)])
    (text,) = token_strings(tokenizer, row, torch.ones_like(row, dtype=torch.bool))
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    kinds = [
        class_of(one, piece, id in special)
        for id, piece, one in zip(ids, pieces, text, strict=True)
    ]
    return text, torch.tensor([CLASSES.index(kind) for kind in kinds])


def class_of(text: str, piece: str | None, special: bool) -> str:
    """The class of one token.

    Args:
        text: Its text, spaces included.
        piece: Its entry in the vocabulary; None if the tokenizer has none.
        special: Whether it is a special token of the tokenizer.
    """
    if piece is None or _UNUSED.fullmatch(piece):
        return "unused"
    if special:
        return "special"
    replaced = "\ufffd" in text and "\ufffd" not in piece and _REPLACEMENT not in piece
    if _BYTE.fullmatch(piece) or replaced:
        return "byte"
    body = text.strip()
    if not body:
        return "whitespace"
    if body.isdigit():
        return "digits"
    if all(unicodedata.category(character)[0] in "PS" for character in body):
        return "punctuation"
    return "word start" if text[0].isspace() else "continuation"
