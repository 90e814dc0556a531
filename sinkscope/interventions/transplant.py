"""Give prompts the sink of other prompts: its keys and values, in every layer.

A sink acts on later tokens through its keys and values alone. Its key determines how much attention
it absorbs, its value what that attention adds. `SinkTransplant` replaces them, together or one at a
time, at a position of the prompt or in an extra slot before it; `sinkscope.experiments.transplant`
measures what follows. `SinkTransplant.to_cache` passes the same keys and values to transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.attention.kv_cache import cache_argument
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    Intervention,
    check_attending,
    check_mode,
    check_positions,
)
from sinkscope.interventions.calibration import Listener, run_through
from sinkscope.interventions.positions import PositionIdEdit, position_table
from sinkscope.models.probe import evaluating, input_device
from sinkscope.models.signals import close
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts, check_length, context_size, token_strings
from sinkscope.validation import whole_number

WHAT = ("both", "key", "value")
"""What the host receives: the donor's key and value, its key with value zero, or its value."""


class SinkTransplant(HookedIntervention):
    """Give a position the keys and values k_p, v_p of donor prompts' sink in every layer.

    With "both", the donor's key and value replace the host's; with "key", the value is
    zero, so that the position absorbs attention and adds nothing; with "value", the key stays the
    host's. Several donors give the mean of their keys and of their values.

    Keys are taken as they are multiplied, after any rotary embedding, so that a donor's key keeps
    its position in the donor prompt: its distance from query i of the host is i − q, with q the
    donor's position. Heads of grouped-query attention share keys and values as in the model. Tokens
    before the position and the residual state at the position are not changed directly; only what
    later queries read from it is.

    With ``position=None`` the sink takes an extra slot before the prompt and no position: the
    prompts need a placeholder as their first token, which `with_slot` adds, and their own tokens
    keep their positions. The choice of placeholder does not matter, since other tokens read only
    its keys and values. In a layer with a sliding window the slot is visible as long as a first
    token would be. With ``position=0`` and the same prompts, the slot is the token at position 0,
    and theirs follow from 1, as behind a BOS token.

    Args:
        model: A bridge.
        donor: The donor prompts, or anything that `scan` takes as texts. They run immediately, on
            the model in its current state.
        position: The host's position p; None for an extra slot.
        what: "both", "key" or "value".
        donor_position: The donors' position q; p by default, and 0 for an extra slot.
        layers: The layers, among the attention layers; None for all of them.

    Attributes:
        keys: The donors' mean key of each layer [kv_head d_head], float32.
        values: Their mean value.

    Raises:
        UnsupportedError: If a layer does not exist, this architecture exposes no keys or values
            that can be edited, an extra slot should keep the host's key (it has none), or a key
            cannot be without a position: with ALiBi a key's index is its position.
        TextError: If a donor ends before its position, or (when it runs) a host before p.

    Source: compare the explicit attention biases k', v' of Sun et al. (2024), Massive Activations
    in Large Language Models, arXiv 2402.17762, which are trained; these are taken from a run.

    Examples:
        >>> with SinkTransplant(model, donor, what="key"):  # doctest: +SKIP
        ...     absorbs_only = scan(model, texts)
    """

    def __init__(
        self,
        model: Any,
        donor: Any,
        position: int | None = 0,
        what: str = "both",
        *,
        donor_position: int | None = None,
        layers: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model)
        self.what = check_mode(what, WHAT)
        self.layers = check_attending(layers, self.caps)
        self.positions = (self._row,) = check_positions(0 if position is None else position)
        (self.donor_position,) = check_positions(
            self._row if donor_position is None else donor_position
        )
        if position is None and what == "value":
            raise UnsupportedError(
                'An extra slot has no key of the host that what="value" could keep; use "both" or '
                '"key", or a position.'
            )
        if position is None:
            self._check_slot()
        self._at_no_position = _at_no_position(model) if position is None else None
        hooks = {
            name: [self.caps.hook(name, layer) for layer in self.layers]
            for name in ("key", "value")
        }
        self._taken = _mean_at(model, donor, [*hooks["key"], *hooks["value"]], self.donor_position)
        self.keys, self.values = (
            {layer: self._taken[hook] for layer, hook in zip(self.layers, hooks[name], strict=True)}
            for name in ("key", "value")
        )

    def _begin(self, undo: ExitStack) -> None:
        super()._begin(undo)
        if self._at_no_position is not None:
            self._at_no_position._begin(undo)

    def _hooks(self) -> Hooks:
        edited: dict[int, list[tuple[str, Tensor]]] = {layer: [] for layer in self.layers}
        for layer in self.layers:
            key, value = self.keys[layer], self.values[layer]
            if self.what != "value":
                edited[layer].append((self.caps.hook("key", layer), key))
            new = torch.zeros_like(value) if self.what == "key" else value
            edited[layer].append((self.caps.hook("value", layer), new))
        return [(name, self._edit(new)) for layer in self.layers for name, new in edited[layer]]

    def _edit(self, new: Float[Tensor, "kv_head d_head"]) -> Any:
        def edit(x: Float[Tensor, "prompt position kv_head d_head"], hook: Any) -> Tensor | None:
            rows = self.cursor.rows(self.positions)
            if not rows:
                return None
            x = x.clone()
            x[:, rows] = new.to(x)
            return x

        return edit

    def with_slot(self, texts: Any) -> Texts:
        """Return the prompts with a placeholder for the slot before their first token.

        Args:
            texts: Anything that a scan takes.

        Raises:
            UnsupportedError: If the sink is not placed in every layer, so that the placeholder
                would be read.
            TextError: If a prompt is then longer than the model's context.
        """
        self._check_slot()
        return with_slot(self.model, texts)

    def _check_slot(self) -> None:
        """Refuse a slot whose placeholder would affect other tokens otherwise."""
        if len(self.layers) < self.caps.n_layers:
            raise UnsupportedError(
                f"An extra slot is exact where all {self.caps.n_layers} layers attend and are "
                f"given the sink, and this transplant has {len(self.layers)} of them: elsewhere "
                "the placeholder itself would be read; use layers=None, or a position of the host."
            )

    def to_cache(self, prompts: int = 1) -> Any:
        """Return the sink as a transformers cache of one token, from which generation can start.

        transformers counts the tokens of the cache among those of the prompt, so pass a placeholder
        (any id) and the prompt: ``model.generate(ids, past_key_values=cache)``, where ``ids`` has
        the placeholder first. The prompt's tokens then have positions from 1, as after a BOS token.
        A cache grows in use: make one for each call.

        Args:
            prompts: The batch size.

        Returns:
            A `transformers.DynamicCache`, in the dtype and on the device of each layer's keys.

        Raises:
            UnsupportedError: If only some layers are given, the host's key is kept, the donor's
                position is not 0 (the one that a cache of one token has), or the model keeps
                something else in its cache than the keys and values that are edited here.
        """
        count = whole_number("prompts", prompts, at_least=1, error=UnsupportedError)
        if len(self.layers) < self.caps.n_layers or self.what == "value" or self.donor_position:
            raise UnsupportedError(
                "A cache holds keys and values of all layers for a token at position 0; this "
                f"transplant has what={self.what!r}, donor_position={self.donor_position} and "
                f"{len(self.layers)} of {self.caps.n_layers} layers."
            )
        cache, kept = _cache_of_one_token(self.model, self.caps)
        for layer in self.layers:
            found = cache.layers[layer]
            key, value = kept[self.caps.hook("key", layer)], kept[self.caps.hook("value", layer)]
            same = [
                close(rearrange(x, "b t k d -> b k t d"), cached.float().cpu(), 1e-6)
                for x, cached in ((key, found.keys), (value, found.values))
            ]
            if not all(same):
                raise UnsupportedError(
                    f"The cache of {self.caps.architecture} does not hold the keys and values that "
                    "attention multiplies, so a sink cannot be put there."
                )
            new = torch.zeros_like(self.values[layer]) if self.what == "key" else self.values[layer]
            found.keys, found.values = (
                repeat(x.to(cached), "k d -> b k 1 d", b=count).contiguous()
                for x, cached in ((self.keys[layer], found.keys), (new, found.values))
            )
        return cache


def with_slot(model: Any, texts: Any) -> Texts:
    """Return prompts with a placeholder in front, which repeats their own first token."""
    prompts = as_texts(texts).tokenize(model).right_padded()
    tokens = torch.cat([prompts.tokens[:, :1], prompts.tokens], dim=1)
    mask = torch.cat([prompts.mask[:, :1], prompts.mask], dim=1)
    check_length(int(mask.sum(1).max()), context_size(model))
    tokenizer = getattr(model, "tokenizer", None)
    strings = None if tokenizer is None else token_strings(tokenizer, tokens, mask)
    bos = f"{prompts.bos}, after a slot"
    return dataclasses.replace(prompts, tokens=tokens, mask=mask, strings=strings, bos=bos)


def _mean_at(
    model: Any, donor: Any, hooks: list[str], position: int
) -> dict[str, Float[Tensor, "kv_head d_head"]]:
    """Return the mean over donor prompts of some activations at a position, by hook name."""
    prompts = as_texts(donor).tokenize(model).right_padded()
    if (shortest := int(prompts.lengths.min())) <= position:
        raise TextError(
            f"A donor prompt has {shortest} tokens, and its sink should stand at position "
            f"{position}; give longer donors or an earlier donor_position."
        )
    total: dict[str, Tensor] = {}

    def listener(name: str) -> Listener:
        def listen(x: Tensor, batch: Any) -> None:
            total[name] = total.get(name, 0) + x[:, position].double().sum(dim=0)

        return listen

    run_through(model, prompts, {name: listener(name) for name in hooks})
    return {name: (x / len(prompts)).float() for name, x in total.items()}


# -- an extra slot at no position ------------------------------------------------------------------


class _RotaryIds(PositionIdEdit):
    """Rotary ids as without the first token."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, 0, 0)

    def _edit(self, ids: Int[Tensor, "_ position"]) -> Int[Tensor, "_ position"]:
        return (ids - 1).clamp_min(0)


class _LearnedVectors(Intervention):
    """Learned position vectors as without the first token; the table is copied back."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._table, self._first = position_table(model)

    def _begin(self, undo: ExitStack) -> None:
        saved = self._table.detach().clone()
        undo.callback(self._write, saved)
        moved = saved.clone()
        moved[self._first + 1 :] = saved[self._first : -1]
        self._write(moved)

    @torch.no_grad()
    def _write(self, rows: Float[Tensor, "row dim"]) -> None:
        self._table.copy_(rows)


def _at_no_position(model: Any) -> Intervention | None:
    """Return the intervention that keeps a prompt's positions behind a placeholder.

    Raises:
        UnsupportedError: If positions are of another kind.
    """
    intervention = Intervention(model)
    kind = intervention.caps.positions
    if kind == "none":
        return None
    if kind == "rotary":
        return _RotaryIds(model)
    if kind == "learned":
        return _LearnedVectors(model)
    raise UnsupportedError(
        f"The positions of {intervention.caps.architecture} are {kind}: a key's index is its "
        "position, so no slot can be added without one; use position=0 with prompts from with_slot."
    )


# -- a transformers cache --------------------------------------------------------------------------


def _cache_of_one_token(model: Any, caps: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the cache after one token, and the keys and values at the hook points.

    Raises:
        UnsupportedError: If the model has no such cache.
    """
    from transformers import DynamicCache

    plain = model.original_model
    kept: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        def keep(x: Tensor, hook: Any) -> None:
            kept[name] = x.detach().float().cpu()

        return keep

    names = [caps.hook(name, n) for n in range(caps.n_layers) for name in ("key", "value")]
    hooks = [(name, keeping(name)) for name in names]
    cache = DynamicCache(config=plain.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(plain))
    with torch.no_grad(), evaluating(plain), model.hooks(fwd_hooks=hooks):
        plain(ids, use_cache=True, **{cache_argument(plain): cache})
    if len(cache.layers) != caps.n_layers or cache.get_seq_length() != 1:
        raise UnsupportedError(
            f"{caps.architecture} does not keep the keys and values of every layer in a cache, so "
            "a sink cannot be put there."
        )
    return cache, kept
