"""Streaming accumulators: `update` with every batch, then `compute` the field of the report.

`PerPrompt` keeps every prompt; `OverPrompts` and `Summed` keep a mean over prompts, position by
position; `Total` keeps a sum. Which one a field needs follows from its dimensions (see
`Observer.accumulator`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Accumulator:
    """Base class: `update` it with one finished batch after another, then `compute`."""

    def update(self, values: Shaped[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Take in the values of one batch; `mask` is True at real positions."""
        raise NotImplementedError

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """The field; `order` says which prompt of the text each row is."""
        raise NotImplementedError


class PerPrompt(Accumulator):
    """Keeps every prompt.

    Args:
        layers: Whether batches are [layer prompt ...] and the field is [prompt layer ...];
            otherwise both begin with the prompt.
        positions: Whether the last axis is the position: padding is then nan, and batches of
            different lengths are padded to the longest.
    """

    def __init__(self, layers: bool = True, positions: bool = False) -> None:
        self._layers = layers
        self._positions = positions
        self._batches: list[Tensor] = []

    def update(self, values: Shaped[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Keep one batch."""
        values = values.transpose(0, 1) if self._layers else values
        if self._positions:
            between = [1] * (values.ndim - 2)
            real = mask.reshape(mask.shape[0], *between, mask.shape[1])
            values = torch.where(real, values, torch.nan)
        self._batches.append(values)

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[prompt ...], prompts in the order of the text."""
        batches = self._batches
        if self._positions:
            longest = max(batch.shape[-1] for batch in batches)
            batches = [_widen(batch, longest, torch.nan) for batch in batches]
        rows = torch.cat(batches)
        assert len(rows) == len(order), "a prompt was taken in twice, or not at all"
        return rows[torch.argsort(order).to(rows.device)]


class OverPrompts(Accumulator):
    """Mean over prompts, position by position: [layer prompt ... position] loses its prompts.

    A prompt counts at the positions where its mask is True. The last axis may also be something
    else that a prompt can lack, such as a bucket of query positions: then the mask is of that.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    def update(
        self, values: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Add one batch; what lies where the mask is False is ignored."""
        between = [1] * (values.ndim - 3)
        real = mask.reshape(1, mask.shape[0], *between, mask.shape[1])
        self._add(torch.where(real, values.float(), 0.0).sum(dim=1), mask)

    def _add(self, sums: Float[Tensor, "layer ..."], mask: Bool[Tensor, "prompt position"]) -> None:
        self._sum = _plus(self._sum, sums)
        self._count = _plus(self._count, mask.sum(dim=0))

    @property
    def count(self) -> Int[Tensor, "position"]:
        """How many prompts each position's mean is over."""
        assert self._count is not None
        return self._count

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[layer ... position]; nan where no prompt has a value."""
        assert self._sum is not None
        return self._sum / self.count


class Summed(OverPrompts):
    """`OverPrompts` of what is summed over the batch's prompts already: [... position]."""

    def update(self, values: Float[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Add one batch."""
        self._add(values, mask)


class Total(Accumulator):
    """Sum over batches of what has no prompts and no positions."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, values: Shaped[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Add one batch."""
        self._sum = values if self._sum is None else self._sum + values

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """The sum."""
        assert self._sum is not None
        return self._sum


def _widen(value: Tensor, width: int, fill: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[-1]), value=fill)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Sum of two tensors whose last axes may differ: batches have different longest prompts."""
    if total is None:
        return part
    width = max(total.shape[-1], part.shape[-1])
    return _widen(total, width) + _widen(part, width)
