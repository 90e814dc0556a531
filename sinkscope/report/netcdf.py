"""Named tensors in a netCDF file: one variable a field, with dimensions, coordinates and units.

The file opens in xarray, R, Julia or ``ncdump``, and reads back bit for bit. Fields that are not
tensors are JSON text; so are token strings, which may hold what a netCDF string may not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import typing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sinkscope.errors import ReportError
from sinkscope.report.labelled import Labelled, coordinate, variables_of

FORMAT = 1

T = TypeVar("T", bound=Labelled)


def save(labelled: Labelled, path: str | Path) -> Path:
    """Write a labelled dataclass to a ``.nc`` file: all of it or nothing.

    Returns:
        The path written.

    Raises:
        ReportError: another suffix, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".nc":
        raise ReportError(f"A report is saved as netCDF, so {path.name!r} should end in .nc.")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        unfinished.open("xb").close()  # Python says plainly why a path cannot be written
        _write(labelled, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            unfinished.unlink()
    return path


def load(cls: type[T], path: str | Path) -> T:
    """Read what `save` wrote; tensors are on the CPU.

    Raises:
        ReportError: a file that is missing, damaged, of another kind, or from a newer sinkscope.
    """
    import h5netcdf

    if not Path(path).is_file():
        raise ReportError(f"There is no report file {str(path)!r}.")
    try:
        with h5netcdf.File(path, "r") as file:
            _check_kind(cls, file.attrs, path)
            return _read(cls, file, "")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ReportError(
            f"{path} cannot be read as a sinkscope report: it is damaged or another kind of file "
            f"({error})."
        ) from error


def _write(labelled: Labelled, path: Path) -> None:
    import h5netcdf

    variables = variables_of(labelled)
    with h5netcdf.File(path, "w") as file:
        file.attrs["sinkscope_format"] = FORMAT
        file.attrs["sinkscope_type"] = type(labelled).__name__
        for dims, data, _ in variables.values():
            for dim, size in zip(dims, data.shape, strict=True):
                if dim not in file.dimensions:
                    file.dimensions[dim] = size
        for name, (dims, data, attributes) in variables.items():
            if data.dtype == np.bool_:  # netCDF has no truth values
                data = data.astype(np.int8)
            file.create_variable(name, dims, data.dtype, data=data).attrs.update(attributes)
        for dim in [d for d in labelled.sizes if d not in variables]:
            file.create_variable(dim, (dim,), np.int64, data=coordinate(labelled, dim))
        _write_rest(labelled, file, "")


def _write_rest(labelled: Labelled, file: Any, prefix: str) -> None:
    """What a netCDF variable does not say by itself: tensors' dtypes, and the other fields."""
    import h5py

    dtypes = {n: str(labelled[n].dtype).removeprefix("torch.") for n in labelled.measured()}
    file.attrs[f"{prefix}dtypes"] = json.dumps(dtypes)
    for field in dataclasses.fields(labelled):  # type: ignore[arg-type]
        name, value = field.name, getattr(labelled, field.name)
        if value is None or name in labelled.variables():
            continue
        if isinstance(value, Labelled):
            _write_rest(value, file, f"{prefix}{name}_")
        else:
            plain = value.to_dict() if hasattr(value, "to_dict") else value
            text = np.array(json.dumps(plain), dtype=h5py.string_dtype())
            file.create_variable(f"{prefix}{name}", (), text.dtype, data=text)


def _check_kind(cls: type[Labelled], attributes: Any, path: str | Path) -> None:
    version, kind = attributes.get("sinkscope_format"), attributes.get("sinkscope_type")
    if version is None or kind is None:
        raise ReportError(f"{path} is not a sinkscope report; it was written by something else.")
    if int(version) > FORMAT:
        raise ReportError(
            f"{path} was written by a newer sinkscope (file format {int(version)}, this one reads "
            f"up to {FORMAT}); upgrade sinkscope to read it."
        )
    if kind != cls.__name__:
        raise ReportError(f"{path} holds a {kind}, not a {cls.__name__}.")


def _read(cls: type[T], file: Any, prefix: str) -> T:
    dtypes = json.loads(file.attrs[f"{prefix}dtypes"])
    values: dict[str, Any] = {}
    for name, dtype in dtypes.items():
        data = np.asarray(file.variables[prefix + name][...])
        values[name] = torch.from_numpy(data).to(getattr(torch, dtype))
    for name, part in cls.parts().items():
        if f"{prefix}{name}_dtypes" in file.attrs:
            values[name] = _read(part, file, f"{prefix}{name}_")
    hints = typing.get_type_hints(cls)
    for name in set(hints) - set(values) - set(cls.variables()) - set(cls.parts()):
        if prefix + name in file.variables:
            plain = json.loads(np.asarray(file.variables[prefix + name][...]).item())
            kind = hints[name]
            values[name] = kind.from_dict(plain) if hasattr(kind, "from_dict") else plain
    return cls(**values)
