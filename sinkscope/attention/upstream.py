"""Workarounds for defects of TransformerLens 4.3, applied to every bridge that sinkscope measures.

1. The KV cache has two names, of which TransformerLens supports one, see `kv_cache`.
2. OLMo, OLMo-2, OLMo-3 and FlexOlmo rotate queries and keys in float32: their rotary embedding
   returns float32 cosines, and transformers casts the rotated tensors back to the model's dtype.
   The bridge's re-implementation does not. In half precision its pattern is then float32, and its
   product with half-precision values raises "expected m1 and m2 to have the same dtype". Here the
   cast is made after the rotation, at ``hook_rot_q`` and ``hook_rot_k``, as in transformers: it is
   exact, and hooks receive the dtype used in attention.
3. In multi-head latent attention ``hook_q``, ``hook_k`` and ``hook_v`` have the head before the
   position, and ``hook_z`` is split by a wrong width or not at all. Here all four are [prompt
   position head d_head], as on every other bridge.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.mla_attention import MLAAttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge,
)

from sinkscope.attention.hooks import HeadsLast
from sinkscope.attention.kv_cache import reads_both_names

HALF = (torch.bfloat16, torch.float16)


def mended(bridge: Any) -> Any:
    """Apply the workarounds to a bridge and return it; idempotent."""
    for component in bridge.original_model.modules():
        if isinstance(component, PositionEmbeddingsAttentionBridge):
            for name in ("hook_rot_q", "hook_rot_k"):
                point = component._modules.get(name)  # None without rotation (Granite)
                if point is not None and "forward" not in point.__dict__:
                    point.__dict__["forward"] = partial(_in_model_dtype, point, component)
        elif isinstance(component, MLAAttentionBridge):
            _show_positions_first(component)
    return reads_both_names(bridge)


def _in_model_dtype(point: HookPoint, attn: AttentionBridge, x: Tensor) -> Tensor:
    """`HookPoint.forward`, after a cast to the model's dtype if that is narrower."""
    weight = getattr(attn.o.original_component, "weight", None)
    dtype = getattr(weight, "dtype", x.dtype)
    return type(point).forward(point, x.to(dtype) if dtype in HALF else x)


def _show_positions_first(attn: MLAAttentionBridge) -> None:
    """Convert queries, keys, values and head outputs to [prompt position head d_head]."""
    if isinstance(attn.o.hook_in.hook_conversion, _Heads):
        return
    for point in (attn.hook_q, attn.hook_k, attn.hook_v):
        point.hook_conversion = HeadsLast()
        point.pos_dim = None
    attn.o.hook_in.hook_conversion = _Heads(attn.original_component.num_heads)


class _Heads(BaseTensorConversion):
    """From W_O's input [prompt position width] to [prompt position head d_head]."""

    splits_attention_heads = True  # read by TransformerLens to find the position axis

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def handle_conversion(self, input_value: Tensor, *_: Any) -> Tensor:
        return rearrange(input_value, "b t (h d) -> b t h d", h=self.heads)

    def revert(self, input_value: Tensor, *_: Any) -> Tensor:
        return rearrange(input_value, "b t h d -> b t (h d)")
