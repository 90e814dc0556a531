"""Streaming accumulators: `update` with every batch, then `compute` the field of the report.

`PerPrompt` stores every prompt; `OverPrompts` and `Summed` accumulate a mean over prompts for each
position; `Total` accumulates a sum. The dimensions of a field determine its accumulator (see
`Observer.accumulator`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


class Accumulator:
    """Base class: call `update` with each finished batch, then `compute`."""

    def update(self, values: Shaped[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Add the values of one batch; `mask` is True at real positions."""
        raise NotImplementedError

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """The field; `order` has the prompt index of each row."""
        raise NotImplementedError


class PerPrompt(Accumulator):
    """Stores the values of every prompt.

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
        """Store one batch."""
        values = values.transpose(0, 1) if self._layers else values
        if self._positions:
            between = [1] * (values.ndim - 2)
            real = mask.reshape(mask.shape[0], *between, mask.shape[1])
            values = torch.where(real, values, torch.nan)
        if values.untyped_storage().nbytes() > values.numel() * values.itemsize:
            values = values.clone()  # a view would keep all that it was cut from
        self._batches.append(values)

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[prompt ...], prompts in the order of the text; the batches are released."""
        kept = self._batches
        assert sum(map(len, kept)) == len(order), "a prompt was added twice, or not at all"
        shape = list(kept[0].shape[1:])
        if self._positions:
            shape[-1] = max(batch.shape[-1] for batch in kept)
        rows = kept[0].new_empty(len(order), *shape)
        done = 0
        while kept:
            # One batch after another: all of them and the field at once would be twice the report.
            batch = kept.pop(0)
            where = order[done : done + len(batch)].to(rows.device)
            rows[where] = _widen(batch, shape[-1], torch.nan) if self._positions else batch
            done += len(batch)
        return rows


class OverPrompts(Accumulator):
    """Mean over prompts for each position: [layer prompt ... position] to [layer ... position].

    A prompt counts at the positions where its mask is True. The last axis may also be another one
    with entries that a prompt can lack, such as buckets of query positions, with a mask of these.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    def update(
        self, values: Float[Tensor, "layer prompt ..."], mask: Bool[Tensor, "prompt position"]
    ) -> None:
        """Add one batch; values where the mask is False are ignored."""
        between = [1] * (values.ndim - 3)
        real = mask.reshape(1, mask.shape[0], *between, mask.shape[1])
        self._add(torch.where(real, values.float(), 0.0).sum(dim=1), mask)

    def _add(self, sums: Float[Tensor, "layer ..."], mask: Bool[Tensor, "prompt position"]) -> None:
        self._sum = _plus(self._sum, sums)
        self._count = _plus(self._count, mask.sum(dim=0))

    @property
    def count(self) -> Int[Tensor, "position"]:
        """Number of prompts in each position's mean."""
        assert self._count is not None
        return self._count

    def compute(self, order: Int[Tensor, "prompt"]) -> Tensor:
        """[layer ... position]; nan where no prompt has a value."""
        assert self._sum is not None
        return self._sum / self.count


class Summed(OverPrompts):
    """`OverPrompts` for values that are already summed over the batch's prompts: [... position]."""

    def update(self, values: Float[Tensor, "..."], mask: Bool[Tensor, "prompt position"]) -> None:
        """Add one batch."""
        self._add(values, mask)


class Total(Accumulator):
    """Sum over batches of values without prompts and positions."""

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
    """Sum of two tensors whose last axes may differ in length, as batches do."""
    if total is None:
        return part
    width = max(total.shape[-1], part.shape[-1])
    return _widen(total, width) + _widen(part, width)
