"""Edit the attention mask of a layer before the layer reads it: the base of mask interventions.

Both attention paths take their masks from the arguments of the attention module, and so do
statistics that are computed from a log-sum-exp. After an edit here patterns, scores and sums are
therefore consistent, also on delegated attention (BERT, OPT). The cost is one dense mask [1 1 query
key] of one byte per entry, shared by all heads and layers; without an intervention, streaming
attention has no dense mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from sinkscope.attention.call import AttentionCall
from sinkscope.attention.masks import MaskSpec
from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import Cursor, Intervention, check_attending, hidden_states

Mask = Shaped[Tensor, "_ _ query key"]
"""bool (True = visible), or a float that is added to the scores."""

_ARGUMENTS = ("attention_mask", "visible")
"""Names of the mask among the arguments of attention: of transformers, and of `sinkscope.bb`."""


class MaskIntervention(Intervention):
    """Base: edits the attention mask of some layers.

    Args:
        model: A bridge.
        layers: The layers; None for all.

    Attributes:
        layers: The layers.
        cursor: The positions of the current forward pass.
        arguments: Name and place of each layer's mask among the arguments of its attention.

    Raises:
        UnsupportedError: If a layer does not exist, or its attention takes no mask; when entered,
            if a model's own attention does not apply the edit as intended.
    """

    def __init__(self, model: Any, layers: int | Iterable[int] | None) -> None:
        super().__init__(model)
        self.layers = check_attending(layers, self.caps)
        self.cursor = Cursor()
        self.arguments = {layer: _mask_name(model, layer) for layer in self.layers}
        self._edited: dict[Any, tuple[Any, Any]] = {}
        self._pass = -1

    def edit(self, mask: Mask) -> Mask:
        """Return the edited mask; `self.cursor` has the positions of its rows."""
        raise NotImplementedError

    def touches(self) -> bool:
        """Whether this forward pass contains anything to edit."""
        raise NotImplementedError

    def _verify(self) -> None:
        """Refuse a model whose attention does not apply the edit as intended."""
        raise NotImplementedError

    def _begin(self, undo: ExitStack) -> None:
        self._verify()
        undo.enter_context(self.cursor.following(self.model))
        undo.callback(self._edited.clear)
        self._follow_hooks(undo, self.layers[0])
        for layer in self.layers:
            before = functools.partial(self._before, layer)
            handle = self.model.blocks[layer].attn.register_forward_pre_hook(
                before, with_kwargs=True
            )
            undo.callback(handle.remove)

    def _before(
        self, layer: int, attn: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not self._in_force() or not self.touches():
            return None
        name, place = self.arguments[layer]
        given = args[place] if len(args) > place else kwargs.get(name)
        edited = self._once(given, layer, hidden_states(args, kwargs).device)
        if len(args) > place:
            return (*args[:place], edited, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: edited}

    def _once(self, given: Any, layer: int, device: torch.device) -> Any:
        """Return the edited mask, computed once for all layers that are given the same one."""
        if self._pass != self.cursor.passes:
            self._pass = self.cursor.passes
            self._edited.clear()
        key = id(given), self.caps.windows[layer] if given is None else None, device
        if key not in self._edited:
            # The given mask is kept too, so that no other object can have its id.
            self._edited[key] = given, self._edit(given, layer, device)
        return self._edited[key][1]

    def _edit(self, given: Any, layer: int, device: torch.device) -> Any:
        if isinstance(given, MaskSpec):
            dense = _dense(given, self.cursor.length, device)
            return EditedMask(given.causal, given.window, self.edit(dense), given.offset)
        if given is None:
            # Eager attention adds its mask to the scores, whatever the dtype.
            return self.edit(additive(self._usual(layer, device), self.model.cfg.dtype))
        if given.ndim == 2 and given.dtype != torch.bool:
            raise UnsupportedError(
                f"{self.caps.architecture} passes its attention a mask without a query axis, which "
                f"{type(self).__name__} cannot edit."
            )
        edited = self.edit(given[(None,) * (4 - given.ndim)])
        return edited.reshape(given.shape) if given.ndim < 4 else edited

    def _usual(self, layer: int, device: torch.device) -> Bool[Tensor, "_ 1 query key"]:
        """The visible keys of a layer that is given no mask."""
        window, past, length = self.caps.windows[layer], self.cursor.past, self.cursor.length
        if past and window is not None:
            raise UnsupportedError(
                f"{type(self).__name__} cannot tell which keys a sliding-window KV cache holds "
                "when there is no mask; run the prompt in one piece."
            )
        call = AttentionCall(scale=1.0, causal=self.caps.causal, window=window, offset=past)
        visible = call.visible(slice(0, length), slice(0, past + length), device)
        if visible is None:
            return torch.ones(1, 1, length, past + length, dtype=torch.bool, device=device)
        return visible


@dataclass(frozen=True)
class EditedMask(MaskSpec):
    """A streaming mask with an entry for each query and key, besides its causality and window.

    Attributes:
        padding: bool (True = visible), or a float that is added to the scores.
    """

    padding: Mask  # pyright: ignore[reportGeneralTypeIssues]  # not optional here


def _dense(spec: MaskSpec, n_queries: int, device: torch.device) -> Mask:
    """The part of a streaming mask beyond its causality and window."""
    if isinstance(spec, EditedMask):
        return spec.padding
    n_keys = spec.offset + n_queries
    if spec.padding is None:
        return torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=device)
    return spec.padding[:, None, None, :].expand(-1, -1, n_queries, -1)


def additive(mask: Mask, dtype: torch.dtype) -> Mask:
    """A mask that is added to the scores: 0 where visible, -inf elsewhere."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def hidden(mask: Mask) -> Bool[Tensor, "_ _ query key"]:
    """Return where a mask hides a key from a query."""
    if mask.dtype == torch.bool:
        return ~mask
    return mask <= torch.finfo(mask.dtype).min


def lowest(mask: Mask) -> float:
    """Return the value of hidden keys in a mask that is added to the scores."""
    return -torch.inf if mask.isneginf().any() else torch.finfo(mask.dtype).min


def _mask_name(model: Any, layer: int) -> tuple[str, int]:
    """Name and place of the mask among the arguments of a layer's attention.

    Raises:
        UnsupportedError: If it takes none.
    """
    attn = model.blocks[layer].attn
    inner = getattr(attn, "original_component", None) or attn
    arguments = list(inspect.signature(inner.forward).parameters)
    for name in _ARGUMENTS:
        if name in arguments:
            return name, arguments.index(name)
    raise UnsupportedError(
        f"The attention of {type(inner).__name__} takes no mask, so its visible keys cannot be "
        "changed."
    )
