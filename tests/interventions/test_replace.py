"""Start and end tokens: which one stands there, in the tokens and in what the report says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import TextError
from sinkscope.interventions import ReplaceEnd, ReplaceStart

from ..prompts.tiny_tokenizers import WORDS, bert_like, words


def model_with(tokenizer: object) -> SimpleNamespace:
    """The little of a model that texts need."""
    return SimpleNamespace(cfg=SimpleNamespace(n_ctx=64, d_vocab=WORDS), tokenizer=tokenizer)


IDS = [[10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33]]


def test_special_tokens_of_a_decoder() -> None:
    model = model_with(words())
    texts = ReplaceStart(model, "special")(ss.token_ids(IDS))
    assert texts.tokens.tolist() == [[1, 11, 12, 13], [1, 21, 22, 0], [1, 31, 32, 33]]
    assert texts.strings[1] == ["<s>", "w21", "w22"]
    assert texts.bos == "as given, start: special"
    texts = ReplaceEnd(model, "special")(texts)
    assert texts.tokens.tolist() == [[1, 11, 12, 2], [1, 21, 2, 0], [1, 31, 32, 2]]
    assert texts.mask.tolist() == ss.token_ids(IDS).mask.tolist()


def test_special_tokens_of_bert() -> None:
    model = model_with(bert_like())
    texts = ReplaceEnd(model)(ReplaceStart(model)(ss.token_ids(IDS)))
    assert texts.tokens[:, 0].tolist() == [1, 1, 1]
    assert [row[n - 1] for row, n in zip(texts.tokens.tolist(), [4, 3, 4], strict=True)] == [2] * 3


def test_random_tokens_are_ordinary_and_repeatable() -> None:
    model = model_with(words())
    prompts = ss.token_ids([[10, 11]] * 200)
    one = ReplaceStart(model, "random", seed=3)(prompts).tokens
    drawn = set(one[:, 0].tolist())
    assert drawn <= set(range(4, WORDS)), "a special token was drawn"
    assert len(drawn) > 20
    assert torch.equal(one, ReplaceStart(model, "random", seed=3)(prompts).tokens)
    assert not torch.equal(one, ReplaceStart(model, "random", seed=4)(prompts).tokens)
    assert one[:, 1].tolist() == [11] * 200


def test_a_given_token_and_left_padding() -> None:
    model = model_with(words())
    padded = torch.tensor([[0, 10, 11], [20, 21, 22]])
    texts = ReplaceStart(model, 7)(ss.token_ids(padded, padded > 0))
    assert texts.tokens.tolist() == [[7, 11, 0], [7, 21, 22]]


def test_recipes_are_read_first() -> None:
    model = model_with(words())
    texts = ReplaceEnd(model, 9)(ss.texts(["w4 w5 w6", "w7 w8"], bos="never"))
    assert texts.tokens.tolist() == [[4, 5, 9], [7, 9, 0]]
    assert texts.strings == [["w4", "w5", "w9"], ["w7", "w9"]]


def test_refusals() -> None:
    with pytest.raises(TextError, match="no tokenizer"):
        ReplaceStart(model_with(None), "special")
    with pytest.raises(TextError, match="from 0 to 39"):
        ReplaceStart(model_with(words()), WORDS)
    with pytest.raises(TextError, match="expected"):
        ReplaceEnd(model_with(words()), "first")
    without = words(bos_token="<s>")
    with pytest.raises(TextError, match="ends a text"):
        ReplaceEnd(model_with(without), "special")
