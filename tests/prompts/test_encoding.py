"""The beginning of a long text has the ids that the whole text has there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sinkscope.errors import TextError
from sinkscope.prompts import encoding
from sinkscope.prompts.documents import TextFile, code, prose
from sinkscope.prompts.encoding import encode, first_ids
from sinkscope.prompts.texts import long_text, texts
from tests.prompts.tiny_tokenizers import bert_like, byte_level, model, words


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space in front of the text, and merges across the whole of it."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    raw.train_from_iterator([text[:20_000] for text in list(prose(0))[:20]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: the best segmentation of each word."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator([text[:20_000] for text in list(prose(0))[:20]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


TOKENIZERS = {
    "words": words,
    "bert": bert_like,
    "bytes": byte_level,
    "sentencepiece": sentencepiece_like,
    "unigram": unigram,
}


def _kinds() -> dict[str, str]:
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefghij", k=9000))
    return {
        "prose": "\n\n".join(prose(0))[:9000],
        "code": next(code(1))[:9000],
        "no spaces": letters,
        "one letter": "a" * 9000,
        "blanks": "".join(draw.choices("a \n\t", k=9000)),
        "signs": "".join(draw.choices("é🙂—x \u200d\U0001f469", k=9000)),
        "w": " ".join(f"w{draw.randrange(4, 40)}" for _ in range(2500)),
    }


KINDS = _kinds()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_beginning_is_that_of_the_whole(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer, text = TOKENIZERS[name](), KINDS[kind]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(encoding, "WHOLE", 1000)
    monkeypatch.setattr(encoding, "_SHORTEST", 500)
    for before in ("", "\n\n"):
        (whole,) = encode(tokenizer, [before + text])
        for document in (text, TextFile(path)):
            for needed in (1, 7, 100, 10**6):
                found = first_ids(tokenizer, document, needed, kind, before)
                assert found == whole[: len(found)]
                assert len(found) >= min(needed, len(whole))


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_tokenizers_too(
    name: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    tokenizer, text = request.getfixturevalue(name).tokenizer, KINDS[kind]
    monkeypatch.setattr(encoding, "WHOLE", 1000)
    monkeypatch.setattr(encoding, "_SHORTEST", 500)
    (whole,) = encode(tokenizer, [text])
    for needed in (1, 100, 300):
        found = first_ids(tokenizer, text, needed, kind)
        assert found == whole[: len(found)] and len(found) >= min(needed, len(whole))


class Counting:
    """A tokenizer of one id a character, which counts the characters that it is given."""

    def __init__(self) -> None:
        self.characters = 0
        self.inside = byte_level()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.characters += sum(map(len, [texts] if isinstance(texts, str) else texts))
        return self.inside(texts, **options)


@pytest.mark.parametrize("where", ["file", "string", "rows"])
def test_of_a_long_text_only_what_is_needed_is_encoded(where: str, tmp_path: Path):
    text = "the quick brown fox " * 300_000  # six million characters, no line break
    path = tmp_path / ("text.jsonl" if where == "rows" else "text.txt")
    path.write_text(f'{{"text": "{text}"}}' if where == "rows" else text)
    tokenizer = Counting()
    source, bridge = [text] if where == "string" else path, model(tokenizer, d_vocab=None)
    own = texts(source, 1, 64, windows=False).tokenize(bridge)
    assert own.lengths.tolist() == [64]
    assert texts(source, 2, 32, windows=True).tokenize(bridge).tokens.shape == (2, 32)
    long = long_text(bridge, source, 64)
    assert long.tokens.tolist() == own.tokens.tolist()
    assert tokenizer.characters < 1_200_000


def test_a_text_longer_than_the_context_is_refused_by_its_beginning():
    tokenizer = Counting()
    with pytest.raises(TextError, match="Text 1 of 2 in strings has more tokens than the 64 pos"):
        texts(["fox", "fox " * 2_000_000]).tokenize(model(tokenizer, n_ctx=64, d_vocab=None))
    assert tokenizer.characters < 500_000


def test_a_long_text_of_few_tokens_is_refused(monkeypatch: pytest.MonkeyPatch):
    """BERT makes one unknown token of a word of any length."""
    for name, value in (("WHOLE", 1000), ("_SHORTEST", 500), ("_LONGEST", 2000)):
        monkeypatch.setattr(encoding, name, value)
    with pytest.raises(TextError, match="first 4,000 characters of word are only 1 tokens, but 8"):
        first_ids(bert_like(), "x" * 10_000, 8, "word")
    assert first_ids(bert_like(), "x" * 10_000, 1, "word") == [3]
