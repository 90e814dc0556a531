"""Experiments: a paper's question, asked of any model.

Each module has one or a few functions that take a model and texts and return a result with
``summary()`` (words), ``frame()`` (a tidy table), ``figures()`` (Plotly), ``to_dict()`` and
``save()``. Modules are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
