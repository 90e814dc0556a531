"""Set, scale or remove the residual stream, or the outputs of attention and feed-forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    check_indices,
    check_layers,
    check_mode,
    check_positions,
)
from sinkscope.interventions.calibration import mean_at, needs_calibration
from sinkscope.validation import real_number

PLACES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Activations that can be edited: a block's input, what its two parts add, and its output."""


class _AtPositions(HookedIntervention):
    """Base: edit one activation of a layer at some positions."""

    def __init__(self, model: Any, layer: int, positions: int | Iterable[int], at: str) -> None:
        super().__init__(model)
        check_mode(at, PLACES)
        (self.layer,) = check_layers(layer, self.caps.n_layers)
        self._given = check_positions(positions)
        self.positions = tuple(sorted(self._given))
        self.hook = self.caps.hook(at, self.layer)

    def _hooks(self) -> Hooks:
        return [(self.hook, self._edit)]

    def _edit(self, x: Float[Tensor, "prompt position dim"], hook: Any) -> Tensor | None:
        rows = self.cursor.rows(self.positions)
        if not rows:
            return None
        x = x.clone()
        x[:, rows] = self.new(x[:, rows], len(self.positions) - len(rows))
        return x

    def new(self, old: Float[Tensor, "prompt row dim"], first: int) -> Tensor:
        """Return the new activation at `self.positions[first:]`."""
        raise NotImplementedError


class SetActivation(_AtPositions):
    """Set some dims d of an activation at some positions p: x_pd = value.

    Setting massive activations to zero breaks a model, setting them to their mean changes almost
    nothing (Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762,
    Table 3): always compare both.

    Args:
        model: A bridge.
        layer: The block.
        dims: The residual dims; None for all of them.
        positions: The positions.
        mode: "zero"; "mean", the mean over the calibration prompts at that same position and dim;
            a number; or a tensor or nested list that broadcasts to [position dim], in the order of
            ``positions`` and ``dims``.
        at: "resid_pre", "attn_out", "mlp_out" (what a part adds to the stream) or "resid_post".
        calibration: Texts for "mean"; they run immediately, on the model in its current state.

    Raises:
        UnsupportedError: If the layer or a dim does not exist, the value does not broadcast, or
            this architecture has no hook point for the activation.
        TextError: If a position is not a whole number from 0, (when it runs) beyond a prompt, or
            beyond every calibration prompt.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        dims: int | Iterable[int] | None,
        positions: int | Iterable[int],
        mode: str | float | Sequence[Any] | Float[Tensor, "..."] = "zero",
        *,
        at: str = "resid_post",
        calibration: Any = None,
    ) -> None:
        super().__init__(model, layer, positions, at)
        self.dims = check_indices(dims, self.caps.d_model, "dim")
        self._chosen = slice(None) if self.dims is None else list(self.dims)
        self.value = self._value(mode, calibration)

    def _value(self, mode: Any, calibration: Any) -> Float[Tensor, "position dim"]:
        n_dims = self.caps.d_model if self.dims is None else len(self.dims)
        shape = len(self.positions), n_dims
        if isinstance(mode, str):
            check_mode(mode, ("zero", "mean"))
        if mode == "mean":
            texts = needs_calibration(mode, calibration)
            return mean_at(self.model, texts, self.hook, self.positions)[:, self._chosen]
        try:
            value = torch.as_tensor(0.0 if isinstance(mode, str) else mode, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UnsupportedError(
                f'The value is {mode!r}; pass "zero", "mean", a number or a tensor.'
            ) from None
        try:
            given = value.expand(shape)
        except RuntimeError:
            raise UnsupportedError(
                f"The value has the shape {tuple(value.shape)}, which does not broadcast to "
                f"[position dim] = {list(shape)}."
            ) from None
        return given[[self._given.index(position) for position in self.positions]]

    def new(self, old: Float[Tensor, "prompt row dim"], first: int) -> Tensor:
        """Return the value in the chosen dims and the old activation in the others."""
        old = old.clone()
        old[:, :, self._chosen] = self.value[first:].to(old)
        return old


class RemoveOutput(SetActivation):
    """Remove what attention or feed-forward adds to the residual stream at some positions.

    Args:
        model: A bridge.
        layer: The block.
        part: "attn" or "mlp".
        positions: The positions; the output at others stays.
        mode: "zero", or "mean" to put its mean there; see `SetActivation`.
        calibration: Texts for "mean".

    Raises:
        UnsupportedError: As in `SetActivation`.
        TextError: As in `SetActivation`.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        part: str,
        positions: int | Iterable[int],
        mode: str = "zero",
        *,
        calibration: Any = None,
    ) -> None:
        check_mode(part, ("attn", "mlp"))
        super().__init__(
            model, layer, None, positions, mode, at=f"{part}_out", calibration=calibration
        )
        self.part = part


class ScaleActivation(_AtPositions):
    """Scale an activation at some positions, x → factor · x or norm · x / ‖x‖.

    Its direction does not change.

    Args:
        model: A bridge.
        layer: The block.
        positions: The positions.
        factor: The factor; or give `norm`.
        norm: The new Euclidean norm [activation].
        at: See `SetActivation`.

    Raises:
        UnsupportedError: If the layer does not exist, this architecture has no hook point for the
            activation, or not exactly one of factor and norm is given.
        TextError: If a position is not a whole number from 0, or (when it runs) beyond a prompt.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        positions: int | Iterable[int],
        factor: float | None = None,
        *,
        norm: float | None = None,
        at: str = "resid_post",
    ) -> None:
        super().__init__(model, layer, positions, at)
        if (factor is None) == (norm is None):
            raise UnsupportedError("ScaleActivation takes either a factor or a norm.")
        refuse = UnsupportedError
        self.factor = None if factor is None else real_number("factor", factor, error=refuse)
        self.norm = None if norm is None else real_number("norm", norm, error=refuse)

    def new(self, old: Float[Tensor, "prompt row dim"], first: int) -> Tensor:
        """Return the scaled activation."""
        if self.factor is not None:
            return old * self.factor
        size = torch.linalg.vector_norm(old, dim=-1, keepdim=True, dtype=torch.float32)
        return (old.float() / size * self.norm).to(old.dtype)
