"""Recipes for prompts, which become token ids with the tokenizer of a model."""

from __future__ import annotations

import itertools
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sinkscope.errors import SinkscopeWarning, TextError
from sinkscope.output import counted
from sinkscope.prompts.documents import Document, beginning
from sinkscope.prompts.encoding import WHOLE, encode, first_ids, is_short
from sinkscope.prompts.special_tokens import (
    POLICIES,
    SpecialTokens,
    ordinary_ids,
    special_tokens,
)
from sinkscope.prompts.tokens import (
    Texts,
    check_embedded,
    check_length,
    context_size,
    pack,
    token_strings,
    vocabulary_size,
)
from sinkscope.validation import one_of, seed, whole_number

# Windows are drawn from a stream this many times longer than they need, if available, which gives
# distinct places without reading a whole corpus.
STREAM = 4

TOGETHER = 16
"""Number of documents of a stream that are encoded at a time."""

_BETWEEN = "\n\n"  # separates documents
_MARK = "\ufeff"
_ENDLESS = 1 << 62

_NO_TOKENIZER = (
    "This model has no tokenizer, so it cannot take text; load it with "
    "load_model(..., tokenizer=...), or pass exact ids with token_ids(...), or random_tokens(...)."
)


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokenizer, vocabulary size and context.

    Attributes:
        tokenizer: the tokenizer, if any.
        d_vocab: number of ids, if known.
        n_ctx: number of positions, if limited.
    """

    tokenizer: Any
    d_vocab: int | None
    n_ctx: int | None = None

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Ids of each whole document, without special tokens."""
        return encode(self._needed(), documents)

    def first_ids(self, document: Document, needed: int, name: str, before: str = "") -> list[int]:
        """Ids of a document's beginning, at least the required number if it has as many."""
        return first_ids(self._needed(), document, needed, name, before)

    def _needed(self) -> Any:
        if self.tokenizer is None:
            raise TextError(_NO_TOKENIZER)
        return self.tokenizer

    def ordinary(self) -> list[int]:
        """Ids that are not special tokens."""
        if self.tokenizer is not None:
            return ordinary_ids(self.tokenizer, self.d_vocab)
        if self.d_vocab is None:
            raise TextError("This model has no tokenizer and does not state its vocabulary size.")
        return list(range(self.d_vocab))

    def special(self, policy: str) -> SpecialTokens:
        """Resolve the BOS policy; without a tokenizer only "never" is possible."""
        if self.tokenizer is None:
            if policy == "auto":  # the default: the error on missing text comes first
                raise TextError(_NO_TOKENIZER)
            if policy != "never":
                raise TextError(f"bos={policy!r} needs a tokenizer and this model has none.")
            return SpecialTokens((), (), policy)
        return special_tokens(self.tokenizer, policy, self.d_vocab)


@dataclass(frozen=True, kw_only=True)
class TextSource(ABC):
    """A recipe for prompts.

    Attributes:
        name: its name in reports.
        prompts: number of prompts; None for all.
        length: tokens of each prompt, special tokens included; None for each text's own length.
        bos: "auto", "always", "never" or "random"; see `sinkscope.prompts.texts.texts`.
        padding: the side on which shorter prompts are padded, "right" or "left".
        seed: seed of all random draws.
    """

    name: str
    prompts: int | None
    length: int | None
    bos: str
    padding: str = "right"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "length"):
            if (value := getattr(self, name)) is not None:
                self._set(name, whole_number(name, value, at_least=1, error=TextError))
        self._set("seed", seed(self.seed, error=TextError))
        one_of("bos", self.bos, POLICIES, error=TextError)
        one_of("padding", self.padding, ("right", "left"), error=TextError)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def tokenize(self, model: Any) -> Texts:
        """The prompts of this recipe for one model.

        Args:
            model: anything with ``.cfg`` (n_ctx, d_vocab) and ``.tokenizer``, such as a bridge.

        Raises:
            TextError: if the text is empty or too short, the length exceeds the model's context, or
                the tokenizer does not support the BOS policy.
        """
        vocabulary = Vocabulary(
            getattr(model, "tokenizer", None), vocabulary_size(model), context_size(model)
        )
        special = vocabulary.special(self.bos)
        room = self._room(special, vocabulary.n_ctx)
        rng = random.Random(self.seed)
        bodies = self._bodies(vocabulary, special, room, rng)
        tokens, mask = pack([special.around(body, rng) for body in bodies])
        check_length(tokens.shape[1], vocabulary.n_ctx)
        check_embedded(tokens, vocabulary.d_vocab, vocabulary.tokenizer)
        strings = None
        if vocabulary.tokenizer is not None:
            strings = token_strings(vocabulary.tokenizer, tokens, mask)
        texts = Texts(tokens, mask, special.label, self.name, strings, self.seed)
        return texts.left_padded() if self.padding == "left" else texts

    def _room(self, special: SpecialTokens, n_ctx: int | None) -> int | None:
        """Number of text tokens in a prompt, without its special tokens."""
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
        self,
        vocabulary: Vocabulary,
        special: SpecialTokens,
        room: int | None,
        rng: random.Random,
    ) -> list[list[int]]:
        """The ids of each prompt without its special tokens."""


@dataclass(frozen=True, kw_only=True)
class Documents(TextSource):
    """Prompts from documents.

    Attributes:
        documents: returns an iterator over the documents from the first one on.
    """

    documents: Callable[[], Iterator[Document]] = field(repr=False)

    def read(self) -> Iterator[Document]:
        """The documents, without a byte-order mark at the start of a string."""
        warned = False
        for document in self.documents():
            if isinstance(document, str) and document.startswith(_MARK):
                if not warned:
                    _warn(
                        f"{self.name} begins with a byte-order mark (U+FEFF), which would be its "
                        "first token; it was left out. Read files with encoding='utf-8-sig'."
                    )
                warned, document = True, document.removeprefix(_MARK)
            yield document

    def warn_of_its_own(self, texts: int, special: SpecialTokens) -> None:
        """Warn that texts already contained the special tokens of the BOS policy."""
        if texts:
            _warn(
                f"{counted(texts, 'prompt')} of {self.name} had the special token(s) of the BOS "
                f"policy {special.label!r} already; they were not added twice. Pass bos='never' to "
                "use such texts as they are."
            )


@dataclass(frozen=True, kw_only=True)
class Windows(Documents):
    """Windows of equal length, without overlap, from distinct places of a stream of documents.

    A window that begins with the token added by the BOS policy starts after it.
    """

    def _bodies(
        self,
        vocabulary: Vocabulary,
        special: SpecialTokens,
        room: int | None,
        rng: random.Random,
    ) -> list[list[int]]:
        assert room is not None and self.prompts is not None  # texts() always gives both
        stream = self._stream(vocabulary, STREAM * room * self.prompts)
        places = len(stream) // room
        if places < self.prompts:
            raise TextError(self._too_short(len(stream), room))
        start = rng.randrange(len(stream) - places * room + 1)
        starts = [start + place * room for place in rng.sample(range(places), self.prompts)]
        begun = [special.begun(stream[start : start + room]) for start in starts]
        self.warn_of_its_own(sum(map(bool, begun)), special)
        bodies = [stream[at + own :][:room] for at, own in zip(starts, begun, strict=True)]
        if not all(bodies):
            raise TextError(f"{self.name} has nothing but special tokens in one of its windows.")
        return bodies

    def _stream(self, vocabulary: Vocabulary, enough: int) -> list[int]:
        """Ids of the concatenated documents, until there are enough."""
        stream: list[int] = []
        separators = itertools.chain([""], itertools.repeat(_BETWEEN))
        documents = zip(self._nonempty(), separators, strict=False)
        while len(stream) < enough and (batch := list(itertools.islice(documents, TOGETHER))):
            short = [text for text, _ in batch if is_short(text)]
            before = [separator for text, separator in batch if is_short(text)]
            encoded = iter(
                vocabulary.encode([a + b for a, b in zip(before, short, strict=True)])
                if short
                else ()
            )
            for document, separator in batch:
                if is_short(document):
                    stream.extend(next(encoded))
                elif (missing := enough - len(stream)) > 0:
                    stream.extend(vocabulary.first_ids(document, missing, self.name, separator))
        return stream

    def _nonempty(self) -> Iterator[Document]:
        return (document for document in self.read() if beginning(document, WHOLE).strip())

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
class OwnLength(Documents):
    """One prompt per text, at full length or cut at `length`; with `exact`, never shorter."""

    exact: bool = False

    def _bodies(
        self,
        vocabulary: Vocabulary,
        special: SpecialTokens,
        room: int | None,
        rng: random.Random,
    ) -> list[list[int]]:
        documents = list(itertools.islice(self.read(), self.prompts))
        if not documents:
            raise TextError(f"{self.name} is empty; pass at least one text.")
        if self.prompts is not None and len(documents) < self.prompts:
            raise TextError(
                f"{self.name} has {len(documents)} texts, not {self.prompts}; ask for "
                f"{len(documents)}."
            )
        encoded = self._encoded(vocabulary, documents, special, room)
        bodies = [special.inside(ids) for ids in encoded]
        for index, body in enumerate(bodies):
            self._check(index, len(body), len(bodies), room)
        changed = sum(len(a) != len(b) for a, b in zip(bodies, encoded, strict=True))
        self.warn_of_its_own(changed, special)
        return [body[:room] for body in bodies]

    def _encoded(
        self,
        vocabulary: Vocabulary,
        documents: list[Document],
        special: SpecialTokens,
        room: int | None,
    ) -> list[list[int]]:
        """The ids of each document; for a long one, only as many as its prompt may need."""
        limit = room if room is not None else vocabulary.n_ctx
        short = [document for document in documents if is_short(document)]
        encoded = iter(vocabulary.encode(short) if short else ())
        rows = []
        for index, document in enumerate(documents):
            if is_short(document):
                rows.append(next(encoded))
                continue
            needed = _ENDLESS if limit is None else limit + special.count + 1
            rows.append(vocabulary.first_ids(document, needed, f"text {index} of {self.name}"))
            if room is None and len(rows[-1]) >= needed:
                raise TextError(
                    f"Text {index} of {len(documents)} in {self.name} has more tokens than the "
                    f"{limit} positions of this model's context; ask for a length of {limit} or "
                    "less."
                )
        return rows

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
    """Ordinary tokens drawn uniformly and independently."""

    def _bodies(
        self,
        vocabulary: Vocabulary,
        special: SpecialTokens,
        room: int | None,
        rng: random.Random,
    ) -> list[list[int]]:
        ids = vocabulary.ordinary()
        return [rng.choices(ids, k=room or 1) for _ in range(self.prompts or 1)]


@dataclass(frozen=True, kw_only=True)
class RepeatedTokens(TextSource):
    """Prompts of one repeated token; by default a different one in each prompt."""

    token: int | str | None = None

    def _bodies(
        self,
        vocabulary: Vocabulary,
        special: SpecialTokens,
        room: int | None,
        rng: random.Random,
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
        last = {} if size is None else {"at_most": size - 1}
        return whole_number("token", self.token, **last, error=TextError)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, SinkscopeWarning, stacklevel=2)
