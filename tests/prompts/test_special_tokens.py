"""The BOS policy: what it puts around a text, and the record of it."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
from transformers import AutoTokenizer

from sinkscope.errors import SinkscopeWarning, TextError
from sinkscope.prompts.special_tokens import ordinary_ids, special_tokens
from sinkscope.prompts.texts import long_text, texts
from tests.prompts.tiny_tokenizers import WORDS, bert_like, model, words


@pytest.mark.parametrize(
    ("tokenizer", "policy", "ids", "label"),
    [
        (words(), "auto", [4, 5], "auto (none)"),
        (words(), "always", [1, 4, 5], "always (<s>)"),
        (words(), "never", [4, 5], "never"),
        (words(bos=True), "auto", [1, 4, 5], "auto (<s>)"),
        (words(bos=True), "always", [1, 4, 5], "always (<s>)"),
        (words(bos=True), "never", [4, 5], "never"),
        (bert_like(), "auto", [1, 4, 5, 2], "auto ([CLS] … [SEP])"),
        (bert_like(), "always", [1, 4, 5, 2], "always ([CLS] … [SEP])"),
        (bert_like(), "never", [4, 5], "never"),
    ],
)
def test_policies(tokenizer: object, policy: str, ids: list[int], label: str):
    result = texts(["w4 w5"], bos=policy).tokenize(model(tokenizer))
    assert result.tokens.tolist() == [ids]
    assert result.bos == label


@pytest.mark.parametrize(
    ("tokenizer", "policy", "text", "ids"),
    [
        (words(), "always", "<s> w4 w5", [1, 4, 5]),
        (words(bos=True), "auto", "<s> w4 w5", [1, 4, 5]),
        (bert_like(), "auto", "[CLS] w4 [SEP]", [1, 4, 2]),
        (bert_like(), "always", "w4 [SEP]", [1, 4, 2]),
    ],
)
def test_special_tokens_that_a_text_brings_stand_once(tokenizer, policy, text, ids):
    """As chat templates do: apply_chat_template(..., tokenize=False) begins with BOS."""
    with pytest.warns(SinkscopeWarning, match="1 prompt of strings had .* Pass bos='never'"):
        result = texts([text], bos=policy).tokenize(model(tokenizer))
    assert result.tokens.tolist() == [ids]


def test_a_text_with_bos_is_left_alone_where_none_is_put():
    assert texts(["<s> w4"], bos="never").tokenize(model(words())).tokens.tolist() == [[1, 4]]
    assert texts(["<s> w4"]).tokenize(model(words())).tokens.tolist() == [[1, 4]]
    inside = texts(["w4 <s> w5"], bos="always").tokenize(model(words()))
    assert inside.tokens.tolist() == [[1, 4, 1, 5]]


def test_length_is_kept_where_a_text_brings_bos(tmp_path: Path):
    with pytest.warns(SinkscopeWarning):
        cut = texts(["<s> w4 w5 w6"], length=3, bos="always").tokenize(model(words()))
    assert cut.tokens.tolist() == [[1, 4, 5]]
    path = tmp_path / "chat.txt"
    path.write_text("<s> w4 w5 w6 <s> w7 w8 w9 <s>")
    with pytest.warns(SinkscopeWarning, match=r"2 prompts of chat\.txt"):
        windows = texts(path, 2, 5, bos="always", seed=1).tokenize(model(words()))
    assert sorted(windows.tokens.tolist()) == [[1, 4, 5, 6, 1], [1, 7, 8, 9, 1]]
    with pytest.warns(SinkscopeWarning):
        long = long_text(model(words()), path, 4, bos="always")
    assert long.tokens.tolist() == [[1, 4, 5, 6]]


def test_random_stands_wherever_always_puts_a_special_token():
    result = texts(["w4 w5"] * 50, bos="random").tokenize(model(words()))
    assert result.tokens.shape == (50, 3) and result.bos == "random"
    assert (result.tokens[:, 1:] == result.tokens[0, 1:]).all()
    first = set(result.tokens[:, 0].tolist())
    assert len(first) > 15 and first <= set(range(4, WORDS))
    both_ends = texts(["w4 w5"] * 50, bos="random").tokenize(model(bert_like())).tokens
    assert both_ends.shape == (50, 4) and (both_ends > 3).all()
    assert len(set(both_ends[:, 3].tolist())) > 15


def test_always_needs_a_bos_token():
    with pytest.raises(TextError, match="bos='always' needs a BOS token"):
        texts(["w4"], bos="always").tokenize(model(words(eos_token="</s>")))


def test_an_unknown_policy_is_refused():
    with pytest.raises(TextError, match="bos is 'maybe'; expected one of auto, always"):
        texts(["w4"], bos="maybe").tokenize(model(words()))


def test_auto_is_what_the_author_shipped_not_what_transformer_lens_made_of_it(tmp_path: Path):
    """TransformerLens reloads tokenizers with add_bos_token=True; sinks must not depend on it."""
    from transformer_lens.utilities import get_tokenizer_with_bos

    words().save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    rewritten = get_tokenizer_with_bos(own)
    assert own("w4")["input_ids"] == [4] and rewritten("w4")["input_ids"] == [1, 4]
    result = texts(["w4"]).tokenize(model(rewritten))
    assert result.tokens.tolist() == [[4]] and result.bos == "auto (none)"
    result = texts(["w4"], bos="always").tokenize(model(rewritten))
    assert result.tokens.tolist() == [[1, 4]] and result.bos == "always (<s>)"


def test_a_bos_that_transformer_lens_invented_is_not_one(tmp_path: Path):
    """It sets a missing BOS to EOS (Qwen) or to <|endoftext|> (BERT)."""
    from transformer_lens.model_bridge.sources._hf_format import setup_tokenizer

    words(eos_token="</s>").save_pretrained(tmp_path)
    invented = setup_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert invented.bos_token == "</s>"
    with pytest.raises(TextError, match="bos='always' needs a BOS token"):
        texts(["w4"], bos="always").tokenize(model(invented))

    bert_like().save_pretrained(tmp_path / "bert")
    invented = setup_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "bert"))
    result = texts(["w4"], bos="always").tokenize(model(invented))
    assert result.tokens.tolist() == [[1, 4, 2]]


def test_a_tokenizer_that_rewrites_the_text_around_special_tokens_is_refused():
    class Odd:
        init_kwargs = MappingProxyType({})
        bos_token = eos_token = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict:
            return {"input_ids": [1, 7, 8] if add_special_tokens else [4, 5]}

    with pytest.raises(TextError, match="pass bos='never'"):
        special_tokens(Odd(), "auto", None)


def test_ordinary_ids_leave_out_every_special_token():
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    assert ordinary_ids(tokenizer, None) == [id for id in range(4, WORDS) if id != 9]
    assert ordinary_ids(tokenizer, 8) == [4, 5, 6, 7]


def test_a_tokenizer_with_truncation_or_padding_set_is_still_exact():
    """Packaged tokenizers often carry max_length=128 in their file."""
    tokenizer = words()
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    result = texts(["w4 w5 w6 w7 w8"]).tokenize(model(tokenizer))
    assert result.tokens.tolist() == [[4, 5, 6, 7, 8]]
