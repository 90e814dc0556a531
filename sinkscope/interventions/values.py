"""Scale the value vectors at some positions, or set them to zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    check_attending,
    check_indices,
    check_positions,
)
from sinkscope.validation import real_number


class ScaleValue(HookedIntervention):
    """Scale the value vectors at some positions, v_j → factor · v_j; attention does not change.

    Args:
        model: A bridge.
        factor: The factor.
        positions: The positions j.
        layers: The layers; None for all.
        kv_heads: The key/value heads; None for all.

    Raises:
        UnsupportedError: If a layer or head does not exist, or the values of this architecture
            cannot be edited.
        TextError: If a position is not a whole number from 0, or (when it runs) beyond a prompt.
    """

    def __init__(
        self,
        model: Any,
        factor: float,
        positions: int | Iterable[int] = 0,
        layers: int | Iterable[int] | None = None,
        kv_heads: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model)
        self.factor = real_number("factor", factor, error=UnsupportedError)
        self.positions = check_positions(positions)
        self.layers = check_attending(layers, self.caps)
        self.kv_heads = check_indices(kv_heads, self.caps.n_kv_heads, "kv_head")

    def _hooks(self) -> Hooks:
        return [(self.caps.hook("value", layer), self._edit) for layer in self.layers]

    def _edit(self, x: Float[Tensor, "prompt position kv_head d_head"], hook: Any) -> Tensor | None:
        rows = self.cursor.rows(self.positions)
        if not rows:
            return None
        factor = x.new_ones(x.shape[1], x.shape[2], 1)
        heads = slice(None) if self.kv_heads is None else list(self.kv_heads)
        for row in rows:
            factor[row, heads] = self.factor
        return x * factor


class ZeroValue(ScaleValue):
    """Set the value vectors at some positions to zero: attending there contributes nothing.

    Args:
        model: A bridge.
        positions: The positions j; v_j is 0.
        layers: The layers; None for all.
        kv_heads: The key/value heads; None for all.

    Raises:
        UnsupportedError: As in `ScaleValue`.
        TextError: As in `ScaleValue`.
    """

    def __init__(
        self,
        model: Any,
        positions: int | Iterable[int] = 0,
        layers: int | Iterable[int] | None = None,
        kv_heads: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, 0.0, positions, layers, kv_heads)
