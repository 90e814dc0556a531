"""A field of many reports as one lazily read array with a `cell` dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from sinkscope.report.fields import SinkFields

Reader = Callable[[str], np.ndarray]


def variable(
    name: str, fields: Sequence[dict[str, Any] | None], readers: Sequence[Reader]
) -> xr.Variable:
    """Return a field of several cells as a lazy variable.

    Args:
        name: The field.
        fields: Its "dims", "shape" and "kind" in each cell; None where it was not measured.
        readers: For each cell, a function that reads a field.
    """
    known = [field for field in fields if field is not None]
    dims = tuple(known[0]["dims"])
    shape = tuple(np.max([field["shape"] for field in known], axis=0).tolist()) if dims else ()
    kind = np.dtype("float32" if any(one["kind"] == "float" for one in known) else "int64")
    array = _Stacked(name, fields, readers, shape, kind)
    declared = SinkFields.variables().get(name)
    attributes = {} if declared is None else {"about": declared.about}
    if declared is not None and declared.unit is not None:
        attributes["units"] = declared.unit
    return xr.Variable(("cell", *dims), indexing.LazilyIndexedArray(array), attributes)


class _Stacked(BackendArray):
    """Reads the cells of an index, and pads smaller ones."""

    def __init__(
        self,
        name: str,
        fields: Sequence[dict[str, Any] | None],
        readers: Sequence[Reader],
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self._name, self._fields, self._readers = name, fields, readers
        self.shape, self.dtype = (len(readers), *shape), dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        """Values at integers and slices."""
        cells, *rest = key
        if isinstance(cells, int | np.integer):
            return self._cell(int(cells))[tuple(rest)]
        chosen = range(*cells.indices(self.shape[0]))
        pieces = [self._cell(cell)[tuple(rest)] for cell in chosen]
        if pieces:
            return np.stack(pieces)
        return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *rest)]

    def _cell(self, cell: int) -> np.ndarray:
        fill = np.nan if self.dtype.kind == "f" else -1
        whole = np.full(self.shape[1:], fill, self.dtype)
        if self._fields[cell] is not None:
            values = self._readers[cell](self._name)
            whole[tuple(slice(size) for size in values.shape)] = values
        return whole
