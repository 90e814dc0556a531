"""Packaged prose and code, files, data sets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinkscope.errors import TextError
from sinkscope.prompts import documents as _documents
from sinkscope.prompts.documents import code, json_lines, prose, text_file
from sinkscope.prompts.texts import as_texts, texts
from tests.unit.tiny_tokenizers import byte_level, model, words


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


def test_another_process_draws_the_same_prompts():
    """Python salts hash() anew in each process; nothing may depend on it."""
    program = (
        "from sinkscope.prompts.texts import texts; from tests.unit.tiny_tokenizers import *;"
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


def test_a_text_file_in_blocks_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_documents, "_BLOCK", 50)
    lines = "".join(f"line {number} of the file, é\n" for number in range(40))
    path = tmp_path / "text.txt"
    path.write_text(lines, encoding="utf-8")
    blocks = list(text_file(path))
    assert "".join(blocks) == lines and len(blocks) > 5
    assert all(block.endswith("\n") for block in blocks)


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


@pytest.mark.parametrize("source", [7, [1, 2], ["text", 1], {"text": 1}])
def test_what_is_no_source_at_all(source: object):
    with pytest.raises(TextError, match="given as the name of a source, a path or a list of str"):
        as_texts(source)


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
        ("{}", "text", "is written hf:owner/name:split"),
        ("{}:", "text", "is written hf:owner/name:split"),
        ("{}:test", "text", "cannot be read"),
        ("{}/none:train", "text", "cannot be read"),
        ("{}:train", "body", "has no text under 'body' .it has text, n"),
    ],
)
def test_data_sets_that_cannot_be_read(local_set: Path, address: str, key: str, sentence: str):
    with pytest.raises(TextError, match=sentence):
        texts("hf:" + address.format(local_set), key=key).tokenize(model(words()))
