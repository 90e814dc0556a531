"""What a bench runs: a bare model of transformers, and the bridge that stands beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sinkscope._device import chosen_device
from sinkscope._out_of_memory import ran_out_of_memory
from sinkscope._tokens import context_size
from sinkscope.errors import ModelError, SinkscopeError
from sinkscope.models import load_model

LLAMA = dict(vocab_size=128256, max_position_embeddings=2**18, num_key_value_heads=8)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(
        LLAMA,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        intermediate_size=8192,
    ),
    "llama-8b": dict(
        LLAMA,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
    ),
}
"""Shapes by name, as arguments of `LlamaConfig`."""

DTYPES = ("float32", "bfloat16", "float16")
"""What random weights may be."""

FIRST_TOKEN, MASSIVE = 0, 1e4
"""Id of every prompt's first token, and the activation that its embedding brings along."""


@dataclass
class Subject:
    """What is measured.

    Attributes:
        name: Name of the shape or model.
        bare: The model without TransformerLens.
        context: Positions that it can take, None where it says nothing.
        load: Gets the bridge, when the bare model has been measured.
    """

    name: str
    bare: PreTrainedModel
    context: int | None
    load: Callable[[PreTrainedModel], Any]


def subject(
    shape: Any, device: str | torch.device | None, dtype: str | torch.dtype = "bfloat16"
) -> Subject:
    """The models of a shape by name, or of whatever `load_model` takes.

    Raises:
        SinkscopeError: If the dtype does not exist.
        ModelError: If the device is not there, or the model cannot be loaded, does not fit, lies on
            several devices, or is none of transformers.
    """
    where, kind = chosen_device(device), chosen_dtype(dtype)
    if isinstance(shape, str) and shape in SHAPES:
        config = LlamaConfig(**SHAPES[shape], dtype=kind)
        bare = random_model(config, LlamaForCausalLM, where, shape)
        bare.model.embed_tokens.weight[FIRST_TOKEN, 0] = MASSIVE
        return Subject(shape, bare, config.max_position_embeddings, load_model)
    bridge = load_model(shape) if not isinstance(shape, str) else load_model(shape, device=where)
    original = bridge.original_model
    name = shape if isinstance(shape, str) else type(original).__name__
    if not isinstance(original, PreTrainedModel):
        raise ModelError(
            f"{name} is not a model of transformers, so there is no bare one to time beside it; "
            f"choose one that is, or a shape: {', '.join(SHAPES)}."
        )
    places = sorted({str(weight.device) for weight in original.parameters()})
    if len(places) > 1:
        raise ModelError(
            f"{name} lies on {', '.join(places)}; the bare model beside it would lie on one device "
            "alone, so load it without device_map."
        )
    weight = next(original.parameters())
    config = copy.deepcopy(original.config)
    config.dtype = weight.dtype
    bare = random_model(config, type(original), weight.device, name)
    return Subject(name, bare, context_size(bridge), lambda _: bridge)


def random_model(config: Any, kind: type[PreTrainedModel], device: torch.device, name: str) -> Any:
    """A model with random weights made where they will lie, with sdpa attention if it has that.

    Raises:
        ModelError: If it does not fit there.
    """
    try:
        with torch.device(device):
            try:
                model = kind._from_config(config, attn_implementation="sdpa", dtype=config.dtype)
            except ValueError:  # softcaps and learned sinks have no sdpa attention in transformers
                model = kind._from_config(config, attn_implementation="eager", dtype=config.dtype)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise ModelError(f"The weights of {name} do not fit in the memory of {device}.") from error
    return model.eval().requires_grad_(False)


def chosen_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of random weights.

    Raises:
        SinkscopeError: If weights cannot be that.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SinkscopeError(f"dtype is {name}; choose from {', '.join(DTYPES)}.")
    return getattr(torch, name)
