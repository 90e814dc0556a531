"""Interventions on values and on what heads put out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions import calibration as _calibration
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    check_indices,
    check_layers,
    check_mode,
    check_positions,
)


class ScaleValue(HookedIntervention):
    """Scales the values at some positions: what a query gets from them, whatever it pays.

    Args:
        model: A bridge.
        factor: What to multiply by.
        positions: Where.
        layers: In which layers; None for all.
        kv_heads: In which key/value heads; None for all.
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
        self.factor = float(factor)
        self.positions = check_positions(positions)
        self.layers = check_layers(layers, self.can.n_layers)
        self.kv_heads = check_indices(kv_heads, self.can.n_kv_heads, "kv_head")

    def _hooks(self) -> Hooks:
        return [(self.can.hook("value", layer), self._edit) for layer in self.layers]

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
    """Sets the values at some positions to zero: attention there then buys nothing.

    Args:
        model: A bridge.
        positions: Where.
        layers: In which layers; None for all.
        kv_heads: In which key/value heads; None for all.
    """

    def __init__(
        self,
        model: Any,
        positions: int | Iterable[int] = 0,
        layers: int | Iterable[int] | None = None,
        kv_heads: int | Iterable[int] | None = None,
    ) -> None:
        super().__init__(model, 0.0, positions, layers, kv_heads)


class AblateHeads(HookedIntervention):
    """Takes heads out: what they put out, before W_O, is replaced at every position.

    Zeroing exaggerates what a head does, since later layers are used to its average; "mean" and
    "resample" leave that in place.

    Args:
        model: A bridge.
        heads: (layer, head) pairs.
        mode: "zero"; "mean", the mean over the calibration texts' real positions; or "resample",
            the output at the same position of a calibration prompt, drawn anew for each prompt
            and the same for all heads.
        calibration: Texts for "mean" and "resample"; run now, on the model as it is now. For
            "resample" of equal length, at least that of the prompts to come.
        seed: Of the draws; they start over each time the context is entered.

    Raises:
        UnsupportedError: If a head does not exist, or calibration texts are missing.
    """

    def __init__(
        self,
        model: Any,
        heads: Iterable[tuple[int, int]],
        mode: str = "zero",
        *,
        calibration: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        self.mode = check_mode(mode, ("zero", "mean", "resample"))
        self.heads = self._by_hook(heads)
        self._generator = torch.Generator()
        self._seed, self._draw, self._drawn_for = seed, torch.zeros(0, dtype=torch.long), -1
        self._typical: dict[str, Tensor] = {}
        if mode != "zero":
            texts = _calibration.needs_calibration(mode, calibration)
            if mode == "mean":
                self._typical = _calibration.mean_output(model, texts, self.heads)
            else:
                self._typical = _calibration.outputs(model, texts, self.heads)

    def _by_hook(self, heads: Iterable[tuple[int, int]]) -> dict[str, list[int]]:
        """The heads of each layer by the name of its hook point."""
        grouped: dict[str, list[int]] = defaultdict(list)
        try:
            pairs = dict.fromkeys((layer, head) for layer, head in heads)
        except (TypeError, ValueError):
            raise UnsupportedError(
                "Heads should be (layer, head) pairs, such as [(5, 3), (7, 0)]."
            ) from None
        for layer, head in pairs:
            check_layers(layer, self.can.n_layers)
            check_indices(head, self.can.n_heads, "head")
            grouped[self.can.hook("z", layer)].append(head)
        if not grouped:
            raise UnsupportedError("No head is named; name at least one (layer, head) pair.")
        return dict(grouped)

    def _hooks(self) -> Hooks:
        self._generator.manual_seed(self._seed)
        return [(name, self._editor(name)) for name in self.heads]

    def _editor(self, name: str) -> Any:
        def edit(z: Float[Tensor, "prompt position head d_head"], hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, self.heads[name]] = self._new(name, z)
            return z

        return edit

    def _new(
        self, name: str, z: Float[Tensor, "prompt position head d_head"]
    ) -> Float[Tensor, "..."]:
        """What the ablated heads of a layer put out instead."""
        if self.mode == "zero":
            return z.new_zeros(())
        typical = self._typical[name].to(z)
        if self.mode == "mean":
            return typical[self.heads[name]]
        first, last = self.cursor.past, self.cursor.past + z.shape[1]
        if last > typical.shape[1]:
            raise TextError(
                f"The calibration prompts have {typical.shape[1]} tokens and this one {last}; "
                "give calibration prompts at least as long."
            )
        return typical[self._choice(len(z), len(typical)).to(z.device), first:last]

    def _choice(self, prompts: int, calibration: int) -> Tensor:
        """Which calibration prompt stands in for each prompt: one draw a sequence."""
        if self._drawn_for != self.cursor.passes and self.cursor.past == 0:
            self._drawn_for = self.cursor.passes
            self._draw = torch.randint(calibration, (prompts,), generator=self._generator)
        return self._draw
