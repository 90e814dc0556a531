"""Recipes for prompts: what they come to is known once a model brings its tokenizer."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sinkscope.errors import TextError
from sinkscope.prompts.special_tokens import SpecialTokens, ordinary_ids, special_tokens
from sinkscope.prompts.tokens import (
    Texts,
    check_length,
    context_size,
    pack,
    token_strings,
    vocabulary_size,
)

# Windows are drawn from a stream this many times longer than they need, where there is that much:
# distinct places, without reading a whole corpus.
_SPREAD = 4

_NO_TOKENIZER = (
    "This model has no tokenizer, so it cannot take text; load it with "
    "load_model(..., tokenizer=...), or pass exact ids with token_ids(...), or random_tokens(...)."
)


@dataclass(frozen=True)
class Vocabulary:
    """What a model knows about tokens: its tokenizer, if any, and its number of ids, if known."""

    tokenizer: Any
    d_vocab: int | None

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Ids of each document, without special tokens, whole."""
        if self.tokenizer is None:
            raise TextError(_NO_TOKENIZER)
        return self.tokenizer(
            documents, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )["input_ids"]

    def ordinary(self) -> list[int]:
        """Ids that are not special tokens."""
        if self.tokenizer is not None:
            return ordinary_ids(self.tokenizer, self.d_vocab)
        if self.d_vocab is None:
            raise TextError("This model says neither its vocabulary nor has it a tokenizer.")
        return list(range(self.d_vocab))

    def special(self, policy: str) -> SpecialTokens:
        """The BOS policy resolved; without a tokenizer only "never" can be."""
        if self.tokenizer is None:
            if policy == "auto":  # nobody asked for it: what is missing is missing for the text too
                raise TextError(_NO_TOKENIZER)
            if policy != "never":
                raise TextError(f"bos={policy!r} needs a tokenizer and this model has none.")
            return SpecialTokens((), (), policy)
        return special_tokens(self.tokenizer, policy, self.d_vocab)


@dataclass(frozen=True, kw_only=True)
class TextSource(ABC):
    """A recipe for prompts.

    Attributes:
        name: what to call it in a report.
        prompts: how many prompts; None for as many as there are.
        length: tokens of each prompt, special tokens included; None for each text's own.
        bos: "auto", "always", "never" or "random"; see `sinkscope.prompts.texts.texts`.
        padding: the side on which shorter prompts are padded, "right" or "left".
        seed: what anything random is drawn with.
    """

    name: str
    prompts: int | None
    length: int | None
    bos: str
    padding: str = "right"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise TextError(f"{name} should be a whole number above 0, not {value!r}.")
        if self.padding not in ("right", "left"):
            raise TextError(f"padding should be 'right' or 'left', not {self.padding!r}.")

    def tokenize(self, model: Any) -> Texts:
        """The prompts of this recipe for one model.

        Args:
            model: anything with ``.cfg`` (n_ctx, d_vocab) and ``.tokenizer``, such as a bridge.

        Raises:
            TextError: text that is empty or too short, a length beyond the model's context, or a
                BOS policy that this tokenizer cannot follow.
        """
        vocabulary = Vocabulary(getattr(model, "tokenizer", None), vocabulary_size(model))
        special = vocabulary.special(self.bos)
        room = self._room(special, context_size(model))
        rng = random.Random(self.seed)
        bodies = self._bodies(vocabulary, room, rng)
        tokens, mask = pack([special.around(body, rng) for body in bodies])
        check_length(tokens.shape[1], context_size(model))
        strings = None
        if vocabulary.tokenizer is not None:
            strings = token_strings(vocabulary.tokenizer, tokens, mask)
        texts = Texts(tokens, mask, special.label, self.name, strings, self.seed)
        return texts.left_padded() if self.padding == "left" else texts

    def _room(self, special: SpecialTokens, n_ctx: int | None) -> int | None:
        """Tokens a prompt has for text, beside its special tokens."""
        if self.length is None:
            return None
        check_length(self.length, n_ctx)
        if self.length <= special.count:
            raise TextError(
                f"A length of {self.length} leaves no room for text beside the {special.count} "
                f"special token(s) of the BOS policy {special.label!r}; ask for a longer one."
            )
        return self.length - special.count

    @abstractmethod
    def _bodies(
        self, vocabulary: Vocabulary, room: int | None, rng: random.Random
    ) -> list[list[int]]:
        """The ids of each prompt without its special tokens."""


@dataclass(frozen=True, kw_only=True)
class Windows(TextSource):
    """Windows of one length, cut without overlap from distinct places of a stream of documents."""

    documents: Callable[[], Iterator[str]]

    def _bodies(
        self, vocabulary: Vocabulary, room: int | None, rng: random.Random
    ) -> list[list[int]]:
        assert room is not None and self.prompts is not None  # texts() always gives both
        stream = self._stream(vocabulary, _SPREAD * room * self.prompts)
        places = len(stream) // room
        if places < self.prompts:
            raise TextError(self._too_short(len(stream), room))
        start = rng.randrange(len(stream) - places * room + 1)
        chosen = rng.sample(range(places), self.prompts)
        return [stream[start + place * room :][:room] for place in chosen]

    def _stream(self, vocabulary: Vocabulary, enough: int) -> list[int]:
        """Ids of the documents one after the other, until there are enough."""
        stream: list[int] = []
        separators = itertools.chain([""], itertools.repeat("\n\n"))
        documents = (
            separator + document
            for document, separator in zip(self._nonempty(), separators, strict=False)
        )
        while len(stream) < enough and (batch := list(itertools.islice(documents, 16))):
            for ids in vocabulary.encode(batch):
                stream.extend(ids)
        return stream

    def _nonempty(self) -> Iterator[str]:
        return (document for document in self.documents() if document.strip())

    def _too_short(self, available: int, room: int) -> str:
        if available == 0:
            return f"{self.name} is empty; pass text that has at least one word."
        special = (self.length or 0) - room
        beside = f" beside the special token(s) of the BOS policy {self.bos!r}" if special else ""
        longest = available // (self.prompts or 1)
        if available < room:
            return (
                f"{self.name} is shorter than asked: it has {available} tokens, and a prompt of "
                f"length {self.length} needs {room}{beside}; ask for a length of "
                f"{available + special} or less, or give a longer text."
            )
        return (
            f"{self.name} is shorter than asked: its {available} tokens give "
            f"{available // room} prompts of length {self.length}, not {self.prompts}; ask for "
            f"{available // room}" + (f", or a length of {longest + special}." if longest else ".")
        )


@dataclass(frozen=True, kw_only=True)
class OwnLength(TextSource):
    """One prompt a text, each as long as it is, or cut at `length`; with `exact`, never shorter."""

    documents: Callable[[], Iterator[str]]
    exact: bool = False

    def _bodies(
        self, vocabulary: Vocabulary, room: int | None, rng: random.Random
    ) -> list[list[int]]:
        documents = list(itertools.islice(self.documents(), self.prompts))
        if not documents:
            raise TextError(f"{self.name} is empty; pass at least one text.")
        if self.prompts is not None and len(documents) < self.prompts:
            raise TextError(
                f"{self.name} has {len(documents)} texts, not {self.prompts}; ask for "
                f"{len(documents)}."
            )
        bodies = vocabulary.encode(documents)
        for index, body in enumerate(bodies):
            self._check(index, len(body), len(bodies), room)
        return [body[:room] for body in bodies]

    def _check(self, index: int, available: int, texts: int, room: int | None) -> None:
        if available == 0:
            raise TextError(f"Text {index} of {texts} in {self.name} is empty.")
        if self.exact and room is not None and available < room:
            special = (self.length or 0) - room
            raise TextError(
                f"Text {index} of {texts} in {self.name} is shorter than asked: it has "
                f"{available} tokens and length={self.length} needs {room}; pass "
                f"length={available + special}, or windows=False to keep each text's own length."
            )


@dataclass(frozen=True, kw_only=True)
class RandomTokens(TextSource):
    """Ordinary tokens drawn evenly and independently."""

    def _bodies(
        self, vocabulary: Vocabulary, room: int | None, rng: random.Random
    ) -> list[list[int]]:
        ids = vocabulary.ordinary()
        return [rng.choices(ids, k=room or 1) for _ in range(self.prompts or 1)]


@dataclass(frozen=True, kw_only=True)
class RepeatedTokens(TextSource):
    """One token over and over; without a token given, another one in each prompt."""

    token: int | str | None = None

    def _bodies(
        self, vocabulary: Vocabulary, room: int | None, rng: random.Random
    ) -> list[list[int]]:
        prompts = self.prompts or 1
        if self.token is None:
            ids = vocabulary.ordinary()
            drawn = [*rng.sample(ids, min(prompts, len(ids))), *rng.choices(ids, k=prompts)]
        else:
            drawn = [self._id(vocabulary)] * prompts
        return [[id] * (room or 1) for id in drawn[:prompts]]

    def _id(self, vocabulary: Vocabulary) -> int:
        if isinstance(self.token, str):
            ids = vocabulary.encode([self.token])[0]
            if len(ids) != 1:
                raise TextError(
                    f"{self.token!r} is {len(ids)} tokens for this model; pass a text that is one "
                    "token, or its id."
                )
            return ids[0]
        size = vocabulary.d_vocab
        if self.token is None or self.token < 0 or (size is not None and self.token >= size):
            raise TextError(
                f"Token id {self.token} is out of range: this model has {size} ids, from 0."
            )
        return self.token
