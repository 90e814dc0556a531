"""Replacing the first or last token of prompts by a special, random or given one.

These classes transform texts rather than the model's computation, so that a report contains the
actual tokens.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import TextError
from sinkscope.prompts.special_tokens import ordinary_ids, special_tokens
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts, token_strings, vocabulary_size
from sinkscope.validation import shown


class _Replace:
    """Base class: replaces the token at one end of each prompt.

    Args:
        model: A bridge.
        token: "special", "random" (an ordinary token, drawn anew for each prompt), or an id.
        seed: Seed of the draws.
    """

    where: str

    def __init__(self, model: Any, token: str | int = "special", seed: int = 0) -> None:
        self._model, self._seed = model, validation.seed(seed, error=TextError)
        self.token = token
        self._ids = self._candidates()

    def __call__(self, texts: Any) -> Texts:
        """Return the texts with the token replaced; lengths are unchanged.

        Args:
            texts: Any texts that `scan` accepts.
        """
        prompts = as_texts(texts).tokenize(self._model).right_padded()
        draw = random.Random(self._seed)
        drawn = torch.tensor([draw.choice(self._ids) for _ in range(len(prompts))])
        tokens = prompts.tokens.clone()
        tokens[torch.arange(len(prompts)), self._index(prompts)] = drawn.to(tokens)
        tokenizer = getattr(self._model, "tokenizer", None)
        strings = None
        if tokenizer is not None:
            strings = token_strings(tokenizer, tokens, prompts.mask)
        bos = f"{prompts.bos}, {self.where}: {self.token}"
        return dataclasses.replace(prompts, tokens=tokens, strings=strings, bos=bos)

    def _index(self, prompts: Texts) -> Int[Tensor, "prompt"]:
        raise NotImplementedError

    def _special(self) -> int:
        raise NotImplementedError

    def _candidates(self) -> list[int]:
        """The ids to choose from."""
        tokenizer = getattr(self._model, "tokenizer", None)
        size = vocabulary_size(self._model)
        if isinstance(self.token, str) and self.token == "random":
            return list(range(size or 0)) if tokenizer is None else ordinary_ids(tokenizer, size)
        if isinstance(self.token, str) and self.token == "special":
            if tokenizer is None:
                raise TextError("This model has no tokenizer that defines a special token.")
            return [self._special()]
        if type(self.token) is not int or not 0 <= self.token < (size or self.token + 1):
            raise TextError(
                f'token is {shown(self.token)}; expected "special", "random" or an id from 0 to '
                f"{(size or 0) - 1}."
            )
        return [self.token]


class ReplaceStart(_Replace):
    """Replaces the first token of each prompt.

    "special" is the token with which the model's tokenizer begins texts: BOS, or BERT's [CLS].

    Examples:
        >>> report = scan(model, ReplaceStart(model, "random")(texts))  # doctest: +SKIP
    """

    where = "start"

    def _index(self, prompts: Texts) -> Int[Tensor, "prompt"]:
        return torch.zeros(len(prompts), dtype=torch.long)

    def _special(self) -> int:
        always = special_tokens(self._model.tokenizer, "always", vocabulary_size(self._model))
        (first, *_) = always.prefix
        assert first is not None
        return first


class ReplaceEnd(_Replace):
    """Replaces the last token of each prompt.

    "special" is the token with which the model's tokenizer ends texts (BERT's [SEP]), or EOS.
    """

    where = "end"

    def _index(self, prompts: Texts) -> Int[Tensor, "prompt"]:
        return prompts.lengths.cpu() - 1

    def _special(self) -> int:
        tokenizer = self._model.tokenizer
        always = special_tokens(tokenizer, "always", vocabulary_size(self._model))
        last = always.suffix[-1] if always.suffix else tokenizer.eos_token_id
        if last is None:
            raise TextError("This model's tokenizer has no token that ends a text; pass an id.")
        return last
