"""Attention masks as a few parameters instead of a T×T tensor.

transformers calls a registered mask function before the first layer. Ours returns a `MaskSpec`,
which the model's code passes on to our attention function. Masks other than combinations of causal,
window and padding (packed sequences, prefix-LM, chunks) are built densely, as in transformers' own
sdpa path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import masking_utils


@dataclass(frozen=True)
class MaskSpec:
    """Visibility of keys to queries, as in `AttentionCall`.

    Attributes:
        causal: Whether a query sees no later key.
        window: Sliding window [tokens], or None.
        padding: Real keys [prompt key], or None if every key is real.
        offset: Key index of the first query.
    """

    causal: bool
    window: int | None = None
    padding: Bool[Tensor, "prompt key"] | None = None
    offset: int = 0
    ndim: ClassVar[int] = 0
    """Read by Falcon as the number of axes of a tensor: not four, so that it adds no ALiBi."""

    def to(self, *_: Any) -> MaskSpec:
        """Return self; MPT casts its mask to bool."""
        return self


def streaming_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Bool[Tensor, "prompt key"] | None = None,
    **kwargs: Any,
) -> MaskSpec | Bool[Tensor, "prompt 1 query key"] | None:
    """The mask function that `AttentionMaskInterface` calls; see the module docstring."""
    shape = _shape_of(mask_function, int(q_offset) + q_length)
    if shape is None:
        # Skipped masks have a meaning ("causal" or "bidirectional") only for transformers' sdpa
        # function.
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    causal, window = shape
    padding = _padding(attention_mask, kv_length, kv_offset)
    return MaskSpec(causal, window, padding, int(q_offset) - kv_offset)


def _padding(
    mask: Bool[Tensor, "prompt seen"] | None, kv_length: int, kv_offset: int
) -> Bool[Tensor, "prompt key"] | None:
    if mask is None:
        return None
    mask = masking_utils.prepare_padding_mask(mask, kv_length, kv_offset)
    mask = mask[:, kv_offset : kv_offset + kv_length].bool()
    # One synchronisation per forward pass (transformers' own path has it too) allows kernels
    # without a mask in every layer.
    return None if bool(mask.all()) else mask


def _shape_of(mask_function: Callable, end: int) -> tuple[bool, int | None] | None:
    """(causal, window) of a transformers mask function, or None if it is anything else.

    transformers composes masks from closures, so this compares their code and reads the window from
    the closure. Unrecognised masks are built densely, which is slower but exact. Chunks (Llama-4)
    are purely causal if the last query, before position ``end``, is in the first one.
    """
    base = _BASES.get(mask_function)
    if base is not None:
        return base, None
    composed = masking_utils.sliding_window_causal_mask_function(1)
    if _code(mask_function) is not _code(composed):
        return None
    overlay, *rest = _closure(mask_function).get("mask_functions", (None,))
    causal = _BASES.get(rest[0]) if len(rest) == 1 else None
    if causal is True and _code(overlay) is _code(masking_utils.sliding_window_overlay(1)):
        return True, _closure(overlay)["sliding_window"]
    chunked = masking_utils.chunked_overlay(1, torch.zeros(1))
    if causal is True and _code(overlay) is _code(chunked):
        closure = _closure(overlay)
        one = end <= closure["chunk_size"] and not bool(closure["left_padding"].any())
        return (True, None) if one else None
    both_ways = masking_utils.sliding_window_bidirectional_overlay(1)
    if causal is False and _code(overlay) is _code(both_ways):
        # transformers includes this distance in the window, `MaskSpec` does not.
        return False, _closure(overlay)["sliding_window"] + 1
    return None


_BASES = {
    masking_utils.causal_mask_function: True,
    masking_utils.bidirectional_mask_function: False,
}


def _code(function: Callable | None) -> CodeType | None:
    return getattr(function, "__code__", None)


def _closure(function: Callable) -> dict[str, Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))
