"""Dataclasses of named tensors whose annotations are their schema.

A field annotated ``Float[Tensor, "prompt layer head"] | None`` is a variable with the dimensions
prompt, layer and head. Its type checker in the tests, its xarray dimensions, its data-frame columns
and its layout in a file all come from that one annotation; unit and meaning sit in the field's
metadata. A 1-D field that bears the name of its own dimension is that dimension's coordinate.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import AbstractArray
from torch import Tensor

from sinkscope.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


L = TypeVar("L", bound="Labelled")  # not Self: beartype checks it on functions only


@dataclass(frozen=True)
class Variable:
    """What one tensor field is: its dimensions, unit and meaning."""

    name: str
    dims: tuple[str, ...]
    unit: str | None
    about: str
    weight: str | None  # name of the counts that weight this mean over prompts when merging
    metric: str | None = None  # name of the metric that measures it, if a metric does

    @property
    def label(self) -> str:
        """Column or axis title with the unit, for example "sink_attention [probability]"."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


def measured(
    about: str,
    unit: str | None = None,
    *,
    weight: str | None = None,
    metric: str | None = None,
) -> Any:
    """A field that is None until it has been measured.

    Args:
        about: what the figure means, in one clause.
        unit: its unit; "1" for a pure number, None for things like token ids.
        weight: for a mean over prompts that has no prompt dimension, the field that says over how
            many prompts it was taken.
        metric: name of the metric that measures it, as `scan` takes it.
    """
    metadata = {"about": about, "unit": unit, "weight": weight, "metric": metric}
    return dataclasses.field(default=None, metadata=metadata)


def given(about: str, unit: str | None = None) -> Any:
    """A field that is always there."""
    return dataclasses.field(metadata={"about": about, "unit": unit})


def _annotated(cls: type) -> dict[str, Any]:
    """Each field's type, with ``| None`` taken off."""
    hints = typing.get_type_hints(cls)
    types = {}
    for field in dataclasses.fields(cls):
        options = [t for t in typing.get_args(hints[field.name]) if t is not type(None)]
        optional = type(None) in typing.get_args(hints[field.name])
        types[field.name] = options[0] if optional and len(options) == 1 else hints[field.name]
    return types


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


class Labelled:
    """Base of the dataclasses of named tensors; see the module's docstring."""

    @classmethod
    @functools.cache
    def variables(cls) -> dict[str, Variable]:
        """The tensor fields of this class by name."""
        metadata = {field.name: field.metadata for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return {
            name: Variable(
                name,
                tuple(kind.dim_str.split()),
                metadata[name].get("unit"),
                metadata[name].get("about", ""),
                metadata[name].get("weight"),
                metadata[name].get("metric"),
            )
            for name, kind in _annotated(cls).items()
            if _is(kind, AbstractArray)
        }

    @classmethod
    @functools.cache
    def parts(cls) -> dict[str, type[Labelled]]:
        """The fields that are themselves labelled dataclasses, by name."""
        return {name: kind for name, kind in _annotated(cls).items() if _is(kind, Labelled)}

    def measured(self, *dims: str) -> tuple[str, ...]:
        """Names of the tensors that were measured; with dims, of those that have exactly these."""
        return tuple(
            name
            for name, variable in self.variables().items()
            if getattr(self, name) is not None and dims in ((), variable.dims)
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every dimension.

        Raises:
            ReportError: where two tensors disagree, or one has another number of dimensions.
        """
        sizes: dict[str, int] = {}
        owner: dict[str, str] = {}
        for name in self.measured():
            dims, shape = self.variables()[name].dims, tuple(getattr(self, name).shape)
            if len(dims) != len(shape):
                raise ReportError(
                    f"{name} should have the dimensions {' '.join(dims)}, but has shape {shape}."
                )
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ReportError(
                        f"{name} has {size} along {dim}, but {owner[dim]} has {sizes[dim]}."
                    )
                owner.setdefault(dim, name)
        return sizes

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ReportError: where there is no such field, or it was not measured.
        """
        return getattr(self, self._require(name).name)

    def to(self: L, device: str | torch.device) -> L:
        """The same report with every tensor on `device`."""
        moved: dict[str, Any] = {name: self[name].to(device) for name in self.measured()}
        for name in self.parts():
            part = getattr(self, name)
            moved[name] = None if part is None else part.to(device)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to_frame(self, *names: str) -> pd.DataFrame:
        """A tidy frame, one row an observation; see `sinkscope.report.labelled.frame`."""
        return frame(self, *names)

    def to_xarray(self) -> xr.Dataset:
        """Everything that was measured as an xarray Dataset; see `dataset`."""
        return dataset(self)

    def equals(self, other: Labelled) -> bool:
        """Whether both hold the same figures, bit for bit (nan equals nan) and dtype for dtype."""
        return same(self, other)

    def _require(self, name: str) -> Variable:
        variable = self.variables().get(name)
        if variable is None:
            raise ReportError(self._unknown(name))
        if getattr(self, name) is None:
            raise ReportError(self._not_measured(name))
        return variable

    def _unknown(self, name: str) -> str:
        import difflib

        close = difflib.get_close_matches(name, self.variables(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see .measured() for the names."
        return f"There is no {name!r} in a {type(self).__name__}; {hint}"

    def _not_measured(self, name: str) -> str:
        return f"{name} was not measured."


# --- Named tensors as tidy frames and as xarray Datasets.


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

    if isinstance(one, Labelled):
        return same(one, other)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    one, other = one.cpu(), other.cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
