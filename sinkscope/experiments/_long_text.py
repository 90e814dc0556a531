"""One long text as token ids, longer than any context."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope._recipes import OwnLength, Windows
from sinkscope._special import special_tokens
from sinkscope._tokens import Texts, vocabulary_size
from sinkscope.errors import TextError
from sinkscope.texts import texts as text_source


def long_text(model: Any, source: Any, tokens: int, *, bos: str = "auto", seed: int = 0) -> Texts:
    """The first tokens of a text that may be longer than the model's context.

    Args:
        model: A bridge.
        source: What `texts()` takes, read from its beginning without a gap; or exact `token_ids`,
            of which the first prompt is taken.
        tokens: How many, special ones in front included.
        bos: See `texts`; `token_ids` are taken as they are.
        seed: Of the order of documents, and of the first token where `bos` is "random".

    Raises:
        TextError: If the text is shorter, or the model has no tokenizer to read it with.
    """
    given = isinstance(source, str | Path | list | tuple)
    recipe = text_source(source, bos=bos, seed=seed) if given else source
    if isinstance(recipe, Texts):
        ids = recipe.right_padded().tokens[0, : int(recipe.lengths[0])]
        return _texts(model, ids, tokens, recipe.bos, recipe.source)
    if not isinstance(recipe, Windows | OwnLength):
        raise TextError("A long text should be text or token ids, not a recipe for random tokens.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TextError("This model has no tokenizer; pass exact ids with token_ids(...).")
    special = special_tokens(tokenizer, recipe.bos, vocabulary_size(model))
    ids = special.around([], random.Random(seed))[: len(special.prefix)]
    for document in recipe.documents():
        if len(ids) >= tokens:
            break
        ids += tokenizer(document + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
    return _texts(model, torch.tensor(ids), tokens, special.label, recipe.name)


def _texts(model: Any, ids: Int[Tensor, "position"], tokens: int, bos: str, name: str) -> Texts:
    size = vocabulary_size(model)
    if len(ids) < tokens:
        raise TextError(
            f"{name} has {len(ids)} tokens, fewer than the {tokens} asked for; ask for that many, "
            "or give a longer text."
        )
    if size is not None and not bool(((ids >= 0) & (ids < size)).all()):
        raise TextError(f"Token ids should lie in this model's vocabulary, 0 to {size - 1}.")
    ids = ids[None, :tokens].long()
    return Texts(ids, torch.ones_like(ids, dtype=torch.bool), bos=bos, source=name)
