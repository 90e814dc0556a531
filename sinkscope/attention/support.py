"""Attention components that can be streamed exactly, and the kinds of their implementation."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    ALiBiJointQKVAttentionBridge,
    BloomAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.glm_moe_dsa_attention import (
    GlmMoeDsaAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import (
    JointQKVAttentionBridge as Joint,
)
from transformer_lens.model_bridge.generalized_components.joint_qkv_position_embeddings_attention import (  # noqa: E501
    JointQKVPositionEmbeddingsAttentionBridge as RotaryJoint,
)
from transformer_lens.model_bridge.generalized_components.mla_attention import MLAAttentionBridge
from transformer_lens.model_bridge.generalized_components.mpt_alibi_attention import (
    MPTALiBiAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
    PositionEmbeddingsAttentionBridge as Split,
)

from sinkscope.errors import UnsupportedError

Kind = Literal["delegated", "split", "fused", "latent"]

_FUSED = (
    Joint,
    RotaryJoint,
    BloomAttentionBridge,
    ALiBiJointQKVAttentionBridge,
    MPTALiBiAttentionBridge,
)
_OWN_ARITHMETIC = {
    "delegated": ("GPTNeoSelfAttention", "GPTJAttention", "XGLMAttention"),
    "fused": ("FalconAttention", "BloomAttention", "MptAttention"),
}
"""transformers' modules that call no attention function, but are implemented in `layer`."""


def attention_of(bridge: Any) -> dict[int, AttentionBridge]:
    """The attention components of the blocks with attention, by block index.

    Raises:
        UnsupportedError: If no block has any, or one of them cannot be streamed exactly.
    """
    blocks = bridge._modules.get("blocks")
    if blocks is None:
        raise _refusal(bridge, "it has no stack of blocks")
    components = {
        index: attn
        for index, block in enumerate(blocks)
        if (attn := block._modules.get("attn")) is not None
    }
    if not components:
        raise _refusal(bridge, "none of its blocks shows any")
    for index, attn in components.items():
        if (reason := _why_not(attn)) is not None:
            raise _refusal(bridge, f"block {index} has {reason}")
    return components


def takes_attention_functions(bridge: Any) -> bool:
    """Whether every block streams through an attention function registered in transformers."""
    try:
        components = attention_of(bridge)
    except UnsupportedError:
        return False
    cores = [core_module(attn) for attn in components.values()]
    return all(core is not None and _looks_up_attention(core) for core in cores)


def kind_of(attn: AttentionBridge) -> Kind | None:
    """The kind of attention implementation in the stock bridge, or None if it is unknown."""
    kind = type(attn)
    if kind.forward is AttentionBridge.forward:
        return "delegated"
    # Subclasses that only omit the rotation in some layers, like transformers' module.
    if kind.forward is Split.forward or getattr(kind, "rope_optional", False):
        return "split"
    if kind.forward is MLAAttentionBridge.forward:
        return "latent"
    for fused in _FUSED:
        stock = kind.forward is fused.forward
        if stock and kind._reconstruct_attention is fused._reconstruct_attention:
            return "fused"
    return None


def entering(attn: AttentionBridge) -> tuple[str, str, str]:
    """Names of the hook points of queries, keys and values of the dot product."""
    if isinstance(attn, MLAAttentionBridge):  # its hook_rot_q has only the rotated channels
        return "hook_q", "hook_k", "hook_v"
    return "hook_rot_q", "hook_rot_k", "hook_rot_v"


def core_module(attn: AttentionBridge) -> nn.Module | None:
    """The wrapped transformers attention module, if there is exactly one that can stream."""
    original = attn.original_component
    cores = [module for module in original.modules() if _looks_up_attention(module)]
    if len(cores) == 1:
        return cores[0]
    known = _OWN_ARITHMETIC.get(kind_of(attn) or "", ())
    return original if not cores and type(original).__name__ in known else None


def _looks_up_attention(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _why_not(attn: nn.Module) -> str | None:
    if not isinstance(attn, AttentionBridge):
        return f"{type(attn).__name__} in the place of attention"
    if isinstance(attn, GlmMoeDsaAttentionBridge):
        return "sparse attention, whose mask transformers builds inside the module"
    if kind_of(attn) is None:
        return f"an attention computation of its own ({type(attn).__name__})"
    if core_module(attn) is None:
        return "an attention module that takes no registered attention function"
    if attn.requires_relative_position_bias or attn.is_cross_attention:
        return "relative position biases or cross-attention"
    # Only the bridge's re-implementation fires it, between steps that are a single one in
    # transformers' module. A gate from the query projection (hook_q_gate) can be fired.
    if "hook_gate" in attn._hook_registry:
        return "a gate on the heads' outputs that transformers' module applies inside"
    if kind_of(attn) == "split" and _forks_inputs(attn):
        return "split inputs (use_split_qkv_input or use_attn_in; switch them off)"
    return None


def rescales_keys(attn: AttentionBridge) -> bool:
    """Whether ``hook_k`` is not the projection's output, but that times a constant (Falcon-H1)."""
    return kind_of(attn) == "split" and "hook_k" not in attn.hook_aliases


def _forks_inputs(attn: AttentionBridge) -> bool:
    config = attn.config
    return bool(
        getattr(config, "use_split_qkv_input", False) or getattr(config, "use_attn_in", False)
    )


def refuse_forked_inputs(attn: AttentionBridge) -> None:
    """Refuse flags that were set inside the streaming context.

    Raises:
        UnsupportedError: If inputs are forked per head.
    """
    if _forks_inputs(attn):
        raise UnsupportedError(
            "use_split_qkv_input or use_attn_in was set while the bridge streams, which does not "
            "fork attention inputs: switch it off, or use eager attention."
        )


def _refusal(bridge: Any, reason: str) -> UnsupportedError:
    name = getattr(bridge.cfg, "architecture", None) or type(bridge.original_model).__name__
    return UnsupportedError(
        f"{name} cannot stream attention exactly, because {reason}: use eager "
        'attention (attention="eager", or "auto" to have it chosen).'
    )
