"""Dataclasses of named tensors whose annotations are their schema.

A field annotated ``Float[Tensor, "prompt layer head"] | None`` is a variable with the dimensions
prompt, layer and head. The run-time type check in the tests, the xarray dimensions, the data-frame
columns and the layout in a file are all derived from the annotation; unit and meaning are in the
field's metadata. A 1-D field with the name of its own dimension is that dimension's coordinate.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import AbstractArray, Shaped
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


L = TypeVar("L", bound="Labelled")  # not Self: beartype checks it on functions only


@dataclass(frozen=True)
class Variable:
    """Description of a tensor field.

    Attributes:
        name: The field's name.
        dims: Names of its dimensions, in order.
        unit: Its unit; "1" for a pure number, None for things like token ids.
        about: Its meaning, in one clause.
        weight: Field with the counts by which this mean over prompts is weighted in a merge.
        metric: Name of the metric that measures it, if any.
        tabled: Whether tables of heads have a column for it.
        declared: Whether it was added to its class by `extended`.
    """

    name: str
    dims: tuple[str, ...]
    unit: str | None
    about: str
    weight: str | None = None
    metric: str | None = None
    tabled: bool = False
    declared: bool = False

    @property
    def label(self) -> str:
        """Column or axis title with the unit, for example "sink_attention [probability]"."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


def measured(
    dims: str | None = None,
    *,
    unit: str | None = None,
    about: str = "",
    weight: str | None = None,
    metric: str | None = None,
    tabled: bool | None = None,
) -> Any:
    """Declare a field of a report that is None until it has been measured.

    Args:
        dims: Names of its dimensions separated by spaces, such as "prompt layer head", for a field
            of a user-defined `Observer`. A field in the body of a dataclass has them in its
            annotation.
        unit: Its unit; "1" for a pure number, None for things like token ids.
        about: Its meaning, in one clause.
        weight: For a mean over prompts without a prompt dimension, the field with the number of
            prompts it is taken over.
        metric: Name of the metric for `scan`; filled in by an `Observer`.
        tabled: Whether tables of heads have a column for it; by default only user-defined fields.

    Returns:
        A dataclass field with this metadata, for use in a class body or in `Observer.fields`.
    """
    metadata = dict(
        dims=dims, about=about, unit=unit, weight=weight, metric=metric, tabled=tabled or False
    )
    if dims is not None and tabled is None:
        metadata["tabled"] = True
    return dataclasses.field(default=None, metadata=metadata)


def given(about: str, unit: str | None = None) -> Any:
    """Declare a field that is always present."""
    return dataclasses.field(metadata={"about": about, "unit": unit})


@functools.cache
def extended(cls: type[L], variables: tuple[Variable, ...]) -> type[L]:
    """Subclass a labelled dataclass with further fields, each None until it has been measured.

    Args:
        cls: A labelled dataclass.
        variables: The fields to add; if empty, the class itself is returned.

    Returns:
        A subclass of the same name; equal variables give the same subclass.
    """
    if not variables:
        return cls
    added: list[tuple[str, Any, Any]] = [
        (
            variable.name,
            Shaped[Tensor, " ".join(variable.dims)] | None,  # type: ignore[operator]
            measured(
                " ".join(variable.dims),
                unit=variable.unit,
                about=variable.about,
                weight=variable.weight,
                metric=variable.metric,
                tabled=variable.tabled,
            ),
        )
        for variable in variables
    ]
    return dataclasses.make_dataclass(
        cls.__name__,
        added,
        bases=(cls,),
        namespace={"__module__": cls.__module__, "__doc__": cls.__doc__, "_extends": cls},
        frozen=True,
        eq=False,
        repr=False,
        kw_only=True,
    )


def _rebuilt(cls: type[L], variables: tuple[Variable, ...], values: dict[str, Any]) -> L:
    """Restore an object pickled by `Labelled.__reduce__`."""
    return extended(cls, variables)(**values)


def _annotated(cls: type) -> dict[str, Any]:
    """The type of each field, without ``| None``."""
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
    """Base of the dataclasses of named tensors; see the module's docstring.

    Attributes:
        OLD_NAMES: Maps the names of tensors in files of the previous release to current names.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {}

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
                metadata[name].get("tabled", False),
                metadata[name].get("dims") is not None,
            )
            for name, kind in _annotated(cls).items()
            if _is(kind, AbstractArray)
        }

    @classmethod
    @functools.cache
    def parts(cls) -> dict[str, type[Labelled]]:
        """The fields that are labelled dataclasses themselves, by name."""
        return {name: kind for name, kind in _annotated(cls).items() if _is(kind, Labelled)}

    @classmethod
    @functools.cache
    def metrics(cls) -> dict[str, str]:
        """The metric of each field that belongs to one."""
        named = {field.name: field.metadata.get("metric") for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return {name: metric for name, metric in named.items() if metric is not None}

    def measured(self, *dims: str) -> tuple[str, ...]:
        """Names of the measured tensors; if dims are given, only those with exactly these dims."""
        return tuple(
            name
            for name, variable in self.variables().items()
            if getattr(self, name) is not None and dims in ((), variable.dims)
        )

    @property
    def nbytes(self) -> int:
        """What all its tensors take in memory [bytes]."""
        parts = [part.nbytes for name in self.parts() if (part := getattr(self, name)) is not None]
        return sum(self[name].nbytes for name in self.measured()) + sum(parts)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every dimension.

        Raises:
            ReportError: if two tensors disagree, or one has the wrong number of dimensions.
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

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Convert the values of an older file to the current fields."""
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        declared = tuple(v for v in self.variables().values() if v.declared)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return _rebuilt, (getattr(type(self), "_extends", type(self)), declared, values)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ReportError: if there is no such field, or it was not measured.
        """
        return getattr(self, self._require(name).name)

    def __contains__(self, name: object) -> bool:
        """Whether a field was measured."""
        return name in self.measured()

    def __iter__(self) -> Iterator[str]:
        """The names of the measured fields."""
        return iter(self.measured())

    def to(self: L, device: str | torch.device) -> L:
        """The same report with every tensor on `device`."""
        moved: dict[str, Any] = {name: self[name].to(device) for name in self.measured()}
        for name in self.parts():
            part = getattr(self, name)
            moved[name] = None if part is None else part.to(device)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def to_frame(self, *names: str) -> pd.DataFrame:
        """A tidy frame, one row per observation; see `sinkscope.report.labelled.frame`."""
        return frame(self, *names)

    def to_xarray(self) -> xr.Dataset:
        """All measured fields as an xarray Dataset; see `dataset`."""
        return dataset(self)

    def equals(self, other: Labelled) -> bool:
        """Whether all values are equal, bit for bit (nan equals nan) and dtype for dtype."""
        return same(self, other)

    def _require(self, name: str) -> Variable:
        name = validation.text("the name of a field", name, error=ReportError)
        variable = self.variables().get(name)
        if variable is None:
            raise ReportError(self._unknown(name))
        if getattr(self, name) is None:
            raise ReportError(self._not_measured(name))
        return variable

    if not TYPE_CHECKING:  # a type checker knows which attributes there are

        def __getattr__(self, name: str) -> Any:
            """Refuse a misspelt field with the right ones."""
            if name.startswith("_"):
                raise AttributeError(name)
            raise AttributeError(self._unknown(name), name=name, obj=self)

    def _unknown(self, name: str) -> str:
        import difflib

        close = difflib.get_close_matches(name, self.variables(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see .measured() for the names."
        return f"There is no {name!r} in a {type(self).__name__}; {hint}"

    def _not_measured(self, name: str) -> str:
        return f"{name} was not measured."


# -- as numpy arrays, tidy frames and xarray Datasets ----------------------------------------------


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Convert to numpy; half precision becomes float32."""
    tensor = tensor.detach().cpu()
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if half else tensor).numpy()


def coordinate(labelled: Labelled, dim: str) -> np.ndarray:
    """The values along a dimension: the field of that name, or else indices from 0."""
    variable = labelled.variables().get(dim)
    if variable is not None and variable.dims == (dim,) and getattr(labelled, dim) is not None:
        return to_numpy(labelled[dim])
    return np.arange(labelled.sizes[dim])


def frame(labelled: Labelled, *names: str) -> pd.DataFrame:
    """A tidy frame, one row per observation.

    Args:
        labelled: The labelled dataclass.
        names: Fields of equal dimensions, one column each; or the name of one part, such as
            "massive", for its entries.

    Returns:
        One column per dimension, then one per field, titled with its unit, such as
        "sink_attention [probability]".

    Raises:
        ReportError: If a name is unknown or was not measured, or dimensions differ.
    """
    if not names:
        raise ReportError("to_frame() needs the name of a field; see .measured() for the names.")
    if len(names) == 1 and isinstance(names[0], str) and names[0] in labelled.parts():
        part = getattr(labelled, names[0])
        if part is None:
            raise ReportError(labelled._not_measured(names[0]))
        (entry,) = next(iter(part.variables().values())).dims
        return frame(part, *part.measured(entry)).drop(columns=entry)
    variables = [labelled._require(name) for name in names]
    dims = list(variables[0].dims)
    for variable in variables[1:]:
        if list(variable.dims) != dims:
            raise ReportError(
                f"{variable.name} has the dimensions {' '.join(variable.dims)} and "
                f"{variables[0].name} has {' '.join(dims)}; only fields of equal dimensions can "
                "share a frame."
            )
    chosen = dataset(labelled, names)
    table = chosen.to_dataframe(dim_order=dims).reset_index()  # type: ignore[arg-type]
    columns = {name: labelled.variables()[name].label for name in names if [name] != dims}
    return table[[*dims, *columns]].rename(columns=columns)


def dataset(labelled: Labelled, names: Iterable[str] | None = None) -> xr.Dataset:
    """Measured fields as variables with their dimensions, coordinates, units and meaning.

    Args:
        labelled: The labelled dataclass.
        names: Fields; by default all that were measured, parts included. The fields of a part are
            prefixed with its name, such as ``massive_value``.
    """
    import xarray as xr

    sizes = labelled.sizes  # raises if tensors disagree
    fields = _xarray_variables(labelled, labelled.measured() if names is None else names)
    if names is None:
        for name in labelled.parts():
            if (part := getattr(labelled, name)) is not None:
                sizes = part.sizes | sizes
                entries = _xarray_variables(part, part.measured())
                fields |= {f"{name}_{field}": value for field, value in entries.items()}
    dims = dict.fromkeys(dim for field in fields.values() for dim in field.dims)
    given = _xarray_variables(labelled, [d for d in dims if d in labelled.variables()])
    coords = {dim: given.get(dim, xr.Variable((dim,), np.arange(sizes[dim]))) for dim in dims}
    return xr.Dataset({name: fields[name] for name in fields if name not in dims}, coords)


def _xarray_variables(labelled: Labelled, names: Iterable[str]) -> dict[str, xr.Variable]:
    import xarray as xr

    made = {}
    for name in names:
        variable = labelled.variables()[name]
        if getattr(labelled, name) is not None:
            units = {} if variable.unit is None else {"units": variable.unit}
            attributes = {"about": variable.about} | units
            made[name] = xr.Variable(variable.dims, to_numpy(labelled[name]), attributes)
    return made


def same(one: Any, other: Any) -> bool:
    """Whether two labelled dataclasses have equal values (nan equals nan) and dtypes."""
    return (
        type(one) is type(other)
        and _beside_values(one) == _beside_values(other)
        and dataset(one).equals(dataset(other))
    )


def _beside_values(labelled: Labelled) -> list[Any]:
    """Values that are not in a Dataset: dtypes of the tensors, and fields that are not tensors."""
    names = {field.name for field in dataclasses.fields(labelled)}  # type: ignore[arg-type]
    parts = labelled.parts()
    plain = sorted(names - set(labelled.variables()) - set(parts))
    values = [getattr(labelled, name) for name in parts]
    return [
        {name: labelled[name].dtype for name in labelled.measured()},
        {name: getattr(labelled, name) for name in plain},
        [part and _beside_values(part) for part in values],
    ]
