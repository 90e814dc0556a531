"""Which figures a model cannot have on the stock path, and why."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sinkscope._anatomy import Anatomy
from sinkscope._hook_points import Findings
from sinkscope._source import model_source
from sinkscope.errors import UnsupportedError

METRIC_SIGNALS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sink_attention": ("pattern",),
        "received_attention": ("pattern",),
        "sink_rate": ("pattern",),
        "uniform_ratio": ("pattern",),
        "attention_entropy": ("pattern",),
        "learned_sink_mass": ("pattern",),
        "sink_logit_gap": ("scores",),
        "sink_logit_parts": ("query", "key"),
        "value_norm": ("value",),
        "value_drain": ("value",),
        "value_weighted_sink_share": ("pattern", "value"),
        "head_output_norm": ("z",),
        "honor": ("z",),
        "residual_norm": ("resid_post",),
        "residual_peak": ("resid_post",),
        "cosine_to_sink": ("resid_post",),
        "massive_activations": ("resid_post",),
        "nonmixture_dims": ("mlp_out",),
        "neurons": ("neurons",),
        "position_embedding_norm": (),
        "loss": (),
    }
)
"""The signals that each figure is made of on the stock path.

A figure is what a report or an experiment tells; a scan is asked for metrics, each of which
measures one figure or several (`models show` names the metric beside the figure).
"""

NO_SOFTMAX = (
    "attention is not a softmax of the scores here, so its rows are no distribution, and have no "
    "entropy"
)
GATED = (
    "a gate stands between the values and W_O, so W_O alone does not say what a value adds to the "
    "residual stream"
)
"""Why a figure is not defined on a model."""

STREAMED = frozenset({"pattern", "scores", "query", "key", "value"})
"""Signals that the streaming path gets out of the model's own attention function."""


def unavailable(model: Any, anatomy: Anatomy, found: Findings, causal: bool) -> dict[str, str]:
    """Why each figure that cannot be measured on the stock path cannot."""
    # The streaming path has q·k and no other term of the scores.
    streamed = STREAMED if anatomy.positions != "alibi" and _streams(model) else frozenset()
    if found.stock_differs is not None:
        hint = '; path="streaming" measures it' if streamed else ""
        return dict.fromkeys(METRIC_SIGNALS, found.stock_differs + hint)
    reasons: dict[str, str] = {}
    for figure, signals in METRIC_SIGNALS.items():
        for signal in signals:
            if signal in found.reasons:
                hint = '; path="streaming" measures it' if signal in streamed else ""
                reasons[figure] = found.reasons[signal] + hint
    if not found.softmax:
        reasons.setdefault("attention_entropy", NO_SOFTMAX)
    if not any(sink is not None for sink in anatomy.sinks):
        reasons["learned_sink_mass"] = "the model has no learned sink"
    if anatomy.positions != "learned":
        reasons["position_embedding_norm"] = f"positions are {anatomy.positions}, not learned"
    if not model_source(model).trained_head:
        reasons["loss"] = "the checkpoint has no output head, and an untrained one stands in for it"
    elif not causal:
        reasons["loss"] = "a bidirectional model predicts no next token"
    return reasons


def _streams(model: Any) -> bool:
    """Whether the streaming path takes this model."""
    from sinkscope.capture._support import attention_of

    try:
        attention_of(model)
    except UnsupportedError:
        return False
    return True
