"""Finds the sinks: a first pass when a scan is asked for sinks="auto"."""

from __future__ import annotations

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
    """Sink positions of each prompt, by `metrics.positions.find_sinks`."""

    def __init__(self, scope: Scope, windows: tuple[int | None, ...]) -> None:
        super().__init__(scope)
        self._widest = None if None in windows else max(filter(None, windows))
        self._found: list[Bool[Tensor, "prompt position"]] = []

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Gu's importance of every key."""
        return {"alpha": attention.importance(x.received(), batch.mask, batch.causal, x.window)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Positions that enough heads of the whole model agree on."""
        received = rearrange(layers["alpha"], "layer prompt head key -> prompt layer head key")
        return {
            "sinks": positions.find_sinks(
                received,
                batch.mask,
                self.scope.epsilon,
                causal=batch.causal,
                window=self._widest,
            )
        }

    def add(self, finished: dict[str, Tensor], batch: Batch) -> None:
        """Keep one batch's sinks."""
        self._found.append(finished["sinks"].cpu())

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The sinks of every prompt.

        Raises:
            TextError: If no prompt has any: then there is nothing to measure from.
        """
        longest = max(found.shape[1] for found in self._found)
        padded = [
            torch.nn.functional.pad(found, (0, longest - found.shape[1])) for found in self._found
        ]
        sinks = torch.cat(padded)[torch.argsort(order)]
        if not sinks.any():
            raise TextError(
                f'sinks="auto" found no position that a tenth of all heads pay more than '
                f"{self.scope.epsilon} of their attention; name the positions, such as sinks=[0], "
                "or lower epsilon."
            )
        return {"sinks": sinks}
