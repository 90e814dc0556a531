"""Interventions: context managers that change one thing about how a model runs.

They compose with every measurement, work on both attention paths and on every architecture they
accept, and leave the model bit for bit as it was, after an error too::

    with SelfOnlyMask(model, position=255):
        after = scan(model, texts)

What one cannot do exactly on an architecture it refuses with a sentence. `ReplaceStart` and
`ReplaceEnd` are the exception in form: they turn texts into texts, so that a report names the
tokens that ran.
"""

from __future__ import annotations

from sinkscope.interventions.activations import RemoveOutput, ScaleActivation, SetActivation
from sinkscope.interventions.heads import AblateHeads, ScaleValue, ZeroValue
from sinkscope.interventions.masks import SelfOnlyMask, ShiftSinkLogit
from sinkscope.interventions.positions import PositionEmbeddingEdit, PositionIdEdit
from sinkscope.interventions.softmax import ReplaceSoftmax
from sinkscope.prompts.replace import ReplaceEnd, ReplaceStart

__all__ = [
    "AblateHeads",
    "PositionEmbeddingEdit",
    "PositionIdEdit",
    "RemoveOutput",
    "ReplaceEnd",
    "ReplaceSoftmax",
    "ReplaceStart",
    "ScaleActivation",
    "ScaleValue",
    "SelfOnlyMask",
    "SetActivation",
    "ShiftSinkLogit",
    "ZeroValue",
]
