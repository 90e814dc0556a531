"""Flat tables of a report: one row per head, one row per prompt, and two texts head by head.

Column names are plain identifiers, such as ``sink_attention`` or ``top_received_L5H3R0``; units and
meanings are in the frame's ``attrs``.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.report.labelled import Variable, to_numpy
from sinkscope.report.quantities import SinkQuantities
from sinkscope.statistics import bootstrap_difference, max_t
from sinkscope.validation import probability, shown

FEATURES = (
    "top_received",
    "top_received_position",
    "top_received_value_norm",
    "sink_attention",
    "value_drain",
    "residual_peak",
)
"""The default features of a prompt's sinks, in column order."""

_SHORT = {"layer": "L", "head": "H", "kv_head": "KV", "rank": "R"}
_OF_HEADS = (("prompt", "layer", "head"), ("prompt", "layer", "kv_head"))


# -- one row per head ------------------------------------------------------------------------------


def heads(report: SinkQuantities, level: float = 0.95) -> pd.DataFrame:
    """One row per head; see `SinkReport.heads`."""
    settings = report.settings
    layer, head = np.indices((settings.n_layers, settings.n_heads)).reshape(2, -1)
    kv_head = head // settings.heads_per_kv_head
    columns: dict[str, Any] = {"layer": layer, "head": head, "kv_head": kv_head}
    units: dict[str, str] = {}
    about: dict[str, str] = {}
    if report.sink_attention is not None:
        columns["sink_head"] = report.sink_heads().cpu().numpy()[layer, head]
        about["sink_head"] = f"sink_attention, mean over prompts, exceeds ε = {settings.epsilon:g}"
    for name, variable in report.variables().items():
        if getattr(report, name) is None or variable.dims not in _OF_HEADS:
            continue
        at = layer, (kv_head if variable.dims[-1] == "kv_head" else head)
        ends = zip(("", "_low", "_high"), report.interval(name, level), strict=True)
        for ending, values in ends:
            columns[f"{name}{ending}"] = to_numpy(values)[at]
            units[f"{name}{ending}"] = variable.unit or ""
        about[name] = variable.about
    frame = pd.DataFrame(columns)
    frame.attrs = {"units": units, "about": about, "level": level, **_provenance(report)}
    return frame


# -- one row per prompt ----------------------------------------------------------------------------


def features(report: SinkQuantities, *names: str) -> pd.DataFrame:
    """One row per prompt; see `SinkReport.features`."""
    missing: dict[str, str] = {}
    if not names:
        missing = {n: report._not_measured(n) for n in FEATURES if getattr(report, n) is None}
        names = tuple(n for n in FEATURES if n not in missing)
    if not names:
        raise ReportError(next(iter(missing.values())))
    blocks: list[np.ndarray] = []
    units: dict[str, str] = {}
    about: dict[str, str] = {}
    for name in dict.fromkeys(names):
        values, variable = report[name], report.variables()[name]
        _check_flat(name, variable)
        blocks.append(to_numpy(values).reshape(len(values), -1))
        columns = [f"{name}{place}" for place in _places(variable, values)]
        units |= dict.fromkeys(columns, variable.unit or "")
        about[name] = variable.about
    frame = pd.DataFrame(np.hstack(blocks), columns=list(units))
    frame.index.name = "prompt"
    frame.attrs = {
        "units": units, "about": about, "not_measured": missing, **_provenance(report)
    }  # fmt: skip
    return frame


def _check_flat(name: str, variable: Variable) -> None:
    if variable.dims[0] != "prompt" or "position" in variable.dims:
        raise ReportError(
            f"{name} has the dimensions {' '.join(variable.dims)}, but features of a prompt must "
            "be fields with a prompt and no position, such as sink_attention; use "
            f"to_frame({name!r}) for this one."
        )


def _places(variable: Variable, values: Tensor) -> list[str]:
    """Suffixes with the coordinates of each entry of a prompt, such as ``_L5H3``."""
    sizes = values.shape[1:]
    short = [_SHORT.get(dim, f"_{dim}") for dim in variable.dims[1:]]
    places = itertools.product(*(range(size) for size in sizes))
    named = ("".join(f"{s}{i}" for s, i in zip(short, at, strict=True)) for at in places)
    return [f"_{place.removeprefix('_')}" if place else "" for place in named]


# -- two texts, head by head -----------------------------------------------------------------------


def head_differences(
    report: SinkQuantities,
    other: SinkQuantities,
    name: str = "sink_attention",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """This text minus the other; see `SinkReport.head_differences`."""
    _check_one_model(report, other)
    level = probability("level", level, error=ReportError)
    one, two = report[name], other[name]
    dims = report.variables()[name].dims
    if dims not in _OF_HEADS:
        raise ReportError(
            f"Heads are compared by a field with the dimensions {' '.join(_OF_HEADS[0])}, but "
            f"{name} has {' '.join(dims)}."
        )
    one, two = one.cpu().double(), two.cpu().double()
    difference, low, high = bootstrap_difference(one, two, level, seed=seed)
    p = max_t(one, two, seed=seed)
    higher, lower = _pairs(one, two)
    layer, head = np.indices(tuple(difference.shape)).reshape(2, -1)
    values = {
        "this": one.nanmean(0), "other": two.nanmean(0), "difference": difference, "low": low,
        "high": high, "p": p, "higher": higher, "lower": lower,
    }  # fmt: skip
    columns = {"layer": layer, dims[-1]: head}
    frame = pd.DataFrame(columns | {key: value.numpy().ravel() for key, value in values.items()})
    unit = report.variables()[name].unit or ""
    significant = p < 1 - level
    frame.attrs = {
        "field": name,
        "units": dict.fromkeys(("this", "other", "difference", "low", "high"), unit)
        | dict.fromkeys(("p", "higher", "lower"), "share"),
        "level": level,
        "heads_higher": int((difference > 0).sum()),
        "heads_lower": int((difference < 0).sum()),
        "heads_equal": int((difference == 0).sum()),
        "heads_undefined": int(difference.isnan().sum()),
        "significantly_higher": int((significant & (difference > 0)).sum()),
        "significantly_lower": int((significant & (difference < 0)).sum()),
        "texts": [report.settings.source, other.settings.source],
        **_provenance(report),
    }
    return frame


def _pairs(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of pairs of prompts, one of each text, in which the first is higher and lower."""
    shares = []
    for sign in (1, -1):
        counts = torch.zeros(one.shape[1:], dtype=torch.float64)
        pairs = torch.zeros_like(counts)
        for row in one:
            apart = sign * (row - two)
            counts += (apart > 0).sum(0)
            pairs += (~apart.isnan()).sum(0)
        shares.append(counts / pairs)
    return shares[0], shares[1]


def _check_one_model(report: SinkQuantities, other: SinkQuantities) -> None:
    if not isinstance(other, SinkQuantities):
        raise ReportError(f"head_differences() takes a report of a scan, not {shown(other)}.")
    mine, theirs = report.settings, other.settings
    for name in ("architecture", "n_layers", "n_heads", "n_kv_heads", "weights", "interventions"):
        pair = getattr(mine, name), getattr(theirs, name)
        if pair[0] != pair[1] and (name != "weights" or all(pair)):
            raise ReportError(
                f"Heads can be compared between two texts in one model only, but the {name} of "
                f"these reports differ: {pair[0]!r} and {pair[1]!r}; scan both texts with the same "
                "model."
            )


def _provenance(report: SinkQuantities) -> dict[str, Any]:
    settings = report.settings
    return {"model": settings.model, "text": settings.source, "weights": settings.weights}
