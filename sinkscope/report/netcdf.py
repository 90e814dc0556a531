"""Saving reports to netCDF files and loading them.

A field is a variable with dimensions, coordinates and units, so the file opens in xarray, R, Julia
or ``ncdump``; values are restored bit for bit. Fields that are not tensors are stored as JSON text,
as are token strings, which may contain characters that netCDF does not allow. The file is first
built in memory, because HDF5 crashes on a full disk.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch

from sinkscope import validation
from sinkscope.errors import ReportError
from sinkscope.output import write_file
from sinkscope.report.labelled import Labelled, Variable, dataset, extended

if typing.TYPE_CHECKING:
    import xarray as xr

FORMAT = 2
"""Format 1 stored FFN outputs per prompt and dim only; see `Labelled.upgraded`."""

T = TypeVar("T", bound=Labelled)


def save(labelled: Labelled, path: str | Path) -> Path:
    """Write a labelled dataclass to a ``.nc`` file atomically.

    Returns:
        The path written.

    Raises:
        ReportError: If the suffix is not .nc, or the path cannot be written.
    """
    path = validation.path("path", path, error=ReportError)
    if path.suffix != ".nc":
        raise ReportError(f"Reports are saved as netCDF, so {path.name!r} must end in .nc.")
    return write_file(path, to_bytes(labelled))


def to_bytes(labelled: Labelled) -> bytes:
    """The content of the file."""
    content = dataset(labelled)
    texts, content.attrs = _beside_values(labelled)
    content.attrs |= {"sinkscope_format": FORMAT, "sinkscope_type": type(labelled).__name__}
    for name, variable in labelled.variables().items():
        if variable.declared and name in content:  # user-defined: declared in the file only
            content[name].attrs["sinkscope_declared"] = json.dumps(dataclasses.asdict(variable))
    content = content.assign({name: ((), text) for name, text in texts.items()})
    whole = {name: {"_FillValue": None} for name in content.variables}
    return bytes(content.to_netcdf(engine="h5netcdf", encoding=whole))


def load(cls: type[T], path: str | Path) -> T:
    """Load a file written by `save`; tensors are on the CPU.

    Raises:
        ReportError: If the file is missing, damaged, of another kind, or from a newer sinkscope.
    """
    import xarray as xr

    path = validation.path("path", path, error=ReportError)
    if not os.path.isfile(path):
        if path.is_dir():
            within = ", ".join(sorted(one.name for one in path.glob("*.nc"))) or "no .nc file"
            raise ReportError(f"{str(path)!r} is a folder; pass a file in it ({within}).")
        raise ReportError(f"There is no report file {str(path)!r}.")
    try:
        content = path.read_bytes()
        _refuse_links(content, path)
        # What has no named dimensions is nothing of ours, and is not read.
        how: dict[str, Any] = dict(engine="h5netcdf", decode_cf=False, phony_dims="sort")
        with xr.open_dataset(io.BytesIO(content), **how) as file:
            _check_kind(cls, file.attrs, path)
            declared = [
                Variable(**(known | {"dims": tuple(known["dims"])}))
                for variable in file.variables.values()
                if (known := json.loads(variable.attrs.get("sinkscope_declared", "null")))
            ]
            kind = extended(cls, tuple(declared))
            loaded = _read(kind, file, "", int(file.attrs["sinkscope_format"]))
        _check_sizes(loaded)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise ReportError(
            f"{path} cannot be read as a sinkscope report: it is damaged or another kind of file "
            f"({' '.join(str(error).split())[:200]})."
        ) from error
    return loaded


def _beside_values(labelled: Labelled, prefix: str = "") -> tuple[dict[str, str], dict[str, Any]]:
    """Data other than the tensors' values: other fields as JSON, and dtypes as attributes."""
    dtypes = {n: str(labelled[n].dtype).removeprefix("torch.") for n in labelled.measured()}
    texts, attributes = {}, {f"{prefix}dtypes": json.dumps(dtypes)}
    for field in dataclasses.fields(labelled):  # type: ignore[arg-type]
        name, value = field.name, getattr(labelled, field.name)
        if value is None or name in labelled.variables():
            continue
        if isinstance(value, Labelled):
            of_part = _beside_values(value, f"{prefix}{name}_")
            texts, attributes = texts | of_part[0], attributes | of_part[1]
        else:
            plain = value.to_dict() if hasattr(value, "to_dict") else value
            texts[f"{prefix}{name}"] = json.dumps(plain)
    return texts, attributes


def _refuse_links(content: bytes, path: str | Path) -> None:
    """Refuse a file that would make HDF5 read other files.

    Raises:
        ReportError: If it contains links to other files, or stores values in them.
    """
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        for name in file:
            link = file.get(name, getlink=True)
            dataset = file[name] if isinstance(link, h5py.HardLink) else None
            if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
                raise ReportError(
                    f"{path} was not loaded because its {name!r} is a link to other files or a "
                    "group of them, which a report never contains; obtain the report from its "
                    "source again."
                )


def _check_sizes(loaded: Labelled) -> None:
    """Refuse tensors that disagree, with one another or with what the settings say.

    Raises:
        ReportError: If they do.
    """
    sizes, settings = loaded.sizes, getattr(loaded, "settings", None)
    for dim, name in (("layer", "n_layers"), ("head", "n_heads"), ("kv_head", "n_kv_heads")):
        said = getattr(settings, name, None)
        if said is not None and sizes.get(dim, said) != said:
            raise ReportError(
                f"This report has {sizes[dim]} along {dim}, but its settings say {said}; it is "
                "damaged."
            )
    text = getattr(loaded, "token_text", None)
    if text is not None and len(text) != sizes.get("prompt", len(text)):
        raise ReportError(
            f"This report has the text of {len(text)} prompts and the numbers of "
            f"{sizes['prompt']}; it is damaged."
        )


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
        raise ReportError(f"{path} contains a {kind}, not a {cls.__name__}.")


def _read(cls: type[T], file: xr.Dataset, prefix: str, version: int) -> T:
    dtypes = json.loads(file.attrs[f"{prefix}dtypes"])
    if not validation.fits(dtypes, dict[str, str]):
        raise ValueError(f"its dtypes are {validation.shown(dtypes)}")
    values: dict[str, Any] = {}
    for name, dtype in dtypes.items():
        kind, read = getattr(torch, dtype, None), file[prefix + name].values
        if not isinstance(kind, torch.dtype) or read.dtype.kind not in "biuf":
            raise ValueError(f"its {name} has values of the type {read.dtype}, kept as {dtype}")
        values[cls.OLD_NAMES.get(name, name)] = torch.from_numpy(read.copy()).to(kind)
    for name, part in cls.parts().items():
        if f"{prefix}{name}_dtypes" in file.attrs:
            values[name] = _read(part, file, f"{prefix}{name}_", version)
    hints = typing.get_type_hints(cls)
    for name in set(hints) - set(values) - set(cls.variables()) - set(cls.parts()):
        if prefix + name in file.variables:
            plain = json.loads(file[prefix + name].item())
            kind = hints[name]
            if not validation.fits(plain, kind):
                raise ValueError(f"its {name} is {validation.shown(plain)}")
            values[name] = kind.from_dict(plain) if hasattr(kind, "from_dict") else plain
    return cls(**(cls.upgraded(values) if version < FORMAT else values))
