"""Observers: each reads one signal of every layer and ends in fields of the report.

To add a metric: define it in `sinkscope.metrics`, give it a field in `SinkReport`, write one small
class here, and name it in `OBSERVERS`.
"""

from __future__ import annotations

from sinkscope.capture.observers import attention, massive, residual, values
from sinkscope.capture.observers.base import Observer, Scope

OBSERVERS: dict[str, tuple[type[Observer], ...]] = {
    "sink_attention": (attention.SinkAttention,),
    "values": (values.Values,),
    "head_outputs": (values.HeadOutputs,),
    "residual": (residual.ResidualNorms,),
    "massive": (massive.Massive,),
    "ffn": (residual.FfnOutput,),
    "received": (attention.Received,),
    "entropy": (attention.Entropy,),
    "logit_gap": (attention.LogitGap,),
    "sink_logit": (attention.SinkLogitGeometry,),
    "learned_sink": (attention.LearnedSink,),
    "value_share": (attention.ValueShare,),
    "through_output": (values.ValuesThroughOutput, values.HeadOutputsThroughOutput),
    "cosine": (residual.CosineToSink,),
}
"""Every metric that a scan can be asked for, and who measures it."""

CORE = ("sink_attention", "values", "head_outputs", "residual", "massive", "ffn")
"""The metrics that cost next to nothing beside the forward pass, at any length."""

__all__ = ["CORE", "OBSERVERS", "Observer", "Scope"]
