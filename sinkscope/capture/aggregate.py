"""How an observer's numbers grow from batch to batch, and how they end.

A fold takes the stacked layers of one complete batch. What it keeps follows from the dimensions
of the report field it ends in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# --- Reductions of a whole batch in a few kernel launches.
#
# At short lengths a scan pays for launches, not for arithmetic: a layer of a billion-parameter
# model takes a GPU 2 ms, in which Python launches about a hundred kernels. What the definitions in
# `metrics` say a layer, a threshold or a set of positions at a time is said here all at once.

COMPARED_AT_ONCE = 2**26
"""Comparisons with thresholds held at once [bytes]."""


def all_layers(
    definition: Callable[..., Tensor],
    stacked: Shaped[Tensor, "layer prompt *rest"],
    *per_prompt: Shaped[Tensor, "prompt ..."],
) -> Shaped[Tensor, "layer prompt *result"]:
    """Apply a definition that takes one layer's prompts to all layers, as if they were prompts.

    Args:
        definition: A function of tensors that all begin with ``prompt``, as does its result.
        stacked: Its first argument, for every layer.
        per_prompt: Its other arguments, the same for every layer.
    """
    layers = len(stacked)
    flat = rearrange(stacked, "layer prompt ... -> (layer prompt) ...")
    others = (repeat(x, "prompt ... -> (layer prompt) ...", layer=layers) for x in per_prompt)
    found = definition(flat, *others)
    return rearrange(found, "(layer prompt) ... -> layer prompt ...", layer=layers)


class ReceivedSummary(NamedTuple):
    """Gu's importance score of every key of a layer, summed up.

    Attributes:
        alpha: The scores themselves; 0 at padding [probability].
        importance: Their sum over the prompts that reach the key [probability].
        peak: Their mean over heads [probability].
        above: How many of (prompt, head) exceed each threshold.
    """

    alpha: Float[Tensor, "prompt head key"]
    importance: Float[Tensor, "head key"]
    peak: Float[Tensor, "prompt key"]
    above: Int[Tensor, "threshold key"]

    def over(self, per_uniform: Float[Tensor, "prompt key"]) -> Float[Tensor, "head key"]:
        """The sum over prompts of `metrics.attention.uniform_ratio` [ratio]."""
        return torch.einsum("phk,pk->hk", self.alpha, per_uniform)


def received_summary(
    mass: Float[Tensor, "prompt head key"],
    per_query: Float[Tensor, "prompt key"],
    thresholds: Float[Tensor, "threshold"],
) -> ReceivedSummary:
    """`metrics.attention.importance` and `count_above` of a layer, in one go.

    Args:
        mass: Attention that each key receives in all.
        per_query: See `Batch.per_query`.
        thresholds: Thresholds of the sink rate [probability].
    """
    alpha = mass * per_query[:, None, :]
    entries = rearrange(alpha, "prompt head key -> (prompt head) key")
    return ReceivedSummary(
        alpha=alpha,
        importance=alpha.sum(dim=0),
        peak=alpha.mean(dim=1),
        above=_count_above(entries, thresholds),
    )


def _count_above(
    x: Float[Tensor, "entry key"], thresholds: Float[Tensor, "threshold"]
) -> Int[Tensor, "threshold key"]:
    """How many entries exceed each threshold, as many thresholds at a time as memory allows."""
    together = max(1, COMPARED_AT_ONCE // max(1, x.numel()))
    parts = [(x > some[:, None, None]).sum(dim=1) for some in thresholds.split(together)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Fold:
    """Base: `add` one finished batch after another, then ask for the `result`."""

    def add(
        self, layers: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Fold in what every layer gave for one batch; `mask` is True at real positions."""
        raise NotImplementedError

    def result(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """The folded tensor; `order` says which prompt each folded row is."""
        raise NotImplementedError


class PerPrompt(Fold):
    """Keeps every prompt: [layer prompt ...] of each batch becomes [prompt layer ...]."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(
        self, layers: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Keep one batch."""
        self._batches.append(layers.transpose(0, 1))

    def result(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[prompt layer ...], prompts in the order of the text."""
        return _unsort(torch.cat(self._batches), order)


class OverPrompts(Fold):
    """Mean over prompts, position by position: [layer prompt ... position] loses its prompts.

    A prompt counts at the positions where its mask is True. The last axis may also be something
    else that a prompt can lack, such as a bucket of query positions: then the mask is of that.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    def add(
        self, layers: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Add one batch; what lies where the mask is False is ignored."""
        self._grow(torch.where(_spread(mask, layers), layers.float(), 0.0).sum(dim=1), mask)

    def _grow(
        self, sums: Float[Tensor, "layer ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        self._sum = _plus(self._sum, sums)
        self._count = _plus(self._count, mask.sum(dim=0))

    @property
    def count(self) -> Int[Tensor, "position"]:
        """How many prompts each position's mean is over."""
        assert self._count is not None
        return self._count

    def result(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[layer ... position]; nan where no prompt has a value."""
        assert self._sum is not None
        return self._sum / self.count


class Summed(OverPrompts):
    """`OverPrompts` of what is summed over the batch's prompts already: [layer ... position]."""

    def add(
        self, layers: Float[Tensor, "layer ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Add one batch."""
        self._grow(layers, mask)


class OverLayers(Fold):
    """One number a token: [layer prompt position] becomes [prompt position]; nan at pads."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._batches: list[Tensor] = []

    def add(
        self, layers: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Reduce one batch over its layers."""
        self._batches.append(torch.where(mask, self._reduce(layers), torch.nan))

    def result(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[prompt position], prompts in the order of the text."""
        longest = max(batch.shape[-1] for batch in self._batches)
        padded = [_widen(batch, longest, torch.nan) for batch in self._batches]
        return _unsort(torch.cat(padded), order)


def _spread(mask: Bool[Tensor, "prompt position"], layers: Tensor) -> Tensor:
    """The mask with axes of size 1 wherever `layers` has further ones."""
    between = [1] * (layers.ndim - 3)
    return mask.reshape(1, mask.shape[0], *between, mask.shape[1])


def _unsort(rows: Tensor, order: Int[Tensor, "prompt"]) -> Tensor:
    assert len(rows) == len(order), "a prompt was folded twice, or not at all"
    return rows[torch.argsort(order).to(rows.device)]


def _widen(value: Tensor, width: int, fill: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[-1]), value=fill)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum of two tensors whose last axes may differ: batches have different longest prompts."""
    if total is None:
        return part
    width = max(total.shape[-1], part.shape[-1])
    return _widen(total, width) + _widen(part, width)
