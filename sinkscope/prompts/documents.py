"""Where text comes from: what every Python installation carries, files, Hugging Face data sets.

Each function yields documents (strings) in an order that the seed fixes, so that the same call
gives the same text on every machine with the same Python.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from sinkscope.errors import TextError

# Pure-Python modules that Python 3.11 and later all have, long enough to be read as programs.
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

_BLOCK = 1 << 20  # characters of a text file that make one document

_NAME_IT = "in Python, texts(..., key=...) names another key; the command line takes 'text' alone"


def prose(seed: int) -> Iterator[str]:
    """Running English prose: the topics of Python's ``help()`` without their code."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(
            "This Python was installed without pydoc_data, which holds the prose; pass a path to "
            "a text file instead."
        ) from error
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    seen: set[str] = set()  # the manual's overview topics repeat whole paragraphs of the others
    for name in names:
        paragraphs = [text for text in _paragraphs(topics[name]) if text not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield "\n\n".join(paragraphs)


def code(seed: int) -> Iterator[str]:
    """Python source: modules of the standard library, whole."""
    names = list(_MODULES)
    random.Random(seed).shuffle(names)
    found = False
    for name in names:
        spec = importlib.util.find_spec(name)
        path = Path(spec.origin) if spec and spec.origin else None
        if path and path.suffix == ".py" and path.is_file():
            found = True
            yield path.read_text(encoding="utf-8")
    if not found:
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
    """Whether a paragraph reads as a sentence or more rather than as code, a table or a heading."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return (
        len(text.split()) >= 8
        and text[-1] in ".:!?)"
        and letters >= 0.85 * len(text)
        and not any(mark in text for mark in ("::=", ">>>", "****", "===="))
    )


def text_file(path: Path) -> Iterator[str]:
    """A text file in blocks of about a million characters that end at a line's end."""
    try:
        with path.open(encoding="utf-8") as handle:
            while block := handle.read(_BLOCK):
                yield block + handle.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def json_lines(path: Path, key: str) -> Iterator[str]:
    """The texts under `key` of a file of JSON objects, one a line."""
    try:
        with path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield _text_of(line, key, f"Line {number} of {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        keys = ", ".join(record) if isinstance(record, dict) else "no keys"
        raise TextError(f"{where} has no text under {key!r} (it has {keys}); {_NAME_IT}.")
    return record[key]


def data_set(address: str, key: str, seed: int) -> Iterator[str]:
    """A Hugging Face data set, streamed: "owner/name:split" or "owner/name:config:split"."""
    parts = address.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise TextError(
            f"A data set is written hf:owner/name:split or hf:owner/name:config:split, not "
            f"{'hf:' + address!r}."
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError("Data sets need the datasets package: pip install datasets.") from error
    name, *config, split = parts
    try:
        rows = load_dataset(name, *config, split=split, streaming=True)
        rows = iter(rows.shuffle(seed=seed, buffer_size=1000))
        first = next(rows, None)
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
