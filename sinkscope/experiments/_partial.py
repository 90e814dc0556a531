"""Long runs that survive an interruption: a result grows in a file and is taken up from there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from sinkscope import _netcdf
from sinkscope._labelled import Labelled
from sinkscope._settings import library_versions
from sinkscope.errors import ReportError
from sinkscope.experiments._in_force import hooked
from sinkscope.models import model_source
from sinkscope.texts import Texts

R = TypeVar("R", bound=Labelled)

_EVERY = 5.0
"""Seconds between two writes."""
_COLUMNS = 4
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


def dtype_of(model: Any) -> str:
    """The weights' dtype, as `Settings.dtype` says it."""
    return str(next(model.original_model.parameters()).dtype).removeprefix("torch.")


def weights_of(model: Any) -> str:
    """A hash of a few numbers of every row of every weight."""
    content = hashlib.sha256()
    for weight in getattr(model, "original_model", model).parameters():
        content.update(repr(tuple(weight.shape)).encode())
        if not weight.is_meta:
            rows = weight.detach() if weight.ndim < 2 else weight.detach().flatten(1)[:, :_COLUMNS]
            content.update(digest_of(rows).encode())
    return content.hexdigest()[:16]


def digest(texts: Texts) -> str:
    """A hash of exact token ids and mask."""
    return digest_of(texts.tokens.long(), texts.mask.long())


def digest_of(*tensors: Tensor) -> str:
    """A hash of exact numbers and of their shapes."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(repr(tuple(tensor.shape)).encode())
        content.update(tensor.double().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def write_whole(file: Path, text: str) -> None:
    """Write a whole file or none: an interrupted run leaves no half of one."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


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
