"""Packaged prose and code, files, data sets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sinkscope.errors import SinkscopeWarning, TextError
from sinkscope.prompts import documents as _documents
from sinkscope.prompts.documents import beginning, code, json_lines, prose, text_file
from sinkscope.prompts.texts import as_texts, texts
from tests.prompts.tiny_tokenizers import byte_level, model, words


def test_prose_reads_as_prose():
    paragraphs = "\n\n".join(prose(0)).split("\n\n")
    assert len(paragraphs) > 500
    assert len(set(paragraphs)) == len(paragraphs)  # topics overlap, paragraphs do not
    for paragraph in paragraphs:
        assert "\n" not in paragraph and "  " not in paragraph
        assert not re.search(r">>>|::=|\*\*\*\*|====", paragraph)
    letters = sum(c.isalpha() or c == " " for p in paragraphs for c in p)
    assert letters > 0.9 * sum(map(len, paragraphs))


def test_prose_is_enough_for_long_contexts():
    """About 4 characters a token: 64 prompts of 256, or one of 32k."""
    assert sum(map(len, prose(0))) > 4.2 * 32768


def test_code_is_python_and_plenty():
    modules = list(code(0))
    assert sum(map(len, modules)) > 2_000_000
    for module in modules[:5]:
        compile(module, "module", "exec")
    assert not any(name in sys.modules for name in ("mailbox", "imaplib", "poplib"))  # only read


@pytest.mark.parametrize("domain", [prose, code])
def test_the_order_is_the_seeds(domain):
    assert list(domain(0)) == list(domain(0))
    assert list(domain(0)) != list(domain(1))
    assert sum(map(len, domain(0))) == pytest.approx(sum(map(len, domain(1))), rel=0.01)


@pytest.mark.slow
def test_another_process_draws_the_same_prompts():
    """Python salts hash() anew in each process; nothing may depend on it."""
    program = (
        "from sinkscope.prompts.texts import texts; from tests.prompts.tiny_tokenizers import *;"
        "model = model(byte_level(), d_vocab=None);"
        "print(texts('prose', 3, 20, seed=5).tokenize(model).tokens.tolist())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(runs) == 1 and runs != {""}


@pytest.mark.parametrize("name", ["prose", "code"])
def test_domains_give_windows(name: str):
    result = texts(name, prompts=4, length=32).tokenize(model(byte_level(), d_vocab=None))
    assert result.tokens.shape == (4, 32) and result.source == name
    assert result.seed == 0 and len(result.strings[0]) == 32


def test_only_as_much_as_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = 0

    def endless(seed: int) -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield "w4 w5 w6 w7"

    monkeypatch.setitem(_documents.DOMAINS, "prose", endless)
    assert texts("prose", 2, 10).tokenize(model(words())).tokens.shape == (2, 10)
    assert drawn < 100


def test_documents_are_prompts_where_windows_are_not_wanted(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("w4 w5 w6", "w7", "w8 w9")))
    result = texts(path, prompts=3, length=2, windows=False).tokenize(model(words()))
    assert result.tokens.tolist() == [[4, 5], [7, 0], [8, 9]]
    assert result.lengths.tolist() == [2, 1, 2]


# -- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_file_is_one_document_without_a_byte_order_mark(tmp_path: Path, encoding: str):
    text = "The cat sat,\nnaïve – on the mat. 🙂\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding))
    (document,) = text_file(path)
    assert beginning(document, 1000) == text
    assert beginning(document, 7) == text[:7]


@pytest.mark.parametrize("big_endian", [False, True])
def test_utf_16_is_told_by_its_mark_alone(tmp_path: Path, big_endian: bool):
    mark, name = ("\ufeff", "utf-16-be" if big_endian else "utf-16-le")
    (tmp_path / "marked.txt").write_bytes((mark + "w4 w5 w6").encode(name))
    (tmp_path / "bare.txt").write_bytes("w4 w5 w6".encode(name))
    result = texts(tmp_path / "marked.txt", 1, 3).tokenize(model(words()))
    assert result.tokens.tolist() == [[4, 5, 6]]
    with pytest.raises(TextError, match=r"bare\.txt has zero bytes.* save it as UTF-8"):
        texts(tmp_path / "bare.txt", 1, 3).tokenize(model(words()))


def test_json_files_may_begin_with_a_byte_order_mark(tmp_path: Path):
    lines, ids = tmp_path / "lines.jsonl", tmp_path / "ids.json"
    lines.write_text('{"text": "w4 w5"}\n', encoding="utf-8-sig")
    ids.write_text("[[4, 5]]", encoding="utf-8-sig")
    for path in (lines, ids):
        source = texts(path, windows=False, prompts=1) if path is lines else texts(path)
        assert source.tokenize(model(words())).tokens.tolist() == [[4, 5]]


def test_a_mark_that_a_string_begins_with_is_left_out_and_said(tmp_path: Path):
    """What open(path, encoding="utf-8").read() gives; and the same in a row of a data set."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "\ufeffw4 w5"}) + "\n")
    for source in (texts(["\ufeffw4 w5"]), texts(path, 1, windows=False)):
        with pytest.warns(SinkscopeWarning, match="begins with a byte-order mark"):
            assert source.tokenize(model(words())).tokens.tolist() == [[4, 5]]


def test_a_folder_that_one_may_not_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbidden(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", forbidden)
    with pytest.raises(TextError, match=r"text\.txt cannot be read: Permission denied"):
        texts(tmp_path / "text.txt")


def test_json_that_is_nested_too_deep(tmp_path: Path):
    deep = "[" * 100_000
    (tmp_path / "deep.json").write_text(deep)
    (tmp_path / "deep.jsonl").write_text(deep)
    for name in ("deep.json", "deep.jsonl"):
        with pytest.raises(TextError, match=rf"{name} cannot be read as JSON"):
            texts(tmp_path / name).tokenize(model(words()))


def test_json_lines_with_another_key(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert list(json_lines(path, "body")) == ["one", "two"]
    with pytest.raises(TextError, match=r"Line 1 of .* under 'text' \(it has body\); in Python,"):
        list(json_lines(path, "text"))
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(TextError, match=r"Line 2 of .* is not JSON"):
        list(json_lines(path, "text"))
    path.write_text("[1]\n")
    with pytest.raises(TextError, match="it has no keys"):
        list(json_lines(path, "text"))


@pytest.mark.parametrize("name", ["bytes.txt", "bytes.jsonl"])
def test_a_binary_file_is_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(TextError, match="cannot be read as UTF-8 text"):
        texts(path).tokenize(model(words()))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("pros", "did you mean 'prose'"),
        ("wikipedia", "the packaged ones are prose and code"),
        ("folder/none.txt", "There is no text file 'folder/none.txt'"),
        ("none.jsonl", "There is no text file"),
        (Path("none"), "There is no text file"),
        ("Summer is warm. Winter is cold.", "There is no text"),
    ],
)
def test_sources_that_do_not_exist(source: object, sentence: str):
    with pytest.raises(TextError, match=sentence):
        texts(source)


@pytest.mark.parametrize("source", ["word " * 60, "two\nlines", "a\0b", "x" * 5000])
def test_a_paragraph_is_no_name_of_a_file(source: str):
    with pytest.raises(TextError, match="There is no text source or file named .* list of strings"):
        as_texts(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (7, "given as the name of a source, a path or a list of strings, not int"),
        ({"text": 1}, "list of strings, not dict"),
        (None, "list of strings, not NoneType"),
        ([1, 2], r"the ids of a single prompt, so put them into a list: \[\[1, 2\]\]"),
        ([np.int64(1)], "the ids of a single prompt"),
        (["text", 1], "Text 1 of 2 is 1, but a list of texts must contain only strings"),
        (["text", None], "Text 1 of 2 is None, but"),
        ([None, None], "Text 0 of 2 is None.* for token ids use"),
        (["text", [5, 6]], r"Text 1 of 2 is \[5, 6\]"),
        ([[5, 6], "text"], "one list a prompt"),
        ([[5, None]], "integers, not None"),
        ([[5.0]], "integers, not 5.0"),
        ([1.5, 2.5], "Text 0 of 2 is 1.5"),
        (np.array(["w4"]), r"not ndarray \(pass x.tolist\(\)\)"),
        (np.array(["w4", None]), "not ndarray"),
        (np.array([[4.0]]), "should be integers, not float64"),
        (b"bytes", "not bytes"),
    ],
)
def test_what_is_no_source_at_all(source: object, sentence: str):
    with pytest.raises(TextError, match=sentence):
        as_texts(source)


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00", "w4 \ude00 w5"])
def test_half_a_character_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text}))  # JSON can write what UTF-8 cannot
    for source in (texts([text]), texts(path, 1, windows=False), texts([text], 1, 1, windows=True)):
        with pytest.raises(TextError, match="half of a surrogate pair at character"):
            source.tokenize(model(byte_level(), d_vocab=None))


# -- data sets


@pytest.fixture
def local_set(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"w{4 + n % 30} w5 w6 w7", "n": n} for n in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_data_set_is_streamed(local_set: Path):
    source = texts(f"hf:{local_set}:train", prompts=4, length=8)
    result = source.tokenize(model(words()))
    assert result.tokens.shape == (4, 8)
    assert result.tokens.tolist() == source.tokenize(model(words())).tokens.tolist()


@pytest.mark.parametrize(
    ("address", "key", "sentence"),
    [
        ("{}", "text", "is given as hf:owner/name:split"),
        ("{}:", "text", "is given as hf:owner/name:split"),
        ("{}:test", "text", "cannot be read"),
        ("{}/none:train", "text", "cannot be read"),
        ("{}:train", "body", "has no text under 'body' .it has text, n"),
    ],
)
def test_data_sets_that_cannot_be_read(local_set: Path, address: str, key: str, sentence: str):
    with pytest.raises(TextError, match=sentence):
        texts("hf:" + address.format(local_set), key=key).tokenize(model(words()))


def test_a_silent_server_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_documents, "_WARN_AFTER", 0.05)
    monkeypatch.setattr(_documents, "_GIVE_UP_AFTER", 0.15)
    answer = threading.Event()

    def rows() -> Iterator[str]:
        yield "first"
        answer.wait(30)
        yield "second"

    found = _documents._in_time(rows, "The data set hf:a:b")
    assert next(found) == "first"
    with (
        pytest.warns(SinkscopeWarning, match="hf:a:b has sent nothing for 0 s; waiting"),
        pytest.raises(TextError, match="hf:a:b has sent nothing for 0 s; check the network"),
    ):
        next(found)
    answer.set()


def test_reading_rows_in_a_thread_changes_nothing():
    assert list(_documents._in_time(lambda: iter(range(100)), "numbers")) == list(range(100))

    def breaks() -> Iterator[int]:
        yield 1
        raise ConnectionError("gone")

    found = _documents._in_time(breaks, "numbers")
    assert next(found) == 1
    with pytest.raises(ConnectionError, match="gone"):
        next(found)
