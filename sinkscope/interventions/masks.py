"""The structured mask, and a shift of the sink's logit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from sinkscope.errors import UnsupportedError
from sinkscope.interventions._base import check_indices, check_positions
from sinkscope.interventions._masking import Mask, MaskIntervention, additive, hidden
from sinkscope.interventions._proving import prove


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
