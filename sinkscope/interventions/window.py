"""Restrict heads to a window of near keys, optionally with the first tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import check_indices
from sinkscope.interventions.mask_verification import verify
from sinkscope.interventions.masks import Mask, MaskIntervention, lowest
from sinkscope.validation import whole_number


class WindowedAttention(MaskIntervention):
    """Restrict heads to near keys and to the first tokens.

    Query i keeps those of its visible keys j with |i - j| < w (under a causal mask the last w keys,
    its own included) or j < n. The softmax runs over these alone, so that the attention to the
    others is redistributed in proportion; a learned sink logit stays in its denominator.

    Args:
        model: A bridge.
        window: w, how many keys up to and including the query's own [tokens].
        sinks: n, how many of the first tokens stay visible as well [tokens].
        layers: The layers; None for all.
        heads: The query heads of these layers; None for all. To restrict one set of heads in one
            layer and another set elsewhere, nest two of these.

    Raises:
        UnsupportedError: If a layer or head does not exist, w is not a whole number from 1 or n
            from 0, or a layer's attention takes no mask or does not apply the edited one as
            intended.

    Source: window attention with and without the first tokens as in Xiao et al. (2023), Efficient
    Streaming Language Models with Attention Sinks, arXiv 2309.17453; head by head as in Xiao et
    al. (2024), DuoAttention, arXiv 2410.10819. Positions stay those of the whole text.

    Examples:
        >>> with WindowedAttention(model, 64, sinks=1, layers=3, heads=[2]):  # doctest: +SKIP
        ...     after = scan(model, texts)
    """

    def __init__(
        self,
        model: Any,
        window: int,
        sinks: int = 0,
        layers: int | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, layers)
        self.window = whole_number("window", window, at_least=1, error=UnsupportedError)
        self.sinks = whole_number("sinks", sinks, at_least=0, error=UnsupportedError)
        self.heads = check_indices(heads, self.caps.n_heads, "head")
        if heads is not None and any(
            name != "attention_mask" for name, _ in self.arguments.values()
        ):
            raise UnsupportedError(
                f"{self.caps.architecture} takes one mask for all heads of a layer, so some heads "
                f"alone cannot be restricted; leave out heads."
            )

    def _verify(self) -> None:
        verify(
            self,
            lambda layer: WindowedAttention(self.model, 2, min(self.sinks, 1), layer, self.heads),
            (self.heads, self.sinks > 0),
        )

    def touches(self) -> bool:
        """Whether some query of this pass has more keys than it may keep."""
        return self.cursor.past + self.cursor.length > self.window

    def edit(self, mask: Mask) -> Mask:
        """Hide far keys, in some heads."""
        hide = self._far(mask.shape[-1], mask.device)[None, None]
        if self.heads is not None:
            chosen = torch.zeros(self.caps.n_heads, dtype=torch.bool, device=mask.device)
            chosen[list(self.heads)] = True
            hide = hide & chosen[:, None, None]
        if mask.dtype == torch.bool:
            return mask & ~hide
        return torch.where(hide, lowest(mask), mask)

    def _far(self, n_keys: int, device: torch.device) -> Bool[Tensor, "query key"]:
        """Return which keys are hidden from each query of this pass."""
        end = self.cursor.past + self.cursor.length
        query = torch.arange(self.cursor.past, end, device=device)[:, None]
        key = torch.arange(end - n_keys, end, device=device)  # a trimmed cache has lost the first
        return ((query - key).abs() >= self.window) & (key >= self.sinks)
