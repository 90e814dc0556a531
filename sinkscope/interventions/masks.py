"""The structured mask, and a shift of the sink's logit."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from sinkscope.attention.call import AttentionCall
from sinkscope.attention.masks import MaskSpec
from sinkscope.attention.support import takes_attention_functions
from sinkscope.devices import ran_out_of_memory
from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import (
    Cursor,
    Intervention,
    check_indices,
    check_layers,
    check_positions,
    hidden_states,
)
from sinkscope.models.probe import evaluating, only_hooks, probe_tokens

# --- Interventions on who sees whom: the attention mask of a layer, edited before the layer reads
# it.
#
# Both paths take their masks from the arguments of the attention module, and so do statistics that
# are computed from a log-sum-exp: after an edit here, patterns, scores and sums all tell the
# truth, on delegated attention (BERT, OPT) too. The price is one dense mask [1 1 query key], a
# byte an entry, that all heads and layers share; without an intervention, streaming attention has
# none.

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


# --- Does a model's own attention take an edited mask as the edit means it?
#
# transformers has no one rule: most models add a mask to the scores, some add it before they scale
# them, some read a boolean one the other way round, some refuse one with an axis for heads. The
# streaming path applies masks itself. Everything else is asked, by arithmetic: with the edit in
# force the pattern of a probe has to be softmax(ln A + edit).

Pattern = Float[Tensor, "prompt head query key"]

_proved: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def prove(
    edit: MaskIntervention, like: Callable[[int], MaskIntervention], kind: object = None
) -> None:
    """Try an edit on a few tokens, once for each kind of attention in the model.

    Args:
        edit: What is to be proved.
        like: Gives the same edit of one layer alone, at positions that the probe has.
        kind: What else a proof holds for only.

    Raises:
        UnsupportedError: If the model's attention does something else.
    """
    if all(name != "attention_mask" for name, _ in edit.masks.values()):
        return  # the laboratory's attention, which is ours
    if takes_attention_functions(edit.model):
        return
    done = _proved.setdefault(edit.model, set())
    for layer in edit.layers:
        inner = getattr(edit.model.blocks[layer].attn, "original_component", None)
        proof = type(edit), kind, type(inner), edit.can.windows[layer]
        if proof in done:
            continue
        done.add(proof)  # also keeps the trial itself from being tried
        try:
            if not _means_it(like(layer), layer):
                raise UnsupportedError(_refusal(edit))
        except (RuntimeError, ValueError, TypeError) as error:
            done.discard(proof)
            if ran_out_of_memory(error):
                raise
            raise UnsupportedError(_refusal(edit)) from error
        except UnsupportedError:
            done.discard(proof)
            raise


def _means_it(edit: MaskIntervention, layer: int) -> bool:
    tokens = probe_tokens(edit.model)
    name = edit.can.hook("pattern", layer)
    points = set(edit.model.hook_dict.values())
    with only_hooks(points, (), _nothing), evaluating(edit.model), torch.no_grad():
        before = _pattern(edit.model, tokens, name)
        with edit:
            after = _pattern(edit.model, tokens, name)
            bias = edit.edit(torch.zeros(1, 1, *before.shape[2:]))
    want = (before.log() + bias.double()).softmax(-1)
    close = 1e-4 if edit.model.cfg.dtype == torch.float32 else 2e-2
    return bool(((after - want).abs() <= close).all())


def _pattern(model: Any, tokens: Tensor, name: str) -> Pattern:
    kept: list[Pattern] = []

    def keep(pattern: Pattern, hook: Any) -> None:
        kept.append(pattern.double().cpu())

    with model.hooks(fwd_hooks=[(name, keep)]):
        model(tokens.to(model.cfg.device), return_type=None)
    return kept[-1]


def _nothing(x: Any, hook: Any) -> None:
    """What is hooked to nothing."""


def _refusal(edit: MaskIntervention) -> str:
    return (
        f"{edit.can.architecture} does not take an edited mask as {type(edit).__name__} means it, "
        "so this intervention cannot be exact there."
    )


class SelfOnlyMask(MaskIntervention):
    """The structured mask: the query at a position sees its own key alone.

    Such an element mixes nothing, as position 0 under a causal mask does (Yan et al. 2407.01601;
    their exact mask is not public, this reading is ours). Its key stays visible to every query
    that saw it before. A learned sink logit keeps its share of the row.

    Args:
        model: A bridge.
        position: One or several positions.
        layers: Where the mask holds; None for all layers.

    Examples:
        >>> with SelfOnlyMask(model, position=255):  # doctest: +SKIP
        ...     after = scan(model, texts)
    """

    def __init__(
        self,
        model: Any,
        position: int | Iterable[int],
        layers: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, layers)
        self.positions = check_positions(position)

    def _prove(self) -> None:
        prove(self, lambda layer: SelfOnlyMask(self.model, 1, layer))

    def touches(self) -> bool:
        """Whether one of the positions runs in this pass."""
        return bool(self.cursor.rows(self.positions))

    def edit(self, mask: Mask) -> Mask:
        """Hide every key but its own from each of the positions."""
        rows = torch.tensor(self.cursor.rows(self.positions), device=mask.device)
        own = rows + mask.shape[-1] - mask.shape[-2]
        mask = mask.clone()
        if mask.dtype == torch.bool:
            mask[..., rows, :] = False
            mask[..., rows, own] = True
            return mask
        kept = mask[..., rows, own]
        mask[..., rows, :] = -torch.inf if mask.isneginf().any() else torch.finfo(mask.dtype).min
        mask[..., rows, own] = kept
        return mask


class ShiftSinkLogit(MaskIntervention):
    """Adds a constant to the logit of one key in every query that sees it.

    s_{i,position} + shift, after any softcap and before the softmax: the least edit that makes a
    sink weaker (shift < 0) or stronger.

    Args:
        model: A bridge.
        shift: What to add [logit].
        position: The key.
        layers: Where; None for all layers.
        heads: In which query heads; None for all.
    """

    def __init__(
        self,
        model: Any,
        shift: float,
        position: int = 0,
        layers: int | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, layers)
        if not math.isfinite(shift):
            raise UnsupportedError(f"A logit cannot be shifted by {shift}; pass a finite number.")
        self.shift = float(shift)
        self.positions = (self.position,) = check_positions(position)
        self.heads = check_indices(heads, self.can.n_heads, "head")
        if any(name != "attention_mask" for name, _ in self.masks.values()):
            raise UnsupportedError(
                f"{self.can.architecture} takes masks that only hide, so no logit can be shifted."
            )

    def _prove(self) -> None:
        # Upwards and downwards: one of them shows, whether the probe's first token is a sink or no.
        for shift in (3.0, -3.0):
            prove(
                self,
                lambda layer, by=shift: ShiftSinkLogit(self.model, by, 0, layer, self.heads),
                (shift, self.heads is None),
            )

    def touches(self) -> bool:
        """Always: a key of an earlier pass is still seen."""
        self.cursor.rows([self.position])  # refuses a position that no token has reached
        return True

    def edit(self, mask: Mask) -> Mask:
        """Add to one column, in some heads."""
        mask = additive(mask, self.model.cfg.dtype)
        column = self.position - (self.cursor.past + self.cursor.length - mask.shape[-1])
        if column < 0:  # the window of a trimmed cache has left it behind
            return mask
        n_heads = 1 if self.heads is None else self.can.n_heads
        shift = mask.new_zeros(1, n_heads, 1, mask.shape[-1])
        shift[:, slice(None) if self.heads is None else list(self.heads), :, column] = self.shift
        return torch.where(hidden(mask), mask, mask + shift)
