"""Defects of TransformerLens 4.3 that are mended on every bridge that sinkscope measures.

1. The KV cache goes by two names, of which TransformerLens knows one, see `kv_cache`.
2. OLMo, OLMo-2, OLMo-3 and FlexOlmo rotate queries and keys in float32: their rotary embedding
   returns float32 cosines, and transformers casts what they rotate back to the model's dtype. The
   bridge's re-implementation does not cast back. In half precision its pattern is then float32,
   and its product with half-precision values raises "expected m1 and m2 to have the same dtype".
   Here the cast is made where the rotated tensors leave the rotation, at ``hook_rot_q`` and
   ``hook_rot_k``, as in transformers: exact, and hooks see the dtype that attention uses.
3. Multi-head latent attention shows ``hook_q``, ``hook_k`` and ``hook_v`` with the head before the
   position, and ``hook_z`` in pieces of another width than its heads have, or in one. Here all four
   are [prompt position head d_head], as on every other bridge.
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
    """The bridge itself, without the defects above; does nothing the second time."""
    for component in bridge.original_model.modules():
        if isinstance(component, PositionEmbeddingsAttentionBridge):
            for name in ("hook_rot_q", "hook_rot_k"):
                point = component._modules.get(name)  # none where nothing is rotated (Granite)
                if point is not None and "forward" not in point.__dict__:
                    point.__dict__["forward"] = partial(_in_model_dtype, point, component)
        elif isinstance(component, MLAAttentionBridge):
            _show_positions_first(component)
    return reads_both_names(bridge)


def _in_model_dtype(point: HookPoint, attn: AttentionBridge, x: Tensor) -> Tensor:
    """`HookPoint.forward`, after a cast to the dtype of the model where that is a narrower one."""
    weight = getattr(attn.o.original_component, "weight", None)
    dtype = getattr(weight, "dtype", x.dtype)
    return type(point).forward(point, x.to(dtype) if dtype in HALF else x)


def _show_positions_first(attn: MLAAttentionBridge) -> None:
    """Queries, keys, values and heads' outputs as [prompt position head d_head]."""
    if isinstance(attn.o.hook_in.hook_conversion, _Heads):
        return
    for point in (attn.hook_q, attn.hook_k, attn.hook_v):
        point.hook_conversion = HeadsLast()
        point.pos_dim = None
    attn.o.hook_in.hook_conversion = _Heads(attn.original_component.num_heads)


class _Heads(BaseTensorConversion):
    """From W_O's input [prompt position width] to [prompt position head d_head]."""

    splits_attention_heads = True  # where TransformerLens looks for the axis of positions

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def handle_conversion(self, input_value: Tensor, *_: Any) -> Tensor:
        return rearrange(input_value, "b t (h d) -> b t h d", h=self.heads)

    def revert(self, input_value: Tensor, *_: Any) -> Tensor:
        return rearrange(input_value, "b t h d -> b t (h d)")
