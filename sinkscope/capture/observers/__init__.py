"""Observers: each reads one signal of every layer and measures fields of the report.

`base.Observer` is the base class and documents how to write one; the other modules contain the
metrics of this package, one class each. A new metric is a definition in `sinkscope.metrics`, a
field in `report.fields` that names it, and a class here, whose module is imported below.
"""

from sinkscope.capture.observers import attention, gates, massive, residual, values
from sinkscope.capture.observers.base import (
    SIGNALS,
    Observer,
    Scope,
    core,
    fields,
    metrics,
    on_request,
    unavailable,
)

__all__ = [
    "SIGNALS",
    "Observer",
    "Scope",
    "attention",
    "core",
    "fields",
    "gates",
    "massive",
    "metrics",
    "on_request",
    "residual",
    "unavailable",
    "values",
]
