"""The KV cache under each of its names.

transformers called the argument of a model's forward pass ``past_key_values`` up to 5.23 and calls
it ``cache`` from 5.24 on; a few attention modules call it ``layer_past``. TransformerLens 4.3 reads
the old name only. Where a component recomputes attention from its own projections, it would then
leave the cache empty, and each new token would attend to itself alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components import MLAAttentionBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.glm_moe_dsa_attention import (
    GlmMoeDsaAttentionBridge,
)

OLD, NEW = "past_key_values", "cache"
NAMES = (NEW, OLD, "layer_past")


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache that a module is called with, or None."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def cache_argument(model: nn.Module) -> str:
    """What a transformers model calls the cache that its forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    return NEW if NEW in parameters and OLD not in parameters else OLD


def reads_both_names(bridge: Any) -> Any:
    """Let a bridge find its cache whatever transformers calls it; the bridge itself.

    Does nothing where TransformerLens and transformers agree, and nothing the second time.
    """
    model = bridge.original_model
    if cache_argument(model) == OLD or _to_new_name in model._forward_pre_hooks.values():
        return bridge
    model.register_forward_pre_hook(_to_new_name, with_kwargs=True)
    for component in model.modules():
        if isinstance(component, MLAAttentionBridge | GlmMoeDsaAttentionBridge):
            component.register_forward_pre_hook(_to_old_name, with_kwargs=True)
        elif isinstance(component, AttentionBridge):
            component.__dict__["_update_kv_cache"] = MethodType(_update_kv_cache, component)
    return bridge


def _to_new_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What callers who know the old name pass to the model, the bridge among them."""
    if OLD not in kwargs or NEW in kwargs:
        return None
    return args, {(NEW if name == OLD else name): value for name, value in kwargs.items()}


def _to_old_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What transformers passes to a component that replaces its attention."""
    if NEW not in kwargs or OLD in kwargs:
        return None
    return args, {(OLD if name == NEW else name): value for name, value in kwargs.items()}


def _update_kv_cache(self: AttentionBridge, k: Any, v: Any, **kwargs: Any) -> Any:
    rest = {name: value for name, value in kwargs.items() if name not in NAMES}
    return type(self)._update_kv_cache(self, k, v, **rest, past_key_values=cache_in(kwargs))
