"""Merging of reports of different prompts, exactly as if the prompts had been scanned together.

The dimensions of a field determine how it is merged: fields with a prompt dimension are
concatenated; means over prompts are weighted by their numbers of prompts, position by position;
counts are added; fields independent of prompts must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sinkscope.errors import ReportError
from sinkscope.report.chance import DERIVED
from sinkscope.report.labelled import Labelled, Variable

# Dimensions along which the reports of shorter and longer prompts may differ in size.
_GROWING = ("position", "bucket")


def merged_fields(one: Labelled, other: Labelled) -> dict[str, Any]:
    """Merge all tensor fields except those derived from others.

    Raises:
        ReportError: if only one report has a field, or sizes differ.
    """
    _check_sizes(one, other)
    variables = dict(one.variables())
    for name, variable in other.variables().items():
        if variables.setdefault(name, variable) != variable:
            raise ReportError(
                f"These reports cannot be merged because their {name} was declared differently: "
                f"{variables[name].label} with {' '.join(variables[name].dims)}, and "
                f"{variable.label} with {' '.join(variable.dims)}."
            )
    weights = {variable.weight for variable in variables.values()} - {None}
    fields: dict[str, Any] = {}
    for name, variable in variables.items():
        if name in DERIVED:  # the caller derives them from the merged fields
            continue
        pair = getattr(one, name, None), getattr(other, name, None)
        if pair[0] is None and pair[1] is None:
            continue
        if pair[0] is None or pair[1] is None:
            raise ReportError(
                f"These reports cannot be merged because only one of them has {name}; scan both "
                "with the same metrics."
            )
        if "prompt" in variable.dims:
            fields[name] = torch.cat(_equally_long(variable, *pair))
        elif variable.weight is not None:
            weight = variables[variable.weight]
            counts = _equally_long(weight, *_counts(one, other, variable))
            counts = tuple(_beside(count, weight, variable) for count in counts)
            fields[name] = _weighted(_equally_long(variable, *pair), counts)
        elif name in weights:
            fields[name] = torch.stack(_equally_long(variable, *pair)).sum(0)
        else:
            fields[name] = _agreed(name, *pair)
    return fields


def _check_sizes(one: Labelled, other: Labelled) -> None:
    for dim, size in one.sizes.items():
        theirs = other.sizes.get(dim, size)
        if dim not in ("prompt", "entry", *_GROWING) and theirs != size:
            raise ReportError(
                f"These reports cannot be merged because one has {size} and the other {theirs} "
                f"along {dim}."
            )


def _counts(one: Labelled, other: Labelled, variable: Variable) -> tuple[Tensor, Tensor]:
    """Number of prompts in each report's mean."""
    assert variable.weight is not None
    counts = getattr(one, variable.weight), getattr(other, variable.weight)
    if counts[0] is None or counts[1] is None:
        raise ReportError(
            f"These reports cannot be merged because {variable.weight}, which weights "
            f"{variable.name}, is missing."
        )
    return counts


def _equally_long(variable: Variable, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors on one device, the shorter one padded with the value for "undefined"."""
    other = other.to(one.device)
    if not variable.dims or variable.dims[-1] not in _GROWING:
        return one, other
    size = max(one.shape[-1], other.shape[-1])
    fill = torch.nan if one.is_floating_point() else 0
    return (
        pad(one, (0, size - one.shape[-1]), value=fill),
        pad(other, (0, size - other.shape[-1]), value=fill),
    )


def _beside(count: Tensor, weight: Variable, mean: Variable) -> Tensor:
    """Reshape counts along one dimension of a mean so that they broadcast against it."""
    after = len(mean.dims) - 1 - mean.dims.index(weight.dims[0])
    return count.reshape(count.shape + (1,) * after)


def _weighted(means: tuple[Tensor, Tensor], counts: tuple[Tensor, ...]) -> Tensor:
    one, other = (count.to(means[0].device) for count in counts)
    first = torch.where(one > 0, means[0].double() * one, 0)
    second = torch.where(other > 0, means[1].double() * other, 0)
    return ((first + second) / (one + other)).to(means[0].dtype)


def _agreed(name: str, one: Tensor, other: Tensor) -> Tensor:
    """The common value: equal tensors, or the longer coordinate if the other is a prefix of it."""
    shared = min(one.shape[-1], other.shape[-1])
    if not torch.equal(one[..., :shared], other[..., :shared].to(one.device)):
        raise ReportError(f"These reports cannot be merged because their {name} differs.")
    return one if one.shape[-1] >= other.shape[-1] else other.to(one.device)
