"""The observer of massive activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture._waiting import Coming
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Folded, Observer, Scope
from sinkscope.metrics import residual
from sinkscope.metrics._magnitude_median import magnitude_median
from sinkscope.report import MassiveActivations

LATE_LOOK = 2**25
"""Entries of a hidden state up to which it may be kept alive for a layer longer."""

FEW = 16
"""Tokens that may hold massive activations are few if no more than one in so many."""

ENTRIES_KEPT = 64
"""Massive activations kept of one prompt and layer, largest first; `count` counts them all."""


_NOTHING = residual.MassiveEntries(
    *(torch.zeros(0, dtype=torch.long) for _ in range(3)), torch.zeros(0), torch.zeros(0)
)


class Massive(Observer):
    """Massive activations: a list of entries, not a fixed shape.

    Whether a layer has any is known only once the device has got there. So the answer to one layer
    is looked at when the next one fires: the device never runs dry while Python waits for it.
    """

    signal = "resid_post"
    fields = ()

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._asked: list[_Asked] = []
        self._running: dict[int, residual.MassiveRows | None] = {}
        self._entries: list[dict[str, Tensor]] = []
        self._counts: list[Int[Tensor, "prompt layer"]] = []

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """Ask how many tokens pass the fixed part of the rule of Sun et al."""
        peak = residual.token_peaks(x, batch.mask)
        number = Coming((peak > residual.MASSIVE_MINIMUM).sum())
        self._asked.append(_Asked(layer, x, peak, number, batch))
        self._look(but_the_last=x.is_cuda and x.numel() <= LATE_LOOK)

    def _look(self, but_the_last: bool = False) -> None:
        while len(self._asked) > but_the_last:
            asked = self._asked.pop(0)
            self._running[asked.layer] = asked.rows()

    def close(self, batch: Batch) -> tuple[dict[str, Tensor], Int[Tensor, "prompt layer"]]:
        """Number the prompts as the text does and keep the largest entries."""
        self._look()
        prompts, n_layers = len(batch.rows), len(self._running)
        layers = [layer for layer, rows in sorted(self._running.items()) if rows is not None]
        found = _NOTHING
        if layers:
            rows = _together([self._running[layer] for layer in layers], batch.tokens.device)
            found = residual.MassiveEntries(*(part.cpu() for part in rows.entries()))
        layer = torch.tensor(layers, dtype=torch.long)[found.prompt // prompts]
        found = found._replace(prompt=found.prompt % prompts)
        counts = torch.zeros(prompts, n_layers, dtype=torch.long)
        column = torch.searchsorted(torch.tensor(sorted(self._running)), layer)
        counts.index_put_((found.prompt, column), torch.ones_like(column), accumulate=True)
        entries = _largest(found, layer, batch.rows)
        self.drop()
        return entries, counts

    def add(
        self, finished: tuple[dict[str, Tensor], Int[Tensor, "prompt layer"]], batch: Batch
    ) -> None:
        """Append one batch's entries."""
        entries, counts = finished
        self._entries.append(entries)
        self._counts.append(counts)

    def drop(self) -> None:
        """Forget the batch that is running."""
        self._asked.clear()
        self._running.clear()

    def results(self, order: Int[Tensor, "prompt"]) -> Folded:
        """Entries by prompt, layer and size."""
        merged = {
            name: torch.cat([entries[name] for entries in self._entries])
            for name in self._entries[0]
        }
        by = _sorted(merged["prompt"], merged["layer"], merged["value"])
        counts = torch.cat(self._counts)[torch.argsort(order)]
        merged = {name: value[by] for name, value in merged.items()}
        return {"massive": MassiveActivations(**merged, count=counts)}


class _Asked(NamedTuple):
    """A hidden state of which it is not known yet whether it holds massive activations."""

    layer: int
    hidden: Float[Tensor, "prompt position dim"]
    peak: Float[Tensor, "prompt position"]
    number: Coming
    batch: Batch

    def rows(self) -> residual.MassiveRows | None:
        """The tokens that may hold some, or None."""
        number = int(self.number)
        if number == 0:
            return None
        median = magnitude_median(self.hidden, self.batch.mask)
        if number * FEW <= self.peak.numel():
            # Their number is known, so finding them waits for nothing.
            token = self.peak.flatten().topk(number, sorted=False).indices
        else:
            bound = residual.MASSIVE_RATIO * median[:, None]
            token = (self.peak > bound).flatten().nonzero().squeeze(1)
        return residual.MassiveRows.at(self.hidden, token, median)


def _together(layers: list[residual.MassiveRows], device: torch.device) -> residual.MassiveRows:
    """The rows of several layers as if layers were further prompts, in order."""
    prompts, length = len(layers[0].median), layers[0].length
    starts = range(0, len(layers) * prompts * length, prompts * length)
    token = [one.token.to(device) + start for one, start in zip(layers, starts, strict=True)]
    token, order = torch.cat(token).sort()
    state = torch.cat([one.state.to(device) for one in layers])[order]
    median = torch.cat([one.median.to(device) for one in layers])
    return residual.MassiveRows(token, state, median, length)


def _largest(
    found: residual.MassiveEntries, layer: Int[Tensor, "entry"], rows: Int[Tensor, "prompt"]
) -> dict[str, Tensor]:
    """At most `ENTRIES_KEPT` entries of each prompt in each layer."""
    by = _sorted(found.prompt, layer, found.value)
    group = found.prompt[by] * (int(layer.max()) + 1 if len(layer) else 1) + layer[by]
    rank = torch.arange(len(by)) - torch.searchsorted(group, group)
    by = by[rank < ENTRIES_KEPT]
    return {
        "prompt": rows[found.prompt[by]],
        "layer": layer[by],
        "position": found.position[by],
        "dim": found.dim[by],
        "value": found.value[by],
        "ratio": found.ratio[by],
    }


def _sorted(
    prompt: Int[Tensor, "entry"], layer: Int[Tensor, "entry"], value: Float[Tensor, "entry"]
) -> Int[Tensor, "entry"]:
    """Order by prompt, then layer, then falling size."""
    by = torch.argsort(value.abs(), descending=True, stable=True)
    for key in (layer, prompt):
        by = by[torch.argsort(key[by], stable=True)]
    return by
