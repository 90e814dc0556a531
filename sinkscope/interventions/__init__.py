"""Interventions: context managers that change one thing about how a model runs.

They compose with every measurement, work on both attention paths and on every architecture that
they accept, and leave the model bit for bit as it was, even after an error::

    with SelfOnlyMask(model, position=255):
        after = scan(model, texts)

An edit that cannot be exact on an architecture is refused with an error. `ReplaceStart` and
`ReplaceEnd` differ in form: they map texts to texts, so that a report has the tokens that were run.

A module holds one kind; `base` holds their base classes: to add an intervention, start there.
"""

from __future__ import annotations

from sinkscope.interventions.activations import RemoveOutput, ScaleActivation, SetActivation
from sinkscope.interventions.experts import AblateExperts
from sinkscope.interventions.heads import AblateHeads
from sinkscope.interventions.positions import PositionEmbeddingEdit, PositionIdEdit
from sinkscope.interventions.quantise import Quantise
from sinkscope.interventions.self_only import SelfOnlyMask
from sinkscope.interventions.sink_logit import ShiftSinkLogit
from sinkscope.interventions.softmax import ReplaceSoftmax
from sinkscope.interventions.transplant import SinkTransplant
from sinkscope.interventions.values import ScaleValue, ZeroValue
from sinkscope.interventions.window import WindowedAttention
from sinkscope.prompts.replace import ReplaceEnd, ReplaceStart

__all__ = [
    "AblateExperts",
    "AblateHeads",
    "PositionEmbeddingEdit",
    "PositionIdEdit",
    "Quantise",
    "RemoveOutput",
    "ReplaceEnd",
    "ReplaceSoftmax",
    "ReplaceStart",
    "ScaleActivation",
    "ScaleValue",
    "SelfOnlyMask",
    "SetActivation",
    "ShiftSinkLogit",
    "SinkTransplant",
    "WindowedAttention",
    "ZeroValue",
]
