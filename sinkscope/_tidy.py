"""Named tensors as tidy frames and as xarray Datasets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sinkscope.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from sinkscope._labelled import Labelled


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's figures; half precision becomes float32, which numpy and files know."""
    tensor = tensor.detach().cpu()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).numpy()


def coordinate(labelled: Labelled, dim: str) -> np.ndarray:
    """The values along a dimension: the field of that name, else 0, 1, 2 and so on."""
    variable = labelled.variables().get(dim)
    if variable is not None and variable.dims == (dim,) and getattr(labelled, dim) is not None:
        return to_numpy(labelled[dim])
    return np.arange(labelled.sizes[dim])


def frame(labelled: Labelled, *names: str) -> pd.DataFrame:
    """A tidy frame, one row an observation.

    Args:
        labelled: where the figures are.
        names: fields of equal dimensions, which become columns side by side; or the name of one
            part, such as "massive", for its entries.

    Returns:
        One column a dimension, then one a field, titled with its unit, such as
        "sink_attention [probability]".

    Raises:
        ReportError: a name that is unknown or was not measured, or dimensions that differ.
    """
    import pandas as pd

    if not names:
        raise ReportError("to_frame() needs the name of a field; see .measured() for the names.")
    if len(names) == 1 and names[0] in labelled.parts():
        return _entries(labelled, names[0])
    variables = [labelled._require(name) for name in names]
    dims = variables[0].dims
    for variable in variables[1:]:
        if variable.dims != dims:
            raise ReportError(
                f"{variable.name} has the dimensions {' '.join(variable.dims)} and "
                f"{variables[0].name} has {' '.join(dims)}; only fields of equal dimensions can "
                "share a frame."
            )
    grid = np.indices([labelled.sizes[dim] for dim in dims])
    columns = {
        dim: coordinate(labelled, dim)[index.ravel()] for dim, index in zip(dims, grid, strict=True)
    }
    for variable in variables:
        if dims != (variable.name,):  # a coordinate is its own only column
            columns[variable.label] = to_numpy(labelled[variable.name]).ravel()
    return pd.DataFrame(columns)


def _entries(labelled: Labelled, name: str) -> pd.DataFrame:
    part = getattr(labelled, name)
    if part is None:
        raise ReportError(labelled._not_measured(name))
    first = next(iter(part.variables().values()))
    return frame(part, *part.measured(*first.dims)).drop(columns=list(first.dims))


def dataset(labelled: Labelled) -> xr.Dataset:
    """Every measured field as a variable with its dimensions, coordinates, unit and meaning.

    A part's fields come with its name in front, such as ``massive_value``.
    """
    import xarray as xr

    fields = variables_of(labelled)
    dims = dict.fromkeys(dim for names, _, _ in fields.values() for dim in names)
    sizes = {
        dim: size
        for names, data, _ in fields.values()
        for dim, size in zip(names, data.shape, strict=True)
    }
    coords: dict[str, Any] = {dim: (dim, np.arange(sizes[dim])) for dim in dims}
    coords |= {dim: fields.pop(dim) for dim in dims if dim in fields}
    return xr.Dataset(fields, coords)


def variables_of(
    labelled: Labelled, prefix: str = ""
) -> dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]]:
    """Dimensions, figures and attributes of every measured field, parts included."""
    labelled.sizes  # noqa: B018 (refuses tensors that disagree)
    fields = {}
    for name in labelled.measured():
        variable = labelled.variables()[name]
        attributes = {"about": variable.about}
        if variable.unit is not None:
            attributes["units"] = variable.unit
        fields[prefix + name] = (variable.dims, to_numpy(labelled[name]), attributes)
    for name in labelled.parts():
        if (part := getattr(labelled, name)) is not None:
            fields |= variables_of(part, f"{prefix}{name}_")
    return fields


def same(one: Any, other: Any) -> bool:
    """Whether two labelled dataclasses hold the same figures, nan for nan and dtype for dtype."""
    if type(one) is not type(other):
        return False
    return all(
        _equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


def _equal(one: Any, other: Any) -> bool:
    from sinkscope._labelled import Labelled

    if isinstance(one, Labelled):
        return same(one, other)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    one, other = one.cpu(), other.cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
