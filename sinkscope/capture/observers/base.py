"""What an observer is: it reads one signal of every layer and ends in fields of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture.aggregate import Fold, OverPrompts, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.report.report import SinkReport

Folded = dict[str, Any]


@dataclass(frozen=True)
class Scope:
    """What observers need to know of the model and of the question.

    Attributes:
        epsilon: Threshold of the sink rate [probability].
        n_heads: Query heads a layer.
        bucket_edges: Lower edges of the buckets of query positions.
        gram: W_O^h W_O^hᵀ of every head of a layer, for norms through the output projection.
    """

    epsilon: float
    n_heads: int
    bucket_edges: tuple[int, ...]
    gram: Callable[[int], Float[Tensor, "head d_head d_head"]]


class Observer:
    """Base: keep small tensors of each layer, finish them once a batch, end in report fields.

    A batch that dies half-way (out of memory, Ctrl-C) is dropped whole, so a report never holds
    half a batch. What can wait until the batch is complete waits for `finish`: inside a hook an
    observer launches as few kernels as it can, because at short lengths launches are what a scan
    pays for.

    Attributes:
        signal: What it reads: "attention", or the name of an activation (see `Capabilities`).
        needs: The tensors that must be seen on a model to have that signal.
        statistics: What it asks of an attention reader that may be shared with others.
        fields: The report fields that its folds end in.
    """

    signal: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[str]] = frozenset()
    statistics: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def reads(cls) -> frozenset[str]:
        """Every tensor of a layer without which this cannot be measured."""
        return cls.needs or frozenset({"pattern" if cls.signal == "attention" else cls.signal})

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._layers: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._folds = {name: self.fold(name) for name in self.fields}

    def observe(self, layer: int, x: Any, batch: Batch) -> None:
        """Reduce one layer's signal; called inside the hook, on the layer's device."""
        raise NotImplementedError

    def keep(self, layer: int, **reduced: Tensor) -> None:
        """Hold what a layer reduced to until the batch is complete."""
        for name, value in reduced.items():
            self._layers[name][layer] = value

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """From what was kept, stacked over layers, to what each field's fold takes."""
        return layers

    def fold(self, name: str) -> Fold:
        """How a field grows over batches: its dimensions in the report's schema decide."""
        dims = SinkReport.variables()[name].dims
        return PerPrompt() if dims[:2] == ("prompt", "layer") else OverPrompts()

    def where(self, name: str, batch: Batch) -> Bool[Tensor, "prompt position"]:
        """Where a prompt counts along the last axis of a field that is a mean over prompts."""
        return batch.mask

    def close(self, batch: Batch) -> Any:
        """Finish the batch that is complete, without folding it in yet."""
        device = batch.tokens.device
        stacked = {
            name: torch.stack([kept[layer].to(device) for layer in sorted(kept)])
            for name, kept in self._layers.items()
        }
        self.drop()
        return self.finish(stacked, batch)

    def add(self, finished: Any, batch: Batch) -> None:
        """Fold in what `close` gave."""
        for name, value in finished.items():
            self._folds[name].add(value, self.where(name, batch))

    def drop(self) -> None:
        """Forget the batch that is running."""
        self._layers.clear()

    def results(self, order: Int[Tensor, "prompt"]) -> Folded:
        """The report's fields, prompts back in the order of the text."""
        return {name: fold.result(order) for name, fold in self._folds.items()}
