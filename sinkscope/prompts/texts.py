"""Public functions for prompts.

`texts`, `random_tokens` and `repeated_tokens` return recipes (`TextSource`), which become token ids
with the tokenizer of a model. `token_ids` returns exact `Texts`. A scan accepts both and calls
``.tokenize(model)``.
"""

from __future__ import annotations

import difflib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import TextError
from sinkscope.prompts.documents import (
    DOMAINS,
    Document,
    data_set,
    is_file,
    json_lines,
    text_file,
)
from sinkscope.prompts.encoding import first_ids
from sinkscope.prompts.recipes import (
    Documents,
    OwnLength,
    RandomTokens,
    RepeatedTokens,
    TextSource,
    Windows,
)
from sinkscope.prompts.special_tokens import special_tokens
from sinkscope.prompts.tokens import Texts, exact, read_token_ids, vocabulary_size
from sinkscope.validation import shown, whole_number

_PROMPTS, _LENGTH = 16, 256
_LONGEST_NAME = 200  # characters of a name in a message


def texts(
    source: str | Path | Sequence[str],
    prompts: int | None = None,
    length: int | None = None,
    *,
    bos: str = "auto",
    padding: str = "right",
    seed: int = 0,
    windows: bool | None = None,
    key: str = "text",
) -> TextSource | Texts:
    """A recipe for prompts from text.

    Args:
        source: "prose" (the Python manual's topics) or "code" (the standard library), which are
            part of every Python installation; a text file; a ``.jsonl`` file of objects; a
            ``.json`` file of exact token ids; a Hugging Face data set as "hf:owner/name:split" or
            "hf:owner/name:config:split"; or a list of strings, one prompt each.
        prompts: number of prompts. Default: 16; for a list of strings, all.
        length: tokens of each prompt, special tokens included. Default: 256; for a list of strings,
            the length of each.
        bos: BOS policy. "auto": the default of the model's own tokenizer; "always": prepend the BOS
            token (for BERT, [CLS]) even if the tokenizer does not; "never": add nothing; "random":
            an ordinary token, drawn anew for each prompt, in place of each special token of
            "always". The first two keep the tokenizer's closing tokens (BERT's [SEP]).
        padding: side on which shorter prompts are padded, "right" or "left".
        seed: seed for drawing places in the text.
        windows: True cuts windows of equal length, without overlap, from distinct places of the
            concatenated documents. False uses the beginning of each document as a prompt, cut at
            `length` if it is longer. Default: True, except for a list of strings.
        key: name of the text in the objects of a ``.jsonl`` file or the rows of a data set.

    Returns:
        A recipe with ``.tokenize(model)``; for exact token ids, the `Texts`.

    Raises:
        TextError: if the source is unknown, a file cannot be read, or a text is empty.

    Example:
        >>> texts("prose", prompts=4, length=128, bos="never").name
        'prose'
    """
    key = validation.text("key", key, error=TextError)
    if windows is not None and type(windows) is not bool:
        raise TextError(f"windows is {shown(windows)}; expected True, False or None.")
    if isinstance(source, str | Path):
        if Path(source).suffix == ".json":
            return _exact(
                source, prompts=prompts, length=length, bos=None if bos == "auto" else bos
            )
        documents, name = _documents(source, key, seed)
        windows, exact = windows is None or windows, False
    else:
        documents, name = _strings(source)
        windows, exact = bool(windows), windows is None and length is not None
    if windows or isinstance(source, str | Path):
        prompts = _PROMPTS if prompts is None else prompts
        length = _LENGTH if length is None else length
    common: dict[str, Any] = dict(
        name=name, prompts=prompts, length=length, bos=bos, padding=padding, seed=seed
    )
    if windows:
        return Windows(documents=documents, **common)
    return OwnLength(documents=documents, exact=exact, **common)


def random_tokens(
    prompts: int = _PROMPTS, length: int = _LENGTH, *, bos: str = "never", seed: int = 0
) -> TextSource:
    """Prompts of ordinary tokens drawn uniformly from the vocabulary.

    No BOS by default, since these prompts test whether sinks require text or a special token at all
    (Gu et al. 2024, section 3).

    Args:
        prompts: number of prompts.
        length: tokens of each prompt.
        bos: see `texts`.
        seed: seed of the draws.

    Returns:
        A recipe that `scan` converts to token ids with the model's vocabulary.
    """
    prompts = whole_number("prompts", prompts, at_least=1, error=TextError)
    length = whole_number("length", length, at_least=1, error=TextError)
    return RandomTokens(name="random tokens", prompts=prompts, length=length, bos=bos, seed=seed)


def repeated_tokens(
    token: int | str | None = None,
    prompts: int = _PROMPTS,
    length: int = _LENGTH,
    *,
    bos: str = "never",
    seed: int = 0,
) -> TextSource:
    """Prompts of one repeated token.

    With rotary, relative or no positions all hidden states of such a prompt are equal, so that no
    position can become a sink (Gu et al. 2024, proposition 1). A BOS token would break this
    symmetry, so none is added by default.

    Args:
        token: id, or text that is one token; None draws a different token for each prompt.
        prompts: number of prompts.
        length: tokens of each prompt.
        bos: see `texts`.
        seed: seed of the draws.

    Returns:
        A recipe that `scan` converts to token ids with the model's vocabulary.
    """
    prompts = whole_number("prompts", prompts, at_least=1, error=TextError)
    length = whole_number("length", length, at_least=1, error=TextError)
    return RepeatedTokens(
        name="repeated token", prompts=prompts, length=length, bos=bos, seed=seed, token=token
    )


def as_texts(value: Any) -> TextSource | Texts:
    """Convert any texts that `scan` accepts to an object with ``.tokenize(model)``.

    Args:
        value: a recipe, `Texts`, the first argument of `texts`, or exact ids as for `token_ids`.
    """
    if isinstance(value, TextSource | Texts):
        return value
    if isinstance(value, str | Path):
        return texts(value)
    array = Tensor | np.ndarray
    if isinstance(value, np.ndarray) and value.dtype.kind in "UOT":
        return texts(_checked(value))
    whole = isinstance(value, array) or (isinstance(value, Mapping) and "input_ids" in value)
    rows = isinstance(value, list | tuple) and value and not isinstance(value[0], str | None)
    ids = rows and isinstance(value[0], list | tuple | array | int | np.integer)
    return exact(value, None, "token ids") if whole or ids else texts(_checked(value))


def _documents(
    source: str | Path, key: str, seed: int
) -> tuple[Callable[[], Iterator[Document]], str]:
    """A function that reads the documents of a named source, and the name of the source."""
    if isinstance(source, str) and source in DOMAINS:
        return functools.partial(DOMAINS[source], seed), source
    if isinstance(source, str) and source.startswith("hf:"):
        return functools.partial(data_set, source.removeprefix("hf:"), key, seed), source
    path = Path(source)
    if not is_file(path):
        raise TextError(_unknown(source))
    if path.suffix == ".jsonl":
        return functools.partial(json_lines, path, key), path.name
    return functools.partial(text_file, path), path.name


def _checked(source: Any) -> Sequence[str]:
    """Check that the source is a list of strings."""
    if isinstance(source, list | tuple):
        wrong = [index for index, text in enumerate(source) if not isinstance(text, str)]
        if not wrong:
            return source
        which = f"Text {wrong[0]} of {len(source)} is {shown(source[wrong[0]])}"
        ids = "; for token ids use token_ids(...)" if len(wrong) == len(source) else ""
        raise TextError(f"{which}, but a list of texts must contain only strings{ids}.")
    listed = " (pass x.tolist())" if hasattr(source, "tolist") else ""
    raise TextError(
        "Texts are given as the name of a source, a path or a list of strings, not "
        f"{type(source).__name__}{listed}; for token ids use token_ids(...)."
    )


def _strings(source: Sequence[str]) -> tuple[Callable[[], Iterator[Document]], str]:
    strings = tuple(_checked(source))
    empty = [index for index, text in enumerate(strings) if not text.strip()]
    if not strings or empty:
        which = f"text {empty[0]} of {len(strings)} is empty" if empty else "the list is empty"
        raise TextError(f"There is no text to measure: {which}.")
    return functools.partial(iter, strings), "strings"  # can be pickled


def _exact(path: str | Path, **given: Any) -> Texts:
    """The ids of a ``.json`` file, refusing options that would change them."""
    if not is_file(path):
        raise TextError(_unknown(path))
    if useless := [name for name, value in given.items() if value is not None]:
        raise TextError(
            f"{path} contains exact token ids, which are used as they are; leave out "
            f"{', '.join(useless)}."
        )
    return read_token_ids(path)


def _unknown(source: str | Path) -> str:
    name = str(source)
    if len(name) > _LONGEST_NAME or "\n" in name:
        return (
            f"There is no text source or file named {shown(name)}; to measure that text itself, "
            "pass a list of strings, or put it into a file and name that."
        )
    if isinstance(source, Path) or "/" in name or Path(name).suffix:
        return f"There is no text file {name!r}."
    close = difflib.get_close_matches(name, DOMAINS, n=1)
    packaged = f"the packaged ones are {' and '.join(DOMAINS)}."
    hint = f"did you mean {close[0]!r}?" if close else packaged
    return (
        f"There is no text source or file named {name!r}; {hint} To measure that text itself, "
        "put it into a file and name that (in Python, a list of strings does too)."
    )


# -- one long text as token ids, longer than any context -------------------------------------------


def long_text(model: Any, source: Any, tokens: int, *, bos: str = "auto", seed: int = 0) -> Texts:
    """The first tokens of a text that may be longer than the model's context.

    Args:
        model: A bridge.
        source: A source for `texts()`, read contiguously from its beginning; or exact `token_ids`,
            of which the first prompt is used.
        tokens: Number of tokens, special tokens at the start included.
        bos: See `texts`; ignored for `token_ids`.
        seed: Seed of the order of documents, and of the first token if `bos` is "random".

    Raises:
        TextError: If the text is shorter, or the model has no tokenizer.
    """
    tokens = whole_number("tokens", tokens, at_least=1, error=TextError)
    given = isinstance(source, str | Path | list | tuple)
    recipe = texts(source, bos=bos, seed=seed) if given else source
    if isinstance(recipe, Texts):
        given_ids = recipe.right_padded().tokens[0, : int(recipe.lengths[0])]
        return _texts(model, given_ids, tokens, recipe.bos, recipe.source)
    if not isinstance(recipe, Documents):
        raise TextError("A long text should be text or token ids, not a recipe for random tokens.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TextError("This model has no tokenizer; pass exact ids with token_ids(...).")
    special = special_tokens(tokenizer, recipe.bos, vocabulary_size(model))
    prefix = special.around([], random.Random(seed))[: len(special.prefix)]
    ids: list[int] = []
    for document in recipe.read():
        if len(ids) >= tokens:
            break
        ids += first_ids(tokenizer, document, tokens - len(ids), recipe.name, after="\n\n")
    if begun := special.begun(ids):
        recipe.warn_of_its_own(1, special)
    ids = [*prefix, *ids[begun:]]
    return _texts(model, torch.tensor(ids), tokens, special.label, recipe.name)


def _texts(model: Any, ids: Int[Tensor, "position"], tokens: int, bos: str, name: str) -> Texts:
    size = vocabulary_size(model)
    if len(ids) < tokens:
        raise TextError(
            f"{name} has {len(ids)} tokens, fewer than the {tokens} asked for; ask for that many, "
            "or give a longer text."
        )
    ids = ids[None, :tokens].long()
    if size is not None and not bool(((ids >= 0) & (ids < size)).all()):
        raise TextError(f"Token ids should lie in this model's vocabulary, 0 to {size - 1}.")
    return Texts(ids, torch.ones_like(ids, dtype=torch.bool), bos=bos, source=name)
