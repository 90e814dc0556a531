"""A report as plain values: what ``sinkscope scan --json`` prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sinkscope._tidy import to_numpy

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

# Raw material of nonmixture_dims, which stands for them: a number for every prompt, layer and dim.
_LEFT_OUT = ("ffn_sink", "ffn_mixed_max", "ffn_sink_median")


def plain_report(report: SinkReport) -> dict[str, Any]:
    """Every measured field as nested lists, by name.

    `sink_attention` keeps its prompts and so do fields about single tokens, such as `tokens`; other
    fields are means over prompts. `massive_activations` and `nonmixture_dims` are lists of records.
    A field that was not measured is left out; nan and inf, which JSON has not, are None.
    """
    plain: dict[str, Any] = {"settings": report.settings.to_dict()}
    if report.token_text is not None:
        plain["token_text"] = report.token_text
    for name in report.measured():
        if name in _LEFT_OUT:
            continue
        dims = report.variables()[name].dims
        whole = name == "sink_attention" or "position" in dims or "prompt" not in dims
        plain[name] = nested(report[name] if whole else report.mean(name))
    if report.massive is not None:
        plain["massive_activations"] = [_finite(r) for r in report.massive_activations()]
    if report.ffn_sink is not None:
        plain["nonmixture_dims"] = [_finite(record) for record in report.nonmixture_dims()]
    return plain


def nested(tensor: Tensor) -> list[Any]:
    """The tensor as nested lists of plain numbers: each the shortest that reads back the same."""
    figures = to_numpy(tensor)
    if figures.dtype.kind != "f":
        return figures.tolist()
    flat = [
        float(text) if math.isfinite(figure) else None
        for text, figure in zip(figures.ravel().astype(str), figures.ravel(), strict=True)
    ]
    boxed = np.empty(figures.shape, dtype=object)
    boxed[...] = np.array(flat, dtype=object).reshape(figures.shape)
    return boxed.tolist()


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
