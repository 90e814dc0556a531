"""Observers: each reads one signal of every layer and measures fields of the report.

`base.Observer` is the base class and documents how to write one; the other modules contain the
metrics of this package, one class each. A new metric is a definition in `sinkscope.metrics`, a
field in `report.fields` that names it, and a class in a module of this folder: all of them are
imported here, since a class statement registers its metric.
"""

import importlib
import pkgutil

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

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "SIGNALS",
    "Observer",
    "Scope",
    "core",
    "fields",
    "metrics",
    "on_request",
    "unavailable",
]
