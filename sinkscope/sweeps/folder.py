"""Storage of cells: a folder, or an object store through fsspec.

NAME.request.json   what the cell was measured for, its grid columns and its sizes
NAME.nc             a scan's report; of an experiment NAME.json, NAME.csv and NAME.html
NAME.failed.json    why a cell could not be measured
plan-HASH.json      a sweep's cells, so that missing ones are known

A cell exists if its request and its result do; each file is written atomically, the result last. In
a folder a lock on each cell keeps two sweeps from measuring it at once. Object stores have no
locks: two sweeps may then measure a cell twice, and the later upload, which is equal, replaces the
other.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkscope.errors import ReportError
from sinkscope.experiments.resume import Kept, Request
from sinkscope.output import as_json, locked, write_file
from sinkscope.report.report import SinkReport
from sinkscope.sweeps.grid import SCAN
from sinkscope.validation import fits, shown

REQUEST, FAILED, PLAN = ".request.json", ".failed.json", "plan-"


class Busy(Exception):
    """Another process is measuring this cell."""


class Folder:
    """Reads and writes the files of cells.

    Args:
        place: A path, or a URL that fsspec supports, such as "s3://bucket/sweep".

    Raises:
        ReportError: If it cannot be used.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._store: Any = None
        if "://" in self.place:
            self._store, self._root = _opened(self.place)
            self.path = Path(tempfile.mkdtemp(prefix="sinkscope-"))  # copies of its files
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
            return
        self.path = Path(self.place).expanduser().resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReportError(f"{place} cannot be used for a sweep: {error.strerror}.") from error

    def names(self) -> set[str]:
        """Return the names of all files."""
        if self._store is None:
            return {entry.name for entry in self.path.iterdir()}
        with _one_sentence(self.place):
            self._store.invalidate_cache()
            if not self._store.exists(self._root):
                return set()
            return {Path(entry).name for entry in self._store.ls(self._root, detail=False)}

    def has(self, name: str, experiment: str, among: set[str] | None = None) -> bool:
        """Return whether a cell was measured.

        Args:
            name: The cell's.
            experiment: Its experiment.
            among: The names of all files, if known.
        """
        files = (name + REQUEST, name + _result(experiment))
        if among is not None:
            return among.issuperset(files)
        return all(map(self._exists, files))

    def fetched(self, file: str) -> Path:
        """Return the path of a file, downloaded if it is in an object store."""
        path = self.path / file
        if self._store is not None and not path.exists():
            with _one_sentence(self.place):
                content = self._store.cat_file(f"{self._root}/{file}")
            write_file(path, content)
        return path

    def json(self, file: str) -> dict[str, Any]:
        """Read a JSON file.

        Raises:
            ReportError: If it is damaged.
        """
        path = self.fetched(file)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ReportError(f"{self.place}/{file} cannot be read: {error}.") from error
        if not isinstance(content, dict):
            raise ReportError(f"{self.place}/{file} is no record of a sweep; delete it.")
        return content

    def under(self, file: str, key: str, kind: Any) -> Any:
        """What a file of JSON holds under a key.

        Args:
            file: Its name.
            key: The key.
            kind: The annotation that the value has to fit.

        Raises:
            ReportError: If it is damaged.
        """
        value = self.json(file).get(key)
        if not fits(value, kind):
            raise ReportError(
                f"{self.place}/{file} is damaged: its {key} is {shown(value)}; delete it."
            )
        return value

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Lock this cell against measurement by other processes.

        Raises:
            Busy: If one does.
        """
        with locked(self.path / f"{name}.nc", Busy()):
            yield

    def write_report(
        self, name: str, request: Request, report: SinkReport, columns: dict[str, Any]
    ) -> None:
        """Save a scan's report, with its columns and sizes beside it."""
        file = self.path / f"{name}.nc"
        if not (self.path / (name + REQUEST)).exists():
            file.unlink(missing_ok=True)  # the request of such a report is unknown
        with Kept(SinkReport, file, request) as kept:
            if kept.found is None:
                kept.write(report, columns=columns, fields=fields_of(report))
        self._publish(name + REQUEST, f"{name}.nc")
        self._remove(name + FAILED)

    def write_result(
        self, name: str, request: Request, result: Any, columns: dict[str, Any]
    ) -> None:
        """Save an experiment's result."""
        files = [path.name for path in result.save(self.path / name)]
        record = {"request": request, "also": {"columns": columns}}
        write_file(self.path / (name + REQUEST), as_json(record, indent=1))
        self._publish(*files, name + REQUEST)
        self._remove(name + FAILED)

    def write_failure(
        self, name: str, columns: dict[str, Any], reason: str, trace: str = ""
    ) -> None:
        """Record why a cell could not be measured."""
        record = {"columns": columns, "reason": reason, "trace": trace}
        write_file(self.path / (name + FAILED), as_json(record, indent=1))
        self._publish(name + FAILED)

    def write_plan(self, digest: str, cells: list[dict[str, Any]]) -> None:
        """Record the cells of a sweep."""
        file = f"{PLAN}{digest}.json"
        write_file(self.path / file, as_json({"cells": cells}, indent=1))
        self._publish(file)

    def _exists(self, file: str) -> bool:
        if self._store is None:
            return (self.path / file).exists()
        with _one_sentence(self.place):
            self._store.invalidate_cache()
            return self._store.exists(f"{self._root}/{file}")

    def _publish(self, *files: str) -> None:
        """Upload files that were written, in this order."""
        if self._store is not None:
            with _one_sentence(self.place):
                self._store.makedirs(self._root, exist_ok=True)
                for file in files:
                    self._store.pipe_file(f"{self._root}/{file}", (self.path / file).read_bytes())

    def _remove(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)
        if self._store is not None and self._exists(file):
            with _one_sentence(self.place):
                self._store.rm_file(f"{self._root}/{file}")


def fields_of(report: SinkReport) -> dict[str, Any]:
    """Return shape, dimensions and kind of every measured field."""
    return {
        name: {
            "dims": report.variables()[name].dims,
            "shape": list(report[name].shape),
            "kind": "float" if report[name].is_floating_point() else "int",
        }
        for name in report.measured()
    }


def _result(experiment: str) -> str:
    """Return the suffix of the file with a cell's result."""
    return ".nc" if experiment == SCAN else ".json"


def _opened(place: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ReportError(
            f"{place} cannot be opened: {error}; install what fsspec needs for it, or name a "
            "folder."
        ) from error
    return store, str(root).rstrip("/")


@contextlib.contextmanager
def _one_sentence(place: str) -> Iterator[None]:
    """Turn errors of an object store into one sentence."""
    try:
        yield
    except Exception as error:  # each store has its own exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReportError(f"{place} cannot be read or written: {reason}.") from error
