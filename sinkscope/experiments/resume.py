"""Resume long measurements: a result is saved in a file and continued if the request is the same.

1. `request_of` and `checkpoint_request` describe what a result depends on: the model by its name
   and its identity (all weights, settings, and the output on a probe), the exact tokens, and every
   option.
2. `Kept` locks a result's file, compares its request with the current one, and returns the saved
   result. The request is written beside it: ``prose.nc`` has ``prose.request.json``.
3. Results that fill up in place, with nan where nothing was measured yet, are written every few
   seconds (`Kept.grew`) and when the block ends, after an exception or Ctrl-C too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from sinkscope.errors import ReportError
from sinkscope.models.active import hooked
from sinkscope.models.provenance import digest, dtype_of, model_identity, model_source
from sinkscope.output import as_json, locked, write_file
from sinkscope.prompts.documents import beginning
from sinkscope.prompts.encoding import WHOLE
from sinkscope.prompts.recipes import STREAM, TOGETHER, Documents, TextSource, Windows
from sinkscope.prompts.tokens import Texts
from sinkscope.report import netcdf
from sinkscope.report.labelled import Labelled
from sinkscope.report.settings import library_versions

R = TypeVar("R", bound=Labelled)
Request = dict[str, Any]

_EVERY = 5.0
"""Seconds between two writes of a result that fills up."""


class Kept(Generic[R]):
    """A result in a file, or in memory only.

    Use it as a context manager. Inside, the file is locked against other processes.

    Args:
        kind: Class of the result.
        file: A ``.nc`` file; None saves nothing.
        request: What the result depends on, as JSON-compatible values.

    Attributes:
        found: The saved result; None if there is no file yet.
        also: Values saved with it, see `write`.

    Raises:
        ReportError: On entry: if the file was begun with another request, cannot be read, or
            another process is writing to it.
    """

    def __init__(self, kind: type[R], file: Path | None, request: Request) -> None:
        self.found: R | None = None
        self.also: dict[str, Any] = {}
        self._kind, self._file, self._request = kind, file, request
        self._unwritten: R | None = None
        self._written = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Kept[R]:
        if self._file is None:
            return self
        with ExitStack() as stack:
            stack.enter_context(locked(self._file))
            if check(self._file, self._request):
                self.found = netcdf.load(self._kind, self._file)
                self.also = _beside(self._file)["also"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            if self._unwritten is not None:
                self.write(self._unwritten)

    def write(self, result: R, **also: Any) -> None:
        """Write the result, and values beside it.

        Args:
            result: What was measured.
            also: Values that belong to it, JSON-compatible.
        """
        self._unwritten, self._written = None, time.monotonic()
        if self._file is not None:
            self.also |= also
            # The result is written last, so that its request always exists.
            content = as_json({"request": self._request, "also": self.also}, indent=1)
            write_file(_request_file(self._file), content)
            netcdf.save(result, self._file)

    def grew(self, result: R) -> None:
        """Record progress; the result is written every few seconds.

        Before anything is measured nothing is written, since an empty file would block another
        request.
        """
        self._unwritten = result
        if time.monotonic() - self._written > _EVERY:
            self.write(result)


def check(file: Path, request: Request) -> bool:
    """Return whether a file holds a result, and refuse one of another request.

    Args:
        file: The result's file.
        request: The current request.

    Raises:
        ReportError: If anything differs that the result depends on, or the record of it is missing
            or damaged.
    """
    if not file.exists():
        return False
    _compare(file, _request_file(file), request)
    return True


def claim(record: Path, results: Iterable[Path], request: Request) -> None:
    """Record the request of several results in a file beside them, and refuse another one.

    Args:
        record: The file, ``NAME.request.json``.
        results: Files that hold, or are going to hold, the results.
        request: The current request.

    Raises:
        ReportError: If a result is there already and was measured for another request, or no
            record of it is there.
    """
    if (existing := next((file for file in results if file.exists()), None)) is not None:
        _compare(existing, record, request)
    write_file(record, as_json({"request": request, "also": {}}, indent=1))


def _compare(file: Path, record: Path, request: Request) -> None:
    """Refuse a result that was measured for another request.

    Raises:
        ReportError: If anything differs that the result depends on, or its record is unusable.
    """
    recorded = _recorded(file, record)["request"]
    for name, value in json.loads(as_json(request)).items():
        before = recorded.get(name)
        if before != value and name == "identity":
            raise ReportError(
                f"{file} was measured on another model: its weights, settings, adapters or hooks "
                "differ; name another folder, or delete that file."
            )
        if before != value:
            raise ReportError(
                f"{file} was measured with another {name} ({_shown(before)}; now {_shown(value)}); "
                "name another folder, or delete that file."
            )


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _request_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}.request.json")


def _beside(file: Path) -> dict[str, Any]:
    """Return the request that a result was measured for, and the values saved with it."""
    return _recorded(file, _request_file(file))


def _recorded(file: Path, record: Path) -> dict[str, Any]:
    """Read the request of a result from its record, and the values saved with it.

    Raises:
        ReportError: If that record is missing or damaged.
    """
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):  # no JSON, or no text
        problem = "is damaged"
    else:
        if isinstance(content, dict) and all(
            isinstance(content.get(name), dict) for name in ("request", "also")
        ):
            return content
        problem = "is damaged"
    raise ReportError(
        f"{record} {problem}; it records what {file.name} was measured on, which therefore cannot "
        "be continued. Name another folder, or delete both files."
    )


def kept_in(place: str | Path | None, model: Any) -> Path | None:
    """Return the file or folder for results, if there is one.

    Args:
        place: The requested file or folder.
        model: A bridge.

    Raises:
        ReportError: If hooks are active. Their effect cannot be recorded, and may be absent at the
            positions of the probe, so that later runs without them would return these results.
    """
    if place is not None and hooked(model):
        raise ReportError(
            f"{place} is for results of an unmodified model, and hooks or interventions are in "
            f"force on this one; measure under them without a file or folder."
        )
    return None if place is None else Path(place)


def file_stem(name: str) -> str:
    """Return a name, such as that of a text source, as part of a file's name.

    Plain names stay as they are. A hash is added to all others, so that two names never share a
    file: "a-b.txt" becomes ``a_b.txt-62e1c9``.
    """
    if re.fullmatch(r"[a-z0-9_]{1,60}", name):
        return name
    plain = re.sub(r"[^\w.]+", "_", name)[-60:]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


# What results depend on.


def request_of(model: Any, texts: Texts, **options: Any) -> Request:
    """Return everything that a result of a model on exact tokens depends on.

    Args:
        model: A bridge.
        texts: The prompts.
        options: Everything else that determines the values, JSON-compatible.
    """
    source = model_source(model)
    return {
        "model": source.name,
        "revision": source.revision,
        "dtype": dtype_of(model),
        "identity": model_identity(model),
        "texts": texts.source,
        "bos": texts.bos,
        "tokens": digest(texts),
        **options,
        "sinkscope": library_versions()["sinkscope"],
    }


_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def checkpoint_request(
    model: str | Path | None,
    checkpoint: Any,
    source: TextSource | Texts,
    sinks: Any,
    options: dict[str, Any],
) -> Request:
    """Return what the report of a checkpoint depends on, as far as known before it is loaded.

    Args:
        model: The Hub model that steps and revisions are of.
        checkpoint: As `dynamics` takes it; the result of a function is not known.
        source: The prompts.
        sinks: The sink positions.
        options: Of `load_model`.
    """
    tokenizer = options.get("tokenizer")
    in_memory = isinstance(checkpoint, nn.Module)
    return {
        "checkpoint": _checkpoint(model, checkpoint, options),
        "identity": model_identity(checkpoint) if in_memory else None,
        "dtype": _dtype(checkpoint, options),
        "tokenizer": "" if tokenizer is None else str(getattr(tokenizer, "name_or_path", "given")),
        "texts": texts_identity(source),
        "sinks": sinks if isinstance(sinks, str) else _listed(sinks),
        "version of sinkscope": library_versions()["sinkscope"],
    }


def _checkpoint(model: str | Path | None, checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        return type(checkpoint).__name__
    if isinstance(checkpoint, int):
        return f"step {checkpoint} of {model}"
    if callable(checkpoint):
        return "the result of a function"
    path = Path(checkpoint).expanduser()
    if path.exists():
        return _on_disk(path.resolve())
    if model is not None:
        return f"revision {checkpoint} of {model}"
    revision = options.get("revision")
    return str(checkpoint) if revision is None else f"revision {revision} of {checkpoint}"


def _on_disk(path: Path) -> str:
    """Return a path with size and time, which change when the weights there are rewritten."""
    files = [path] if path.is_file() else [f for glob in _FILES for f in path.glob(glob)]
    states = [file.stat() for file in files]
    size = sum(each.st_size for each in states)
    written = datetime.fromtimestamp(max((each.st_mtime for each in states), default=0))
    return f"{path}, {size:,} bytes of {written:%Y-%m-%d %H:%M:%S.%f}"


def _dtype(checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        dtype: Any = next(checkpoint.parameters()).dtype
    else:
        dtype = options.get("dtype") or "float32"
    return str(dtype).removeprefix("torch.")


def texts_identity(source: TextSource | Texts) -> str:
    """Identify exact ids by a hash, and a recipe by its settings and a hash of its text."""
    if isinstance(source, Texts):
        return f"{source.source}, tokens {digest(source.right_padded())}"
    settings = {
        field.name: getattr(source, field.name)
        for field in dataclasses.fields(source)
        if field.name not in ("name", "documents") and getattr(source, field.name) is not None
    }
    if isinstance(source, Documents):
        settings["text"] = _content(source)
    return ", ".join([source.name, *(f"{name} {value}" for name, value in settings.items())])


_CHARACTERS = 64
"""Characters per token; no text has longer tokens on average."""


def _content(source: Documents) -> str:
    """Hash as much of the text as the prompts can be cut from."""
    content, read = hashlib.sha256(), 0
    a_prompt = WHOLE if source.length is None else _CHARACTERS * source.length
    windows = isinstance(source, Windows)
    enough = STREAM * a_prompt * (source.prompts or 1)
    for index, document in enumerate(source.documents()):
        if windows and read >= enough and index % TOGETHER == 0:
            break
        if not windows and index == source.prompts:
            break
        piece = beginning(document, max(enough - read, 0) if windows else a_prompt)
        read += len(piece)
        content.update(piece.encode(errors="surrogatepass") + b"\0")
    return content.hexdigest()[:16]


def _listed(sinks: Any) -> str:
    return ",".join(map(str, sinks)) if isinstance(sinks, Iterable) else str(sinks)
