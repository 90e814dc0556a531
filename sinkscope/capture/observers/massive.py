"""The observer of massive activations."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Observer, Scope
from sinkscope.capture.observers.residual import median_magnitude, token_summary
from sinkscope.devices import HostNumber
from sinkscope.metrics import residual
from sinkscope.report.fields import MassiveActivations

LATE_LOOK = 2**25
"""Limit on the entries of hidden states kept alive until they have been checked."""

FEW = 16
"""Candidate tokens count as few if they are at most one in this many."""

UNREAD = 2**24
"""Limit on the entries of rows that stay on the device before they are read."""

ENTRIES_KEPT = 64
"""Massive activations stored per prompt and layer, largest first; `count` counts all."""


class Massive(Observer, metric="massive", reads="resid_post", core=True):
    """Massive activations, stored as a list of entries.

    The number of candidates in a layer is available on the host only after the device has computed
    it. It is therefore read a layer or two later, possibly in the next batch, so that the device
    does not idle. With replicas, an observer may read the pending counts of another replica's
    observer from its own thread, so these are guarded by a lock.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.guard = threading.RLock()
        self._asked: list[_Asked] = []
        self._running: _Rows = {}
        self._unread: list[_Unread] = []
        self._entries: list[_Entries] = []
        self._counts: list[Int[np.ndarray, "prompt layer"]] = []

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """Count the tokens above the absolute threshold of Sun et al., asynchronously."""
        summary = token_summary(self.layer, x, batch)
        if summary is None:
            peak = residual.token_peaks(x, batch.mask)
        else:
            peak = torch.where(batch.mask, summary.peak, 0) if batch.ragged else summary.peak
        number = HostNumber((peak > residual.MASSIVE_MINIMUM).sum())
        with self.guard:
            self._asked.append(_Asked(self.layer, x, peak, number, batch, self._running))
        self.look(but_the_last=0 if batch.has_external_hooks else _late(x))

    def look(self, but_the_last: int = 0) -> None:
        """Take the answers that were asked for, but for the last ones."""
        with self.guard:
            while len(self._asked) > but_the_last:
                asked = self._asked[0]
                asked.into[asked.layer] = asked.rows()  # kept if memory runs out here
                self._asked.pop(0)

    def close(self, batch: Batch) -> _Unread:
        """The rows of all layers, still on the device; the last layers are not checked yet.

        Reading them synchronises with the device and is done rarely.
        """
        if sum(unread.size for unread in self._unread) > UNREAD:
            self._read()
        finished = _Unread(self, self._running, batch.rows.numpy(), batch.tokens.device)
        self._running = {}
        return finished

    def add(self, finished: _Unread, batch: Batch) -> None:
        """Store the rows of one batch."""
        self._unread.append(finished)

    def _read(self) -> None:
        while self._unread:
            self._unread[0].observer.look()
            entries, counts = self._unread[0].read()  # kept if memory runs out here
            self._entries.append(entries)
            self._counts.append(counts)
            self._unread.pop(0)

    def drop(self) -> None:
        """Discard the current batch."""
        with self.guard:
            self._asked = [asked for asked in self._asked if asked.into is not self._running]
        self._running = {}

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """Entries by prompt, layer and size."""
        self._read()
        entries = _Entries(*map(np.concatenate, zip(*self._entries, strict=True)))
        entries = entries.take(entries.order())
        counts = np.concatenate(self._counts)[np.argsort(order.numpy())]
        found = {name: torch.from_numpy(x) for name, x in entries._asdict().items()}
        return {"massive": MassiveActivations(**found, count=torch.from_numpy(counts))}


def _late(x: Float[Tensor, "prompt position dim"]) -> int:
    """Number of hidden states that may remain unchecked; 0 on a CPU, which is synchronous."""
    return LATE_LOOK // x.numel() if x.is_cuda else 0


_Rows = dict[int, residual.MassiveRows | None]
"""Rows of a batch by layer."""


class _Asked(NamedTuple):
    """A hidden state that has not been checked for massive activations yet."""

    layer: int
    hidden: Float[Tensor, "prompt position dim"]
    peak: Float[Tensor, "prompt position"]
    number: HostNumber
    batch: Batch
    into: _Rows

    def rows(self) -> residual.MassiveRows | None:
        """The rows of candidate tokens, or None."""
        number = int(self.number)
        if number == 0:
            return None
        median = median_magnitude(self.layer, self.hidden, self.batch)
        if number * FEW <= self.peak.numel():
            # As their number is known, topk needs no synchronisation.
            token = self.peak.flatten().topk(number, sorted=False).indices
        else:
            bound = residual.MASSIVE_RATIO * median[:, None]
            token = (self.peak > bound).flatten().nonzero().squeeze(1)
        return residual.MassiveRows.at(self.hidden, token, median)


def _together(layers: list[residual.MassiveRows], device: torch.device) -> residual.MassiveRows:
    """Concatenate the rows of several layers, treating layers as further prompts."""
    prompts, length = len(layers[0].median), layers[0].length
    starts = range(0, len(layers) * prompts * length, prompts * length)
    token = [one.token.to(device) + start for one, start in zip(layers, starts, strict=True)]
    token, order = torch.cat(token).sort()
    state = torch.cat([one.state.to(device) for one in layers])[order]
    median = torch.cat([one.median.to(device) for one in layers])
    return residual.MassiveRows(token, state, median, length)


class _Unread(NamedTuple):
    """Rows of a batch that are still on the device.

    Attributes:
        observer: The observer that recorded them.
        running: The rows by layer; complete once all layers have been checked.
        prompts: Indices of the batch's prompts in the text.
        device: Device on which to concatenate the layers.
    """

    observer: Massive
    running: _Rows
    prompts: Int[np.ndarray, "prompt"]
    device: torch.device

    @property
    def size(self) -> int:
        """Total number of entries of the rows."""
        with self.observer.guard:
            rows = list(self.running.values())
        return sum(each.state.numel() for each in rows if each is not None)

    def read(self) -> tuple[_Entries, Int[np.ndarray, "prompt layer"]]:
        """Renumber the prompts as in the text, keep the largest entries and count all."""
        columns = sorted(self.running)
        counts = np.zeros((len(self.prompts), len(columns)), dtype=np.int64)
        layers = [layer for layer in columns if self.running[layer] is not None]
        if not layers:
            none = np.zeros(0, dtype=np.int64)
            return _Entries(none, none, none, none, *[np.zeros(0, dtype=np.float32)] * 2), counts
        together = _together([self.running[layer] for layer in layers], self.device)
        row, position, dim, value, ratio = (x.cpu().numpy() for x in together.entries())
        layer = np.array(layers)[row // len(self.prompts)]
        prompt = row % len(self.prompts)
        np.add.at(counts, (prompt, np.searchsorted(columns, layer)), 1)
        entries = _Entries(self.prompts[prompt], layer, position, dim, value, ratio)
        return entries.take(entries.order(most=ENTRIES_KEPT)), counts


class _Entries(NamedTuple):
    """Massive activations as numpy arrays, since torch's thread pool is slow for a few numbers."""

    prompt: Int[np.ndarray, "entry"]
    layer: Int[np.ndarray, "entry"]
    position: Int[np.ndarray, "entry"]
    dim: Int[np.ndarray, "entry"]
    value: Float[np.ndarray, "entry"]
    ratio: Float[np.ndarray, "entry"]

    def order(self, most: int | None = None) -> Int[np.ndarray, "entry"]:
        """Sort by prompt, layer and descending size, with at most `most` per prompt and layer."""
        by = np.lexsort((-np.abs(self.value), self.layer, self.prompt))
        if most is None:
            return by
        prompt, layer = self.prompt[by], self.layer[by]
        first = np.ones(len(by), dtype=bool)
        first[1:] = (prompt[1:] != prompt[:-1]) | (layer[1:] != layer[:-1])
        starts = np.flatnonzero(first)
        rank = np.arange(len(by)) - np.repeat(starts, np.diff(np.append(starts, len(by))))
        return by[rank < most]

    def take(self, index: Int[np.ndarray, "chosen"]) -> _Entries:
        """Select entries."""
        return _Entries(*(x[index] for x in self))
