"""The packaged texts with the packaged models' tokenizers."""

from __future__ import annotations

import pytest

from sinkscope.errors import TextError
from sinkscope.prompts.texts import random_tokens, texts
from tests.prompts.tiny_tokenizers import model

pytestmark = pytest.mark.real


def test_prose_and_code_are_plenty_for_smollm2(smollm2):
    unbounded = model(smollm2.tokenizer, n_ctx=None, d_vocab=49152)
    for name, prompts, length in (
        ("prose", 64, 256),
        ("code", 64, 1024),
        ("prose", 1, 32768),
        ("code", 1, 32768),
    ):
        result = texts(name, prompts, length).tokenize(unbounded)
        assert result.tokens.shape == (prompts, length)
        assert len({tuple(row) for row in result.tokens.tolist()}) == prompts


def test_smollm2_is_used_to_no_bos(smollm2):
    """Its tokenizer adds nothing, though the bridge's copy of it has been told to."""
    assert texts("prose", 2, 16).tokenize(smollm2).bos == "auto (none)"
    result = texts("prose", 2, 16, bos="always").tokenize(smollm2)
    assert result.bos == "always (<|im_start|>)"
    assert result.tokens[:, 0].tolist() == [1, 1] and result.strings[0][0] == "<|im_start|>"


def test_text_survives_the_round_trip_through_tokens(smollm2):
    sentence = "Summer is warm.\nWinter — naïve – is cold; 1 + 1 == 2."
    result = texts([sentence]).tokenize(smollm2)
    assert smollm2.tokenizer.decode(result.tokens[0]) == sentence
    assert "".join(result.strings[0]).startswith("Summer is warm.\nWinter")


def test_smollm2s_context_is_the_limit(smollm2):
    with pytest.raises(TextError, match="8193 tokens are more than the 8192 positions"):
        texts("code", 1, 8193).tokenize(smollm2)
    assert random_tokens(1, 8192).tokenize(smollm2).tokens.shape == (1, 8192)


def test_minilm_frames_its_text(minilm):
    result = texts("prose", 2, 16).tokenize(minilm)
    assert result.bos == "auto ([CLS] … [SEP])"
    assert [row[0] + row[-1] for row in result.strings] == ["[CLS][SEP]"] * 2
    assert len(result.strings[0]) == 16
    with pytest.raises(TextError, match="more than the 512 positions"):
        texts("prose", 1, 513).tokenize(minilm)
    assert random_tokens(2, 8, bos="random").tokenize(minilm).tokens.shape == (2, 8)
