"""Ablate heads: replace their outputs by zero, their mean or those of another prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    check_indices,
    check_layers,
    check_mode,
)
from sinkscope.interventions.calibration import mean_output, needs_calibration, outputs


class AblateHeads(HookedIntervention):
    """Ablate heads: replace their output z_i = Σ_j A_ij v_j, before W_O, at every position i.

    Zero ablation overstates the effect of a head, since later layers expect its mean output;
    "mean" and "resample" keep that.

    Args:
        model: A bridge.
        heads: (layer, head) pairs.
        mode: "zero": z_i = 0; "mean": the mean over the non-padding positions of the calibration
            texts; or "resample": the output at the same position of a calibration prompt, drawn
            anew for each prompt and the same for all heads.
        calibration: Texts for "mean" and "resample"; they run immediately, on the model in its
            current state. For "resample" they must be of equal length, at least that of the prompts
            measured later.
        seed: Seed of the draws, which start over each time the context is entered.

    Raises:
        UnsupportedError: If a head does not exist, calibration texts are missing, or the head
            outputs of this architecture cannot be edited.
        TextError: If calibration prompts differ in length, or (when it runs) are too short.

    Source: mean and resample ablation as in Wang et al. (2022), Interpretability in the Wild,
    arXiv 2211.00593, and Chan et al. (2022), Causal Scrubbing.
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
        self.replacement: dict[str, Tensor] = {}
        if mode != "zero":
            texts = needs_calibration(mode, calibration)
            if mode == "mean":
                self.replacement = mean_output(model, texts, self.heads)
            else:
                self.replacement = outputs(model, texts, self.heads)

    def _by_hook(self, heads: Iterable[tuple[int, int]]) -> dict[str, list[int]]:
        """Return the heads of each layer by the name of its hook point."""
        grouped: dict[str, list[int]] = defaultdict(list)
        try:
            pairs = dict.fromkeys((layer, head) for layer, head in heads)
        except (TypeError, ValueError):
            raise UnsupportedError(
                "Heads should be (layer, head) pairs, such as [(5, 3), (7, 0)]."
            ) from None
        for layer, head in pairs:
            check_layers(layer, self.caps.n_layers)
            check_indices(head, self.caps.n_heads, "head")
            grouped[self.caps.hook("z", layer)].append(head)
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
        """Return the replacement for the outputs of a layer's ablated heads."""
        if self.mode == "zero":
            return z.new_zeros(())
        replacement = self.replacement[name].to(z)
        if self.mode == "mean":
            return replacement[self.heads[name]]
        first, last = self.cursor.past, self.cursor.past + z.shape[1]
        if last > replacement.shape[1]:
            raise TextError(
                f"The calibration prompts have {replacement.shape[1]} tokens and this one {last}; "
                "give calibration prompts at least as long."
            )
        return replacement[self._choice(len(z), len(replacement)).to(z.device), first:last]

    def _choice(self, prompts: int, calibration: int) -> Tensor:
        """Draw the calibration prompt that replaces each prompt: one draw per sequence."""
        if self._drawn_for != self.cursor.passes and self.cursor.past == 0:
            self._drawn_for = self.cursor.passes
            self._draw = torch.randint(calibration, (prompts,), generator=self._generator)
        return self._draw
