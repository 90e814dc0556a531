"""Detection of sinks in a first pass, for scans with sinks="auto"."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Observer, Scope
from sinkscope.capture.readers import AttentionReader
from sinkscope.errors import TextError
from sinkscope.metrics import attention, positions


class FindSinks(Observer, reads="attention"):
    """Finds the primary and secondary sinks of each prompt; see `metrics.positions`."""

    def __init__(self, scope: Scope, windows: tuple[int | None, ...]) -> None:
        super().__init__(scope)
        self._widest = None if None in windows else max(filter(None, windows))
        self._found: list[tuple[Tensor, Tensor]] = []

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Gu's importance of every key."""
        return {"alpha": attention.importance(x.received(), batch.mask, batch.causal, x.window)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Find positions that exceed the bounds in enough heads of the model."""
        received = rearrange(layers["alpha"], "layer prompt head key -> prompt layer head key")
        primary, secondary = positions.primary_and_secondary(
            received, batch.mask, self.scope.epsilon, causal=batch.causal, window=self._widest
        )
        return {"primary": primary, "secondary": secondary}

    def add(self, finished: dict[str, Tensor], batch: Batch) -> None:
        """Store the sinks of one batch."""
        self._found.append((finished["primary"].cpu(), finished["secondary"].cpu()))

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The primary sink of every prompt, and the secondary sinks in every layer.

        Raises:
            TextError: If no prompt has a sink.
        """
        back = torch.argsort(order)
        primary, secondary = (_together(one)[back] for one in zip(*self._found, strict=True))
        if not primary.any():
            raise TextError(
                f'sinks="auto" found no position to which a tenth of all heads pay more than '
                f"{self.scope.epsilon} of their attention; give the positions, such as sinks=[0], "
                "or lower epsilon."
            )
        attending = torch.tensor(sorted(self._heard))
        by_layer = secondary.new_zeros(
            len(secondary), self.scope.sizes["layer"], secondary.shape[-1]
        )
        return {"primary": primary, "secondary": by_layer.index_copy(1, attending, secondary)}


def _together(found: Iterable[Bool[Tensor, "prompt ... position"]]) -> Bool[Tensor, "..."]:
    """Concatenate the batches, padding shorter prompts."""
    found = list(found)
    longest = max(one.shape[-1] for one in found)
    return torch.cat([torch.nn.functional.pad(one, (0, longest - one.shape[-1])) for one in found])
