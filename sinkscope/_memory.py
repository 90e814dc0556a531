"""Bridging a transformers model that is already in memory, with or without a tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens import TransformerBridge
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
)
from transformers import PreTrainedConfig, PreTrainedModel

from sinkscope._seeded import seeded_weights
from sinkscope.errors import ModelError, UnsupportedError

_BRIDGE = "_sinkscope_bridge"


def bridge_in_memory(model: PreTrainedModel, tokenizer: Any, name: str) -> TransformerBridge:
    """Wrap a transformers model, which is changed in place, and needs no tokenizer.

    Raises:
        ModelError: If the model is in a bridge already.
        UnsupportedError: If TransformerLens has no adapter for its class.
    """
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is inside a TransformerBridge already; pass the bridge."
        )
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(model).__name__}, so sinkscope cannot "
            "measure it."
        )
    _own_config(model)
    # Other implementations show no attention patterns. Calling boot_transformers(hf_model=...)
    # would do the same, but it asks the hub for a tokenizer where none is given.
    model.set_attn_implementation("eager")
    return build_bridge_from_module(
        model.eval(),
        type(model).__name__,
        hf_config=copy.deepcopy(model.config),
        tokenizer=None if tokenizer is None else self_contained(tokenizer),
        model_name=name,
    )


def remember(model: PreTrainedModel, bridge: TransformerBridge) -> None:
    """Let a model that was given once be given again: whoever scans it never saw the bridge."""
    model.__dict__[_BRIDGE] = bridge  # past nn.Module, which would register it


def bridge_of(model: PreTrainedModel) -> TransformerBridge | None:
    """The bridge that a transformers model was wrapped in by `load_model`, or None."""
    return model.__dict__.get(_BRIDGE)


def is_headless(model: PreTrainedModel) -> bool:
    """Whether this is a bare body, like BertModel, which TransformerLens cannot bridge."""
    return model.base_model is model and type(model).__name__ not in SUPPORTED_ARCHITECTURES


def with_untrained_head(body: PreTrainedModel) -> PreTrainedModel:
    """Put a bare body under the output head of its family; the head's weights are drawn, seeded.

    The body is used, not copied. Nothing measured inside the blocks depends on the head.

    Raises:
        UnsupportedError: If TransformerLens has no model of this family.
    """
    config = copy.deepcopy(body.config)
    config.architectures = None
    try:
        headed = getattr(transformers, determine_architecture_from_hf_config(config))
    except (ValueError, AttributeError) as error:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(body).__name__}, so sinkscope cannot "
            "measure it."
        ) from error
    with seeded_weights():
        model = headed(config)
    model = model.to(device=body.device, dtype=body.dtype)
    setattr(model, model.base_model_prefix, body)
    model.tie_weights()
    return model


def self_contained(tokenizer: Any) -> Any:
    """A tokenizer that TransformerLens takes, whether or not it was read from a folder.

    TransformerLens reloads a tokenizer from its ``name_or_path`` to make it prepend BOS, which
    fails for one that was made in memory. Saying that BOS is seen to prevents the reload; whether
    the tokenizer really prepends one is found out by encoding.
    """
    if tokenizer.init_kwargs.get("name_or_path"):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer


def _own_config(model: nn.Module) -> None:
    """Give a model configs of its own: models share those they were built from.

    Otherwise switching this model's attention would switch every sibling's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, memo)


def place(model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move and cast a model in place where that was asked for."""
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
