"""The attention component of toy-model bridges, with true scores and effective edits.

It is in a separate file, since it subclasses a TransformerLens class and training runs without
TransformerLens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import AttentionBridge


class BackcopyAttentionBridge(AttentionBridge):
    """Runs `sinkscope.bb.model.Attention` with its tap connected to the bridge's hook points.

    `q`, `k`, `v` and `o` inside it are bridge components already, so `hook_q`, `hook_k`, `hook_v`
    and `hook_z` fire already; this class connects the scores, the pattern and the gate.
    """

    supports_split_qkv_fork = False

    def __init__(self, *args: Any, gated: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        if gated:
            self.hook_gate = HookPoint()

    def forward(self, hidden_states: Tensor, visible: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what the layer adds to the residual stream."""
        hidden_states = self.hook_in(hidden_states)
        points = {"hook_attn_scores": self.hook_attn_scores, "hook_pattern": self.hook_pattern}
        if hasattr(self, "hook_gate"):
            points["hook_gate"] = self.hook_gate

        def tap(name: str, value: Tensor) -> Tensor:
            return points[name](value) if name in points else value

        return self.hook_out(self.original_component(hidden_states, visible, tap))
