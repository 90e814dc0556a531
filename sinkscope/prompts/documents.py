"""Sources of text: the Python installation, files, Hugging Face data sets.

Each function yields documents in an order determined by the seed, so that the same call gives the
same text on every machine with the same Python. A document is a string, or a text file that is read
only as far as needed.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import json
import os
import queue
import random
import re
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkscope.errors import SinkscopeWarning, TextError

# Pure-Python modules in Python 3.11 and later that are long enough to serve as programs.
_MODULES = """
    _pydecimal argparse ast asyncio.base_events base64 bdb calendar cmd collections
    configparser contextlib copy csv dataclasses difflib dis doctest email.message enum fractions
    ftplib functools gettext gzip heapq html.parser http.client http.cookiejar http.cookies
    http.server imaplib inspect ipaddress json.decoder locale logging logging.handlers mailbox
    mimetypes optparse pdb pickle pickletools platform plistlib poplib pprint
    pydoc queue random sched selectors shelve shlex shutil smtplib socket socketserver statistics
    string subprocess tarfile tempfile textwrap threading timeit tokenize traceback types typing
    unittest.case unittest.mock urllib.parse urllib.request uuid warnings wave weakref
    xml.dom.minidom xml.etree.ElementTree
""".split()

_NAME_IT = "in Python, texts(..., key=...) names another key; the command line takes 'text' alone"


def prose(seed: int) -> Iterator[str]:
    """Running English prose: the topics of Python's ``help()`` without their code."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(
            "This Python was installed without pydoc_data, which contains the prose; pass a path "
            "to a text file instead."
        ) from error
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    seen: set[str] = set()  # overview topics of the manual repeat paragraphs of others
    for name in names:
        paragraphs = [text for text in _paragraphs(topics[name]) if text not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield "\n\n".join(paragraphs)


def code(seed: int) -> Iterator[str]:
    """Python source: whole modules of the standard library."""
    names = list(_MODULES)
    random.Random(seed).shuffle(names)
    any_file = False
    for name in names:
        spec = importlib.util.find_spec(name)
        path = Path(spec.origin) if spec and spec.origin else None
        if path and path.suffix == ".py" and path.is_file():
            any_file = True
            yield path.read_text(encoding="utf-8")
    if not any_file:
        raise TextError(
            "This Python was installed without its library's source, which is the code; pass a "
            "path to a text file instead."
        )


DOMAINS: dict[str, Callable[[int], Iterator[str]]] = {"prose": prose, "code": code}


def _paragraphs(topic: str) -> list[str]:
    """Paragraphs of one topic, lines joined; no headings, code, grammar or signatures."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", topic):
        text = " ".join(re.sub(r"^\s*(\*|\d+\.)\s+", "", line) for line in block.splitlines())
        text = re.sub(r"(\w)- (?=[a-z])", r"\1-", " ".join(text.split()))
        if _is_prose(text):
            paragraphs.append(text)
    return paragraphs


def _is_prose(text: str) -> bool:
    """Whether a paragraph consists of sentences rather than code, a table or a heading."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return (
        len(text.split()) >= 8
        and text[-1] in ".:!?)"
        and letters >= 0.85 * len(text)
        and not any(mark in text for mark in ("::=", ">>>", "****", "===="))
    )


@dataclass(frozen=True)
class TextFile:
    """A text file as one document that is read only as far as needed."""

    path: Path

    def beginning(self, characters: int) -> str:
        """The first characters, without a byte-order mark.

        Raises:
            TextError: If it cannot be read, or is not text.
        """
        with _readable(self.path), self.path.open(encoding=_encoding(self.path)) as handle:
            return _text(handle.read(characters), self.path)


Document = str | TextFile


def beginning(document: Document, characters: int) -> str:
    """The first characters of a document."""
    if isinstance(document, TextFile):
        return document.beginning(characters)
    return document[:characters]


def text_file(path: Path) -> Iterator[TextFile]:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is removed."""
    yield TextFile(path)


def json_lines(path: Path, key: str) -> Iterator[str]:
    """The texts under `key` in a file of JSON objects, one per line."""
    with _readable(path), path.open(encoding=_encoding(path)) as handle:
        for number, line in enumerate(handle, start=1):
            if _text(line, path).strip():
                yield _text_of(line, key, f"Line {number} of {path}")


def read_text(path: Path) -> str:
    """Read a whole text file, without a byte-order mark.

    Raises:
        TextError: If it cannot be read, or is not text.
    """
    with _readable(path):
        return _text(path.read_text(encoding=_encoding(path)), path)


def is_file(path: str | Path) -> bool:
    """Whether a string is the path of a file, and not a text to be measured.

    Raises:
        TextError: If it may be in a folder without access permission.
    """
    try:
        os.stat(path)
    except PermissionError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from error
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False
    return os.path.isfile(path)


_MARKS = {  # UTF-32 first, as its mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _encoding(path: Path) -> str:
    """The encoding of a text file by its byte-order mark; UTF-8 without one."""
    with path.open("rb") as handle:
        start = handle.read(4)
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert errors while reading text into one sentence."""
    try:
        yield
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeError as error:
        raise TextError(
            f"{path} cannot be read as UTF-8 text ({error}); save it as UTF-8, or as UTF-16 with "
            "a byte-order mark."
        ) from error


def _text(text: str, path: Path) -> str:
    """Check that the text of a file has no zero bytes, which indicate another encoding."""
    if "\0" in text:
        raise TextError(
            f"{path} has zero bytes, unlike text in UTF-8; save it as UTF-8, or as UTF-16 with a "
            "byte-order mark."
        )
    return text


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{where} is not JSON: {error}.") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise TextError(f"{where} cannot be read as JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        keys = ", ".join(record) if isinstance(record, dict) else "no keys"
        raise TextError(f"{where} has no text under {key!r} (it has {keys}); {_NAME_IT}.")
    return record[key]


def data_set(address: str, key: str, seed: int) -> Iterator[str]:
    """A Hugging Face data set, streamed: "owner/name:split" or "owner/name:config:split"."""
    parts = address.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise TextError(
            f"A data set is given as hf:owner/name:split or hf:owner/name:config:split, not "
            f"{'hf:' + address!r}."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError("Data sets need the datasets package: pip install datasets.") from error
    rows = _in_time(lambda: _rows(load_dataset, parts, seed), f"The data set hf:{address}")
    try:
        first = next(rows, None)
    except TextError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such split, ...
        reason = textwrap.shorten(str(error), 200)
        raise TextError(f"The data set hf:{address} cannot be read: {reason}") from error
    if first is None:
        return
    if not isinstance(first.get(key), str):
        raise TextError(
            f"The data set hf:{address} has no text under {key!r} (it has {', '.join(first)}); "
            f"{_NAME_IT}."
        )
    yield first[key]
    yield from (row[key] for row in rows)


def _rows(load_dataset: Callable[..., Any], parts: list[str], seed: int) -> Iterator[Any]:
    name, *config, split = parts
    rows = load_dataset(name, *config, split=split, streaming=True)
    yield from rows.shuffle(seed=seed, buffer_size=1000)


_WARN_AFTER, _GIVE_UP_AFTER = 20.0, 300.0  # seconds without a row; the first comes after a thousand


def _in_time(rows: Callable[[], Iterator[Any]], what: str) -> Iterator[Any]:
    """Yield from an iterator that runs in a thread, to detect a server that does not respond.

    Raises:
        TextError: If no item arrives for five minutes. Exceptions of the iterator are passed on.
    """
    arrived: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=16)
    over = threading.Event()

    def deliver(kind: str, value: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return arrived.put((kind, value), timeout=0.1)

    def produce() -> None:
        try:
            for row in rows():
                deliver("row", row)
                if over.is_set():
                    return
            deliver("end", None)
        except Exception as error:
            deliver("error", error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            kind, value = _next(arrived, what)
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        over.set()


def _next(arrived: queue.Queue[tuple[str, Any]], what: str) -> tuple[str, Any]:
    with contextlib.suppress(queue.Empty):
        return arrived.get(timeout=_WARN_AFTER)
    warnings.warn(
        f"{what} has sent nothing for {_WARN_AFTER:.0f} s; waiting up to {_GIVE_UP_AFTER:.0f} s.",
        SinkscopeWarning,
        stacklevel=2,
    )
    try:
        return arrived.get(timeout=_GIVE_UP_AFTER - _WARN_AFTER)
    except queue.Empty:
        raise TextError(
            f"{what} has sent nothing for {_GIVE_UP_AFTER:.0f} s; check the network, or pass a "
            "text file instead."
        ) from None
