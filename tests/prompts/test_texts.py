"""Windows, own lengths, exact ids, random tokens: how prompts are cut, padded and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkscope.errors import SinkscopeWarning, TextError
from sinkscope.prompts.texts import as_texts, random_tokens, repeated_tokens, texts
from sinkscope.prompts.tokens import Texts, exact, read_token_ids, token_ids
from tests.prompts.tiny_tokenizers import WORDS, bert_like, byte_level, model, words


def numbered(count: int) -> str:
    """A text whose tokens tell their place: w4 w5 ... w39 w4 ..."""
    return " ".join(f"w{4 + place % 36}" for place in range(count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """360 tokens in which every run of 36 holds each word once."""
    path = tmp_path / "corpus.txt"
    path.write_text(numbered(360))
    return path


# -- windows


def test_windows_are_equally_long_pieces_of_the_text_without_overlap(corpus: Path):
    result = texts(corpus, prompts=10, length=36).tokenize(model(words()))
    assert result.tokens.shape == (10, 36) and result.mask.all()
    stream = [4 + place % 36 for place in range(360)]
    places = []
    for row in result.tokens.tolist():
        assert sorted(row) == list(range(4, WORDS))  # consecutive tokens of the stream
        places.append([i for i in range(325) if stream[i : i + 36] == row])
    assert all(places)


def test_windows_come_from_distinct_places(tmp_path: Path):
    """40 words, each once: no token may be in two windows."""
    path = tmp_path / "once.txt"
    path.write_text(" ".join(f"w{id}" for id in range(4, 39)))
    tokens = texts(path, prompts=7, length=5).tokenize(model(words())).tokens
    assert sorted(tokens.flatten().tolist()) == list(range(4, 39))


def test_the_seed_decides_and_nothing_else(corpus: Path):
    def draw(seed: int) -> torch.Tensor:
        return texts(corpus, prompts=3, length=20, seed=seed).tokenize(model(words())).tokens

    assert torch.equal(draw(0), draw(0))
    assert not all(torch.equal(draw(0), draw(seed)) for seed in (1, 2, 3))


def test_windows_of_a_fixed_seed_do_not_change_between_versions(corpus: Path):
    """A literal draw: on every machine and Python, this is what seed 0 means."""
    tokens = texts(corpus, prompts=2, length=4, seed=0).tokenize(model(words())).tokens
    assert tokens.tolist() == [[36, 37, 38, 39], [24, 25, 26, 27]]


def test_length_counts_special_tokens(corpus: Path):
    result = texts(corpus, prompts=2, length=10, bos="always").tokenize(model(words()))
    assert result.tokens.shape == (2, 10)
    assert result.tokens[:, 0].tolist() == [1, 1] and (result.tokens[:, 1:] > 3).all()
    result = texts(corpus, prompts=2, length=10).tokenize(model(bert_like()))
    assert result.tokens[:, [0, -1]].tolist() == [[1, 2], [1, 2]]
    assert result.tokens.shape == (2, 10)


def test_a_text_shorter_than_asked_says_what_there_is(tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text(numbered(20))
    with pytest.raises(
        TextError, match=r"it has 20 tokens, .* needs 30; ask for a length of 20 or "
    ):
        texts(path, prompts=1, length=30).tokenize(model(words()))
    with pytest.raises(TextError, match=r"give 2 prompts .* ask for 2, or a length of 6\."):
        texts(path, prompts=3, length=8).tokenize(model(words()))
    # What it proposes works, special tokens included.
    with pytest.raises(TextError, match=r"needs 29 beside .* a length of 21 or less"):
        texts(path, prompts=1, length=30, bos="always").tokenize(model(words()))
    assert len(texts(path, 1, 21, bos="always").tokenize(model(words()))) == 1
    assert len(texts(path, 3, 6).tokenize(model(words()))) == 3


def test_an_empty_file_is_refused(tmp_path: Path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n\n ")
    with pytest.raises(TextError, match=r"empty\.txt is empty"):
        texts(path).tokenize(model(words()))


def test_a_length_beyond_the_context_is_refused_exactly(corpus: Path):
    assert texts(corpus, 1, 64).tokenize(model(words(), n_ctx=64)).tokens.shape == (1, 64)
    with pytest.raises(TextError, match="65 tokens are more than the 64 positions"):
        texts(corpus, 1, 65).tokenize(model(words(), n_ctx=64))
    assert texts(corpus, 1, 300).tokenize(model(words(), n_ctx=None)).tokens.shape == (1, 300)


def test_a_length_without_room_for_text_is_refused(corpus: Path):
    with pytest.raises(TextError, match="length of 2 leaves no room"):
        texts(corpus, 1, 2).tokenize(model(bert_like()))
    for wrong in (0, -1, True):
        with pytest.raises(TextError, match="expected a whole number from 1"):
            texts(corpus, length=wrong)
        with pytest.raises(TextError, match="expected a whole number from 1"):
            texts(corpus, prompts=wrong)


# -- lists of strings, each its own length


def test_a_list_is_one_prompt_each():
    result = texts(["w4 w5 w6", "w7"]).tokenize(model(words()))
    assert result.tokens.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert result.mask.tolist() == [[True, True, True], [True, False, False]]
    assert result.lengths.tolist() == [3, 1]
    assert result.strings == [["w4", "w5", "w6"], ["w7"]]


def test_padding_on_the_left():
    result = texts(["w4 w5 w6", "w7"], padding="left").tokenize(model(words()))
    assert result.tokens.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert result.mask.tolist() == [[True] * 3, [False, False, True]]
    assert result.strings == [["w4", "w5", "w6"], ["w7"]]
    assert result.right_padded().tokens.tolist() == [[4, 5, 6], [7, 0, 0]]
    with pytest.raises(TextError, match="padding is 'both'; expected one of right, left"):
        texts(["w4"], padding="both")


def test_a_length_asks_for_exactly_that_many_tokens():
    assert texts(["w4 w5 w6", "w7 w8"], length=2).tokenize(model(words())).tokens.tolist() == [
        [4, 5],
        [7, 8],
    ]
    with pytest.raises(TextError, match=r"Text 1 of 2 in strings is shorter .* pass length=2, or"):
        texts(["w4 w5 w6", "w7 w8"], length=3).tokenize(model(words()))
    ragged = texts(["w4 w5 w6 w9", "w7 w8"], length=3, windows=False).tokenize(model(words()))
    assert ragged.lengths.tolist() == [3, 2]


def test_a_list_can_be_cut_into_windows():
    result = texts([numbered(40), numbered(50)], 4, 20, windows=True).tokenize(model(words()))
    assert result.tokens.shape == (4, 20)


def test_the_first_prompts_of_a_list():
    result = texts(["w4", "w5", "w6"], prompts=2).tokenize(model(words()))
    assert result.tokens.tolist() == [[4], [5]]
    with pytest.raises(TextError, match="strings has 1 texts, not 3; ask for 1"):
        texts(["w4"], prompts=3).tokenize(model(words()))


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(TextError, match="70 tokens are more than the 64 positions"):
        texts([numbered(70)]).tokenize(model(words(), n_ctx=64))


@pytest.mark.parametrize("wrong", [[], [""], ["w4", "  \n"]])
def test_empty_texts_are_refused(wrong: list[str]):
    with pytest.raises(TextError, match="There is no text to measure"):
        texts(wrong)


def test_a_text_of_no_tokens_is_refused():
    with pytest.raises(TextError, match="Text 0 of 1 in strings is empty"):
        texts(["​"]).tokenize(model(_ignores_everything()))


def _ignores_everything():
    tokenizer = words()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("​", "")
    return tokenizer


# -- exact ids


def test_exact_ids_are_left_alone():
    result = token_ids([[5, 6, 7], [8]]).tokenize(model(words(bos=True)))
    assert result.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert result.bos == "as given" and result.strings == [["w5", "w6", "w7"], ["w8"]]


def test_exact_ids_need_no_tokenizer():
    result = token_ids(torch.tensor([[5, 6]])).tokenize(model(None))
    assert result.tokens.tolist() == [[5, 6]] and result.strings is None


def test_padded_ids_come_with_a_mask():
    ids = [[0, 5, 6], [7, 8, 9]]
    mask = [[0, 1, 1], [1, 1, 1]]
    result = token_ids(ids, mask)
    assert result.mask.dtype == torch.bool and result.lengths.tolist() == [2, 3]
    assert result.right_padded().tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert torch.equal(token_ids(torch.tensor(ids), torch.tensor(mask)).mask, result.mask)


@pytest.mark.parametrize(
    ("ids", "mask", "sentence"),
    [
        ([], None, "at least one token each"),
        ([[]], None, "at least one token each"),
        ([5, 6], None, "list of lists of integers"),
        ("w4", None, "list of lists of integers"),
        ([[1.5]], None, "should be integers"),
        ([["w4"]], None, "text goes to texts.. or --texts"),
        ([[True]], None, "should be integers"),
        (torch.rand(2, 3), None, "should be integers, not torch.float32"),
        (torch.zeros(3, dtype=torch.int64), None, r"shape \(3,\); a prompt alone is ids\[None\]"),
        (np.zeros(3, np.int32), None, r"shape \(3,\); a prompt alone is ids\[None\]"),
        (np.zeros((2, 3)), None, "should be integers, not float64"),
        (np.array([["w4"]]), None, "should be integers, not <U2"),
        (np.ones((2, 3), bool), None, "should be integers, not bool"),
        ({"input_ids": [[5]]}, None, r'not a dict; .*x\["input_ids"\], x\["att'),
        ([[5, 6]], [[1]], "have the shapes"),
        ([[5, 6]], [[1, 2]], "True for real tokens"),
        ([[5, 6], [7]], [[1, 1], [1, 0]], "needs ids of equal length"),
        ([[5, 6, 7]], [[1, 0, 1]], "padding between"),
        ([[5, 6, 7]], [[0, 1, 0]], "padding between or on both sides"),
        ([[5, 6]], [[0, 0]], "one has no token"),
        ([[5, 6]], [[1], [1, 1]], "lists of True and False, one list a prompt"),
        ([[5, 6]], [["yes", "no"]], "lists of True and False"),
        ([[5, 6]], [[1, None]], "lists of True and False"),
        ([[5, 6]], "11", "lists of True and False"),
        ([[5, 2**63]], None, "does not fit into 64 bits"),
        ([[-(2**63) - 1]], None, "does not fit into 64 bits"),
    ],
)
def test_ids_that_are_none(ids: object, mask: object, sentence: str):
    with pytest.raises(TextError, match=sentence):
        exact(ids, mask, "ids")


@pytest.mark.parametrize("wrong", [-1, WORDS])
def test_ids_out_of_range_are_found(wrong: int):
    with pytest.raises(TextError, match=rf"Token id {wrong} at prompt 1, position 2 .* 0 to 39"):
        token_ids([[5], [5, 6, wrong]]).tokenize(model(words()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_integer_type_can_be_embedded(dtype: torch.dtype):
    given = torch.tensor([[5, 6], [7, 8]])
    result = token_ids(given.to(dtype)).tokenize(model(words()))
    table = torch.rand(WORDS, 3)
    assert torch.equal(torch.nn.functional.embedding(result.tokens, table), table[given])


@pytest.mark.parametrize("dtype", ["u1", "i2", "<i4", ">i4", "i8", "u8"])
def test_numpy_ids_of_any_integer_type_are_taken_as_tensors_are(dtype: str):
    array = np.array([[5, 6, 7], [7, 8, 9]], dtype)
    array.flags.writeable = False
    for ids in (array, array[:, ::-1], array.T):
        assert token_ids(ids).tokens.tolist() == ids.tolist()
        assert as_texts(ids).tokens.tolist() == ids.tolist()
    ragged = [array[0], array[1, :2]]
    assert token_ids(ragged).tokens.tolist() == as_texts(ragged).tokens.tolist()
    assert token_ids(ragged).tokens.tolist() == [[5, 6, 7], [7, 8, 0]]


def test_what_a_tokenizer_returns_is_told_apart():
    found = words()(["w4 w5", "w6"], padding=True, return_tensors="np")
    with pytest.raises(TextError, match=r'not a BatchEncoding; .* token_ids\(x\["input_ids"\]'):
        as_texts(found)
    taken = token_ids(found["input_ids"], found["attention_mask"])
    assert taken.right_padded().tokens.tolist() == [[4, 5], [6, 0]]


@pytest.mark.parametrize("pad", [-100, -1, WORDS, 10**9])
@pytest.mark.parametrize("as_ids", [list, torch.tensor])
def test_what_stands_under_the_mask_does_not_matter(pad: int, as_ids):
    ids = as_ids([[5, 6, pad], [7, 8, 9]])
    result = token_ids(ids, [[1, 1, 0], [1, 1, 1]]).tokenize(model(words()))
    assert result.tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    with pytest.raises(TextError, match=f"Token id {pad} at prompt 0, position 2 is out of range"):
        token_ids(ids).tokenize(model(words()))


@pytest.mark.parametrize("tokenizer", [words(), None])
def test_padding_without_a_mask_is_said(tokenizer: object):
    """0 is the padding token, or without a tokenizer is taken for it where it stands twice."""
    for ids, where in (([[0, 0, 5], [6, 7, 8]], "begins"), ([[5, 0, 0], [6, 0, 0]], "end with")):
        with pytest.warns(SinkscopeWarning, match=f"prompts? of exact token ids {where}"):
            result = token_ids(ids).tokenize(model(tokenizer))
        assert result.tokens.tolist() == ids and result.mask.all()
    masked = token_ids([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]]).tokenize(model(tokenizer))
    assert masked.lengths.tolist() == [1, 3]


def test_what_is_no_padding_is_taken_in_silence():
    eos = words(bos_token="</s>", eos_token="</s>")
    eos.pad_token = "</s>"  # as for GPT-2: one in front is BOS
    assert token_ids([[2, 5, 6], [2, 7, 2]]).tokenize(model(eos)).lengths.tolist() == [3, 3]
    with pytest.warns(SinkscopeWarning, match="1 prompt of exact token ids begins"):
        token_ids([[2, 2, 5], [2, 7, 2]]).tokenize(model(eos))
    assert len(token_ids([[0, 0, 0]]).tokenize(model(words()))) == 1  # one token, repeated
    assert len(token_ids([[0, 5]]).tokenize(model(None))) == 1
    no_pad = words()
    no_pad.pad_token = None
    assert len(token_ids([[0, 0, 5]]).tokenize(model(no_pad))) == 1


def test_ids_beyond_the_embedding_are_the_tokenizers_fault():
    for recipe in (texts(["w4 w39"]), random_tokens(64, 8, bos="always")):
        given = words()
        given.add_tokens(["<new>"])
        if recipe.name == "strings":
            with pytest.raises(TextError, match=r"gives the id 39 .*rows 0 to 19; load the token"):
                recipe.tokenize(model(given, d_vocab=20))
        else:
            assert int(recipe.tokenize(model(given, d_vocab=20)).tokens.max()) < 20


@pytest.mark.parametrize("wrong", [True, -5, 2**63])
def test_counts_and_seeds_are_whole_numbers(wrong: int):
    for make in (random_tokens, repeated_tokens, lambda **given: texts("prose", **given)):
        for name in ("prompts", "length", "seed"):
            with pytest.raises(TextError, match=f"{name} is .*; expected a whole number from"):
                make(**{name: wrong})
    with pytest.raises(TextError, match="token is .*; expected a whole number from 0 to 39"):
        repeated_tokens(wrong).tokenize(model(words()))


def test_numpys_ids_in_lists_are_ids():
    assert as_texts([[np.int32(5), 6]]).tokens.tolist() == [[5, 6]]


def test_too_many_exact_ids_are_refused():
    with pytest.raises(TextError, match="65 tokens are more than the 64"):
        token_ids([[5] * 65]).tokenize(model(words(), n_ctx=64))


def test_a_json_file_of_ids(tmp_path: Path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([[5, 6], [7]]))
    assert read_token_ids(path).tokens.tolist() == [[5, 6], [7, 0]]
    assert isinstance(texts(path), Texts) and texts(path).source == "tokens.json"
    with pytest.raises(TextError, match="used as they are"):
        texts(path, length=5)
    with pytest.raises(TextError, match="leave out prompts, bos"):
        texts(path, 5, bos="always")
    with pytest.raises(TextError, match="There is no text file 'none.json'"):
        texts("none.json", length=5)
    path.write_text('{"text": 1}')
    with pytest.raises(TextError, match=r"tokens\.json: Token ids should be a list of lists"):
        read_token_ids(path)
    path.write_text("[[5,")
    with pytest.raises(TextError, match="cannot be read as JSON"):
        read_token_ids(path)
    for digits in (20, 5000):  # Python itself refuses to read the longer one
        path.write_text(f"[[5, {'9' * digits}]]")
        with pytest.raises(TextError, match=r"tokens\.json"):
            read_token_ids(path)
    with pytest.raises(TextError, match=r"cannot be read: No such file"):
        read_token_ids(tmp_path / "none.json")


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(4, 39), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding_either_side_and_back_keeps_the_tokens(rows: list[list[int]]):
    result = token_ids(rows)
    left = result.left_padded()
    for padded in (result, left, left.right_padded(), left.left_padded()):
        kept = [r[m].tolist() for r, m in zip(padded.tokens, padded.mask, strict=True)]
        assert kept == rows
    assert left.mask[:, -1].all() and left.right_padded().mask[:, 0].all()
    assert torch.equal(left.right_padded().tokens, result.tokens)


# -- random and repeated tokens


def test_random_tokens_are_ordinary_and_even():
    result = random_tokens(64, 64).tokenize(model(words()))
    counts = torch.bincount(result.tokens.flatten(), minlength=WORDS)
    assert counts[:4].tolist() == [0, 0, 0, 0]  # <pad>, <s>, </s>, <unk>
    expected = 64 * 64 / 36
    assert (counts[4:] > 0.6 * expected).all() and (counts[4:] < 1.4 * expected).all()
    assert result.bos == "never"


def test_random_tokens_need_no_tokenizer_and_stay_inside_the_vocabulary():
    tokens = random_tokens(8, 64).tokenize(model(None, d_vocab=10)).tokens
    assert set(tokens.flatten().tolist()) == set(range(10))
    tokens = random_tokens(8, 64).tokenize(model(words(), d_vocab=20)).tokens
    assert set(tokens.flatten().tolist()) == set(range(4, 20))


def test_random_tokens_after_bos():
    result = random_tokens(3, 8, bos="always").tokenize(model(words()))
    assert result.tokens.shape == (3, 8) and (result.tokens[:, 0] == 1).all()
    with pytest.raises(TextError, match="needs a tokenizer and this model has none"):
        random_tokens(3, 8, bos="always").tokenize(model(None))


def test_repeated_tokens():
    result = repeated_tokens("w9", 2, 5).tokenize(model(words()))
    assert result.tokens.tolist() == [[9] * 5] * 2
    assert repeated_tokens(11, 1, 3).tokenize(model(None)).tokens.tolist() == [[11] * 3]
    drawn = repeated_tokens(prompts=5, length=4).tokenize(model(words())).tokens
    assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0].tolist())) == 5
    with pytest.raises(TextError, match="'w9 w8' is 2 tokens for this model"):
        repeated_tokens("w9 w8").tokenize(model(words()))
    with pytest.raises(TextError, match="token is 99; expected a whole number from 0 to 39"):
        repeated_tokens(99).tokenize(model(words()))
    more = repeated_tokens(prompts=50, length=2).tokenize(model(words())).tokens
    assert more.shape == (50, 2)  # more prompts than ordinary tokens


# -- what a scan may be given


def test_as_texts():
    recipe = texts(["w4"])
    assert as_texts(recipe) is recipe
    assert as_texts(["w4 w5"]).tokenize(model(words())).tokens.tolist() == [[4, 5]]
    assert as_texts([[4, 5]]).tokens.tolist() == [[4, 5]]
    assert as_texts(torch.tensor([[4, 5]])).tokens.tolist() == [[4, 5]]
    assert as_texts("prose").name == "prose"
    with pytest.raises(TextError, match="not int"):
        as_texts(3)
    with pytest.raises(TextError, match="should be integers"):
        as_texts([["w4"]])


def test_text_needs_a_tokenizer():
    with pytest.raises(TextError, match="has no tokenizer"):
        texts(["w4"], bos="never").tokenize(model(None))


def test_token_text_keeps_spaces_and_half_characters():
    result = texts([" the fox\0é"]).tokenize(model(byte_level(), d_vocab=None))
    assert "".join(result.strings[0]).startswith(" the")
    assert len(result.strings[0]) == len(result.tokens[0])
    assert result.strings[0][-1] == "�"  # half of é


def test_the_repr_is_one_line():
    assert repr(token_ids([[4, 5], [6]])) == (
        "Texts('token ids': 2 prompts, 1 to 2 tokens, BOS as given)"
    )
    assert "0x" not in repr(texts("prose", prompts=2, length=8))
    assert "1 prompt, 2 tokens each" in repr(token_ids([[4, 5]]))
