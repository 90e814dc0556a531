"""Add a constant to the attention logit of one key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import check_indices, check_positions
from sinkscope.interventions.mask_verification import verify
from sinkscope.interventions.masks import Mask, MaskIntervention, additive, hidden
from sinkscope.validation import real_number


class ShiftSinkLogit(MaskIntervention):
    """Add a constant to the logit of one key, s_ip + c, in every query i to which it is visible.

    It is added after any softcap and before the softmax: the smallest edit that makes a sink weaker
    (c < 0) or stronger. The odds of the key against each other key change by the factor e^c.

    Args:
        model: A bridge.
        shift: c [logit].
        position: p, the key's position.
        layers: The layers; None for all.
        heads: The query heads; None for all.

    Raises:
        UnsupportedError: If a layer or head does not exist, c is not finite, or a layer's attention
            takes no additive mask or does not apply the edited one as intended.
        TextError: If the position is not a whole number from 0, or (when it runs) beyond a prompt.
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
        self.shift = real_number("shift", shift, error=UnsupportedError)
        self.positions = (self.position,) = check_positions(position)
        self.heads = check_indices(heads, self.caps.n_heads, "head")
        if any(name != "attention_mask" for name, _ in self.arguments.values()):
            raise UnsupportedError(
                f"{self.caps.architecture} takes boolean masks only, so no logit can be shifted."
            )

    def _verify(self) -> None:
        # Up and down: at least one has an effect, however much the probe's first token receives.
        for shift in (3.0, -3.0):
            verify(
                self,
                lambda layer, by=shift: ShiftSinkLogit(self.model, by, 0, layer, self.heads),
                (shift, self.heads is None),
            )

    def touches(self) -> bool:
        """Always True, since a key of an earlier pass is still visible."""
        self.cursor.rows([self.position])  # refuses a position that no token has reached
        return True

    def edit(self, mask: Mask) -> Mask:
        """Add the shift to one column, in some heads."""
        mask = additive(mask, self.model.cfg.dtype)
        column = self.position - (self.cursor.past + self.cursor.length - mask.shape[-1])
        if column < 0:  # it has left the window of a trimmed cache
            return mask
        n_heads = 1 if self.heads is None else self.caps.n_heads
        shift = mask.new_zeros(1, n_heads, 1, mask.shape[-1])
        shift[:, slice(None) if self.heads is None else list(self.heads), :, column] = self.shift
        return torch.where(hidden(mask), mask, mask + shift)
