"""sinkscope: measure, explain and control attention sinks.

Names are imported when they are first used, so that `import sinkscope` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope import plot as plot
    from sinkscope.capabilities import capabilities as capabilities
    from sinkscope.capture.streaming import streaming as streaming
    from sinkscope.compare import compare as compare
    from sinkscope.errors import SinkscopeError as SinkscopeError
    from sinkscope.interventions import AblateHeads as AblateHeads
    from sinkscope.interventions import PositionEmbeddingEdit as PositionEmbeddingEdit
    from sinkscope.interventions import PositionIdEdit as PositionIdEdit
    from sinkscope.interventions import RemoveOutput as RemoveOutput
    from sinkscope.interventions import ReplaceEnd as ReplaceEnd
    from sinkscope.interventions import ReplaceSoftmax as ReplaceSoftmax
    from sinkscope.interventions import ReplaceStart as ReplaceStart
    from sinkscope.interventions import ScaleActivation as ScaleActivation
    from sinkscope.interventions import ScaleValue as ScaleValue
    from sinkscope.interventions import SelfOnlyMask as SelfOnlyMask
    from sinkscope.interventions import SetActivation as SetActivation
    from sinkscope.interventions import ShiftSinkLogit as ShiftSinkLogit
    from sinkscope.interventions import ZeroValue as ZeroValue
    from sinkscope.models import load_model as load_model
    from sinkscope.plot.explorer import explore as explore
    from sinkscope.report import SinkReport as SinkReport
    from sinkscope.report import load_report as load_report
    from sinkscope.scan import scan as scan
    from sinkscope.texts import random_tokens as random_tokens
    from sinkscope.texts import read_token_ids as read_token_ids
    from sinkscope.texts import repeated_tokens as repeated_tokens
    from sinkscope.texts import texts as texts
    from sinkscope.texts import token_ids as token_ids

_WHERE = {
    "capabilities": "capabilities",
    "compare": "compare",
    "explore": "plot.explorer",
    "load_model": "models",
    "AblateHeads": "interventions",
    "PositionEmbeddingEdit": "interventions",
    "PositionIdEdit": "interventions",
    "RemoveOutput": "interventions",
    "ReplaceEnd": "interventions",
    "ReplaceSoftmax": "interventions",
    "ReplaceStart": "interventions",
    "ScaleActivation": "interventions",
    "ScaleValue": "interventions",
    "SelfOnlyMask": "interventions",
    "SetActivation": "interventions",
    "ShiftSinkLogit": "interventions",
    "ZeroValue": "interventions",
    "load_report": "report",
    "random_tokens": "texts",
    "read_token_ids": "texts",
    "repeated_tokens": "texts",
    "scan": "scan",
    "SinkReport": "report",
    "SinkscopeError": "errors",
    "streaming": "capture.streaming",
    "texts": "texts",
    "token_ids": "texts",
}
_MODULES = ("bb", "experiments", "interventions", "metrics", "plot")

__all__ = [*_WHERE, *_MODULES]


class _Package(ModuleType):
    """Keeps `sinkscope.scan` the function although the module `sinkscope/scan.py` exists too.

    Importing a submodule binds it to the package under its own name. For the names above that
    would hide the function as soon as anything imported the module; `from sinkscope.scan import …`
    does not need the binding.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WHERE and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"sinkscope.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"sinkscope.{name}")
    raise AttributeError(f"module 'sinkscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
