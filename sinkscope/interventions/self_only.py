"""Restrict a token to attend only to itself: the structured mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sinkscope.interventions.base import check_positions
from sinkscope.interventions.mask_verification import verify
from sinkscope.interventions.masks import Mask, MaskIntervention, lowest


class SelfOnlyMask(MaskIntervention):
    """Restrict the query at some positions to its own key: A_pp = 1.

    Such a token does not mix values of several positions, like position 0 under a causal mask. Its
    key stays visible to every query to which it was visible before. A learned sink logit keeps its
    share of the row.

    Args:
        model: A bridge.
        position: One or several positions p.
        layers: The layers in which the mask is edited; None for all.

    Raises:
        UnsupportedError: If a layer does not exist, or a layer's attention takes no mask or does
            not apply the edited one as intended.
        TextError: If a position is not a whole number from 0, or (when it runs) beyond a prompt.

    Source: the "structured mask" of Yan et al. (2024), Unveiling and Controlling Anomalous
    Attention Distribution in Transformers, arXiv 2407.01601; their exact mask is not public; this
    interpretation is ours.

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

    def _verify(self) -> None:
        verify(self, lambda layer: SelfOnlyMask(self.model, 1, layer))

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
        mask[..., rows, :] = lowest(mask)
        mask[..., rows, own] = kept
        return mask
