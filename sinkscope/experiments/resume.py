"""Long runs that survive an interruption: a result grows in a file and is taken up from there."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from sinkscope.errors import ReportError
from sinkscope.models.active import hooked
from sinkscope.models.provenance import digest, dtype_of, model_source, weights_of
from sinkscope.prompts.recipes import TextSource
from sinkscope.prompts.tokens import Texts
from sinkscope.report import netcdf as _netcdf
from sinkscope.report.labelled import Labelled
from sinkscope.report.settings import library_versions

R = TypeVar("R", bound=Labelled)

_EVERY = 5.0
"""Seconds between two writes."""
"""Numbers of each row of each weight that a model's weights are known by."""


def kept_in(place: str | Path | None, model: Any) -> Path | None:
    """Where figures are to be kept, if anywhere.

    Raises:
        ReportError: If hooks are in force. What they do cannot be written down, so that the place
            would hand these figures on as those of the model without them.
    """
    if place is not None and hooked(model):
        raise ReportError(
            f"{place} keeps figures of a model as it is, and hooks or interventions are in force "
            "on this one; measure under them without a file or folder."
        )
    return None if place is None else Path(place)


def asked_of(model: Any, texts: Texts, **asked: Any) -> dict[str, Any]:
    """What a result was made of: only a result that was asked for alike may be continued.

    Args:
        model: A bridge.
        texts: The prompts.
        asked: Everything else that decides the figures, as JSON knows it.
    """
    source = model_source(model)
    return {
        "model": source.name,
        "revision": source.revision,
        "dtype": dtype_of(model),
        "weights": weights_of(model),
        "texts": texts.source,
        "bos": texts.bos,
        "tokens": digest(texts),
        **asked,
        "sinkscope": library_versions()["sinkscope"],
    }


class Growing(Generic[R]):
    """A result whose tensors fill up, with nan where nothing was measured yet.

    Args:
        empty: The result before anything was measured; it has a field `asked`.
        file: Where it grows, a ``.nc`` file; None keeps it in memory.

    Attributes:
        result: What there is so far; its tensors are written to in place.

    Raises:
        ReportError: If the file holds something that was asked for otherwise.
    """

    def __init__(self, empty: R, file: Path | None) -> None:
        self.result: R = empty
        self._file = file
        self._news = False
        self._written = time.monotonic()
        if file is not None and file.exists():
            self.result = _netcdf.load(type(empty), file)
            check_same(_asked(self.result), _asked(empty), file)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write what there is when the block ends, by an exception or Ctrl-C too.

        Where nothing was measured, nothing is written: an empty file would stand in the way of
        another request.
        """
        try:
            yield
        finally:
            self._write()

    def grown(self) -> None:
        """Say that there is more; it is written down every few seconds."""
        self._news = True
        if time.monotonic() - self._written > _EVERY:
            self._write()

    def _write(self) -> None:
        if self._file is not None and self._news:
            _netcdf.save(self.result, self._file)
        self._news, self._written = False, time.monotonic()


def _asked(result: Any) -> dict[str, Any]:
    return result.asked


def check_same(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    """Refuse to continue what was asked for otherwise.

    Raises:
        ReportError: If anything that was asked differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ReportError(
                f"{file} was begun with another {name} ({found.get(name)!r}, now {value!r}); "
                "name another folder, or delete that file."
            )


# --- What a checkpoint's report is made of, told before the checkpoint is loaded.

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def checkpoint_configuration(
    model: str | Path | None,
    checkpoint: Any,
    source: TextSource | Texts,
    sinks: Any,
    options: dict[str, Any],
) -> dict[str, str]:
    """Everything that decides the figures: only a report that was asked for alike is taken up.

    Args:
        model: The Hub model that steps and revisions are of.
        checkpoint: As `dynamics` takes it. What a function will give is not known.
        source: The prompts.
        sinks: The sink positions.
        options: Of `load_model`.
    """
    tokenizer = options.get("tokenizer")
    return {
        "checkpoint": _checkpoint(model, checkpoint, options),
        "dtype": _dtype(checkpoint, options),
        "tokenizer": "" if tokenizer is None else str(getattr(tokenizer, "name_or_path", "given")),
        "texts": _texts(source),
        "sinks": sinks if isinstance(sinks, str) else _listed(sinks),
        "version of sinkscope": library_versions()["sinkscope"],
    }


def _checkpoint(model: str | Path | None, checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        return f"{type(checkpoint).__name__} with weights {weights_of(checkpoint)}"
    if isinstance(checkpoint, int):
        return f"step {checkpoint} of {model}"
    if callable(checkpoint):
        return "what a function gives"
    path = Path(checkpoint).expanduser()
    if path.exists():
        return _on_disk(path.resolve())
    if model is not None:
        return f"revision {checkpoint} of {model}"
    revision = options.get("revision")
    return str(checkpoint) if revision is None else f"revision {revision} of {checkpoint}"


def _on_disk(path: Path) -> str:
    """A path, and what changes when the weights there are written anew."""
    files = [path] if path.is_file() else [f for glob in _WEIGHTS for f in path.glob(glob)]
    found = [file.stat() for file in files]
    size = sum(each.st_size for each in found)
    written = datetime.fromtimestamp(max((each.st_mtime for each in found), default=0))
    return f"{path}, {size:,} bytes of {written:%Y-%m-%d %H:%M:%S.%f}"


def _dtype(checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        dtype: Any = next(checkpoint.parameters()).dtype
    else:
        dtype = options.get("dtype") or "float32"
    return str(dtype).removeprefix("torch.")


def _texts(source: TextSource | Texts) -> str:
    """Exact ids by their hash; a recipe by its settings and the hash of its text."""
    if isinstance(source, Texts):
        return f"{source.source}, tokens {digest(source.right_padded())}"
    settings = {
        field.name: getattr(source, field.name)
        for field in dataclasses.fields(source)
        if field.name not in ("name", "documents") and getattr(source, field.name) is not None
    }
    documents = getattr(source, "documents", None)
    if documents is not None:
        content = hashlib.sha256()
        for document in islice(documents(), source.prompts):
            content.update(document.encode() + b"\0")
        settings["text"] = content.hexdigest()[:16]
    return ", ".join([source.name, *(f"{name} {value}" for name, value in settings.items())])


def _listed(sinks: Any) -> str:
    return ",".join(map(str, sinks)) if isinstance(sinks, Iterable) else str(sinks)
