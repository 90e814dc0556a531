"""Compatibility of the names of the KV cache.

The cache argument of a forward pass in transformers is ``past_key_values`` up to 5.23 and ``cache``
from 5.24 on; in a few attention modules it is ``layer_past``. TransformerLens 4.3 reads only the
old name. Components that recompute attention from their own projections would then leave the cache
empty, and each new token would attend only to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from transformer_lens.model_bridge import generalized_components as components

OLD, NEW = "past_key_values", "cache"
NAMES = (NEW, OLD, "layer_past")

_READ_BY = {
    components.MLAAttentionBridge: OLD,
    components.GlmMoeDsaAttentionBridge: OLD,
    components.GatedDeltaNetBridge: "cache_params",
    components.SSMMixerBridge: "cache_params",
    components.SSM2MixerBridge: "cache_params",
}
"""Components that read the cache themselves, with the name they use."""


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache that a module is called with, or None."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def cache_argument(model: nn.Module) -> str:
    """The name of the cache argument of a transformers model."""
    parameters = inspect.signature(model.forward).parameters
    return NEW if NEW in parameters and OLD not in parameters else OLD


def reads_both_names(bridge: Any) -> Any:
    """Make a bridge accept its cache under both names, and return the bridge.

    Does nothing if TransformerLens and transformers use the same name; idempotent.
    """
    model = bridge.original_model
    if cache_argument(model) == OLD or Renaming(OLD, NEW) in model._forward_pre_hooks.values():
        return bridge
    _rename(model, OLD, NEW)
    for component in model.modules():
        name = next((_READ_BY[kind] for kind in type(component).mro() if kind in _READ_BY), None)
        if name is not None:
            _rename(component, NEW, name)
        elif isinstance(component, components.AttentionBridge):
            component.__dict__["_update_kv_cache"] = MethodType(_update_kv_cache, component)
    return bridge


def _rename(module: nn.Module, given: str, read: str) -> None:
    """Rename an argument in the calls of a module."""
    module.register_forward_pre_hook(Renaming(given, read), with_kwargs=True)


@dataclass(frozen=True)
class Renaming:
    """A forward pre-hook that renames an argument."""

    given: str
    read: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The new arguments, or None if there is nothing to rename."""
        if self.given not in kwargs or self.read in kwargs:
            return None
        return args, {(self.read if name == self.given else name): kwargs[name] for name in kwargs}


def _update_kv_cache(self: components.AttentionBridge, k: Any, v: Any, **kwargs: Any) -> Any:
    rest = {name: value for name, value in kwargs.items() if name not in NAMES}
    return type(self)._update_kv_cache(self, k, v, **rest, past_key_values=cache_in(kwargs))
