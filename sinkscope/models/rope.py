"""Rotary embeddings whose frequencies depend on the length of the batch.

Two RoPE types of transformers choose the frequencies of a batch by its longest prompt: "longrope"
(Phi-3, 3.5 and 4 with long contexts) has one set up to the pretraining length and another beyond
it; "dynamic" has a set for each length beyond it, and keeps that of the longest batch so far. The
results for a prompt would then depend on the other prompts in its batch, on the batch size and on
earlier batches. Therefore prompts with different sets are run in separate batches, and the state is
reset before each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def length_class(model: nn.Module) -> Callable[[int], int]:
    """A function that classifies prompts by the frequencies with which a model runs them.

    Args:
        model: A transformers model or the one inside a bridge.

    Returns:
        Maps a prompt's length to a class; prompts of one class may share a forward pass.
    """
    switches: list[int] = []
    grows_from: list[int] = []
    for rotary, kind in _rotaries(model):
        if "dynamic" in kind:
            grows_from.append(rotary.original_max_seq_len)
        elif kind == "longrope":
            switches.append(_pretraining_length(rotary))

    def classify(length: int) -> int:
        if grows_from and length > min(grows_from):
            return length
        return -sum(length > switch for switch in switches)

    return classify


def forget_earlier_lengths(model: nn.Module) -> None:
    """Reset "dynamic" rotary embeddings to their initial state before each forward pass."""
    for rotary, kind in list(_rotaries(model)):
        if "dynamic" in kind and _begin_anew not in rotary._forward_pre_hooks.values():
            rotary.register_forward_pre_hook(_begin_anew)


def _begin_anew(rotary: Any, args: Any) -> None:
    prefixes = [f"{kind}_" for kind in rotary.rope_type] if _by_layer(rotary) else [""]
    for prefix in prefixes:
        frequencies: Tensor = getattr(rotary, f"{prefix}original_inv_freq")
        device = getattr(rotary, f"{prefix}inv_freq").device
        rotary.register_buffer(f"{prefix}inv_freq", frequencies.to(device), persistent=False)
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _rotaries(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The rotary embeddings of a transformers model, with their RoPE types."""
    for module in model.modules():
        if "rope_type" in vars(module):
            kinds = module.rope_type.values() if _by_layer(module) else [module.rope_type]
            yield from ((module, str(kind)) for kind in kinds)


def _by_layer(rotary: Any) -> bool:
    """Whether frequencies depend on the layer type."""
    return isinstance(rotary.rope_type, dict)


def _pretraining_length(rotary: Any) -> int:
    parameters = rotary.config.rope_parameters
    stated = parameters.values() if _by_layer(rotary) else [parameters]
    return min(
        each["original_max_position_embeddings"]
        for each in stated
        if "original_max_position_embeddings" in each
    )
