"""Interventions on who sees whom: the attention mask of a layer, edited before the layer reads it.

Both paths take their masks from the arguments of the attention module, and so do statistics that
are computed from a log-sum-exp: after an edit here, patterns, scores and sums all tell the truth,
on delegated attention (BERT, OPT) too. The price is one dense mask [1 1 query key], a byte an
entry, that all heads and layers share; without an intervention, streaming attention has none.
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

from sinkscope.capture._calls import AttentionCall
from sinkscope.capture._masks import MaskSpec
from sinkscope.errors import UnsupportedError
from sinkscope.interventions._base import Cursor, Intervention, check_layers, hidden_states

_MASKS = ("attention_mask", "visible")
"""What attention modules call their mask: transformers' name, and the laboratory's."""

Mask = Shaped[Tensor, "_ _ query key"]
"""bool (True = visible), or a float that is added to the scores."""


class MaskIntervention(Intervention):
    """Base: edits the mask of some layers.

    Attributes:
        layers: Which.
        cursor: Which positions the running pass holds.
        masks: Name and place of each layer's mask among the arguments of its attention.
    """

    def __init__(self, model: Any, layers: int | Iterable[int] | None) -> None:
        super().__init__(model)
        self.layers = check_layers(layers, self.can.n_layers)
        self.cursor = Cursor()
        self.masks = {layer: _mask_name(model, layer) for layer in self.layers}
        self._edited: dict[Any, tuple[Any, Any]] = {}
        self._pass = -1

    def edit(self, mask: Mask) -> Mask:
        """The mask with its edit; `self.cursor` says which positions its rows are."""
        raise NotImplementedError

    def touches(self) -> bool:
        """Whether this forward pass holds anything to edit."""
        raise NotImplementedError

    def _prove(self) -> None:
        """Refuse a model whose attention does not take the edit as it is meant."""
        raise NotImplementedError

    def _begin(self, undo: ExitStack) -> None:
        self._prove()
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
        name, place = self.masks[layer]
        given = args[place] if len(args) > place else kwargs.get(name)
        edited = self._once(given, layer, hidden_states(args, kwargs).device)
        if len(args) > place:
            return (*args[:place], edited, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: edited}

    def _once(self, given: Any, layer: int, device: torch.device) -> Any:
        """The edited mask, made once for all layers that are given the same one."""
        if self._pass != self.cursor.passes:
            self._pass = self.cursor.passes
            self._edited.clear()
        key = id(given), self.can.windows[layer] if given is None else None, device
        if key not in self._edited:
            # The one given is kept too, so that no other can take its id.
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
                f"{self.can.architecture} hands its attention a mask without queries, which "
                f"{type(self).__name__} cannot edit."
            )
        edited = self.edit(given[(None,) * (4 - given.ndim)])
        return edited.reshape(given.shape) if given.ndim < 4 else edited

    def _usual(self, layer: int, device: torch.device) -> Bool[Tensor, "_ 1 query key"]:
        """What a layer's queries see when it is given no mask at all."""
        window, past, length = self.can.windows[layer], self.cursor.past, self.cursor.length
        if past and window is not None:
            raise UnsupportedError(
                f"{type(self).__name__} cannot tell the keys of a sliding-window KV cache that "
                "comes without a mask; run the prompt in one piece."
            )
        call = AttentionCall(scale=1.0, causal=self.can.causal, window=window, offset=past)
        seen = call.visible(slice(0, length), slice(0, past + length), device)
        if seen is None:
            return torch.ones(1, 1, length, past + length, dtype=torch.bool, device=device)
        return seen


@dataclass(frozen=True)
class EditedMask(MaskSpec):
    """A streaming mask with an entry for each query and key, beside its causality and window.

    Attributes:
        padding: bool (True = visible), or a float that is added to the scores.
    """

    padding: Mask  # pyright: ignore[reportGeneralTypeIssues]  # always given here


def _dense(spec: MaskSpec, n_queries: int, device: torch.device) -> Mask:
    """The part of a streaming mask that its causality and window do not say."""
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
    """Where a mask hides a key from a query."""
    if mask.dtype == torch.bool:
        return ~mask
    return mask <= torch.finfo(mask.dtype).min


def _mask_name(model: Any, layer: int) -> tuple[str, int]:
    """Name and place of the mask among the arguments of a layer's attention.

    Raises:
        UnsupportedError: If it takes none.
    """
    attn = model.blocks[layer].attn
    inner = getattr(attn, "original_component", None) or attn
    arguments = list(inspect.signature(inner.forward).parameters)
    for name in _MASKS:
        if name in arguments:
            return name, arguments.index(name)
    raise UnsupportedError(
        f"The attention of {type(inner).__name__} takes no mask, so who sees whom cannot be "
        "changed there."
    )
