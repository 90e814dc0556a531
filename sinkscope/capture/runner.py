"""Runs a text through a model in batches, with observers that reduce activations inside hooks.

Everything is measured in one forward pass per batch. Hooks, training flags and attention of the
model are restored afterwards, also after an error or Ctrl-C. Batches may be divided between copies
of the model on several devices (`sinkscope.capture.replicas`).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.attention.hooks import has_hooks
from sinkscope.capture import batches
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Observer
from sinkscope.capture.paths import Path, Wanted
from sinkscope.capture.replicas import Batches, InOrder, Share, Stopped, side_by_side
from sinkscope.devices import exclusive, ran_out_of_memory, trim
from sinkscope.errors import ModelError
from sinkscope.models import probe
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.probe import input_device
from sinkscope.models.rope import length_class
from sinkscope.prompts.tokens import Texts

_TOKENS_A_BATCH = {"cuda": 2**16, "cpu": 2**12}
_PATTERN_BYTES = 2**30
"""Initial batch size with "auto": tokens that fill a device, and memory for an eager pattern."""
_LARGE = 2**11
"""Tokens of a batch on a CPU above which freed memory is returned to the system (`trim`)."""


@dataclass(frozen=True)
class Replica:
    """A copy of the model that takes a share of the batches.

    Attributes:
        model: A bridge on another device, or with its own copy of the weights on the same device.
        path: The attention path.
        observers: New instances of the model's observers.
    """

    model: Any
    path: Path
    observers: Sequence[Observer]


def run(
    model: Any,
    texts: Texts,
    sinks: Bool[Tensor, "prompt position"],
    observers: Sequence[Observer],
    path: Path,
    *,
    causal: bool,
    batch: int | str = "auto",
    progress: bool = True,
    others: Sequence[Replica] = (),
) -> Int[Tensor, "prompt"]:
    """Run every prompt once, with observers that accumulate their measurements.

    Args:
        model: A bridge.
        texts: Right-padded prompts.
        sinks: Sink positions of each prompt.
        observers: The observers.
        path: The attention path.
        causal: Whether attention is causal.
        batch: Prompts per forward pass, or "auto".
        progress: Whether to draw a progress bar.
        others: Replicas, each in its own thread. Their measurements are accumulated in `observers`
            as well.

    Returns:
        The order in which prompts were accumulated, for `Observer.results`.

    Raises:
        ModelError: If a single prompt, or the accumulated results, do not fit in memory.
        TextError: If a prompt does not reach a position edited by an active intervention.
    """
    refuse_short_prompts(model, texts.mask)
    home = input_device(model)
    order = batches.by_length(texts.mask)
    classes = batches.classes(texts.mask, length_class(model.original_model))
    teams = [Replica(model, path, observers), *others]
    left = Batches(order, classes, _sizes(batch, teams, texts))
    stop = threading.Event()
    with (
        torch.inference_mode(),
        tqdm(total=len(order), unit="prompt", disable=not progress, leave=False) as bar,
        ExitStack() as opened,  # all in this thread, so that contexts are exited in reverse order
    ):

        def fold(one: _Finished) -> None:
            one.fold(observers, home)
            bar.update(len(one.batch.rows))

        folded = InOrder(fold)
        workers = []
        for team in teams:
            worker = _Worker(team, left, folded, stop)
            opened.enter_context(evaluating(team.model))
            opened.enter_context(worker.listening())
            workers.append(worker)

        def cut(rows: Int[Tensor, "row"], worker: _Worker) -> Batch:
            return batches.cut(
                texts.tokens,
                texts.mask,
                sinks,
                rows,
                causal=causal,
                device=worker.device,
                has_external_hooks=worker.has_external_hooks,
            )

        first = left.next()  # always for the model itself
        works: list[Callable[[], None]] = [lambda: workers[0].work(cut, first)]
        works += [lambda worker=worker: worker.work(cut) for worker in workers[1:]]
        side_by_side(works, stop)
    return order


class _Worker:
    """A model that runs batches until the queue is empty."""

    def __init__(
        self, team: Replica, left: Batches, folded: InOrder[_Finished], stop: threading.Event
    ) -> None:
        self._team = team
        self._left = left
        self._folded = folded
        self._listener = _Listener(team.observers, stop)
        self._stop = stop
        self.device = input_device(team.model)
        self.has_external_hooks = any(map(has_hooks, team.model.hook_dict.values()))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context with the path and the observers' hooks on the model."""
        path, listener = self._team.path, self._listener
        with path.opened():
            hooks = path.hooks(listener.wanted, listener.current, listener.emit)
            with self._team.model.hooks(fwd_hooks=hooks):
                yield

    def work(self, cut: Callable[..., Batch], first: Share | None = None) -> None:
        """Run batches with autocast disabled, so that reductions are in fp32."""
        listener = self._listener
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
            _current(self.device),
        ):
            while not self._stop.is_set() and (share := first or self._left.next()) is not None:
                first = None
                listener.batch = cut(share.rows, self)
                try:
                    forward(self._team.model, listener.batch)
                    finished = listener.close()
                except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
                    listener.drop()
                    size = _smaller(len(share.rows), listener.batch, error)
                    self._left.put_back(share, most=size)
                    continue
                except BaseException:
                    listener.drop()
                    raise
                done = _Finished(finished, listener.batch, self._team.observers)
                self._folded.add(share, done)
            for observer in self._team.observers:
                observer.conclude()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU this thread's current device within the context."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class _Finished:
    """Results of a batch that have not been accumulated yet.

    Attributes:
        found: The result of each observer's `close`.
        batch: The batch.
        heard_by: The observers that measured it.
    """

    found: list[Any]
    batch: Batch
    heard_by: Sequence[Observer]

    def fold(self, observers: Sequence[Observer], home: torch.device) -> None:
        """Accumulate the batch. There is no retry, as some observers may have accumulated it."""
        try:
            batch = self.batch.on(home)
            for observer, twin, found in zip(observers, self.heard_by, self.found, strict=True):
                observer.follow(twin)
                observer.add(_moved(found, home), batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise ModelError(
                f"The results so far no longer fit in the memory of {home}; scan fewer prompts "
                "at a time and merge the reports, or measure fewer metrics."
            ) from error


def _moved(found: Any, device: torch.device) -> Any:
    """Move fields to another device; other results of observers are unchanged."""
    if not isinstance(found, dict):
        return found
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}


class _Listener:
    """Passes the signals from hooks to their observers."""

    def __init__(self, observers: Sequence[Observer], stop: threading.Event) -> None:
        self.batch: Batch | None = None
        self._observers = observers
        self._stop = stop
        self._layer = -1
        self._by_signal: dict[str, list[Observer]] = defaultdict(list)
        for observer in observers:
            self._by_signal[observer.signal].append(observer)

    @property
    def wanted(self) -> Wanted:
        statistics = frozenset().union(*(observer.statistics for observer in self._observers))
        return Wanted(frozenset(self._by_signal), statistics)

    def current(self) -> Batch:
        assert self.batch is not None, "a hook fired outside a batch"
        return self.batch

    def emit(self, signal: str, layer: int, x: Any) -> None:
        if self._stop.is_set():
            raise Stopped
        if layer != self._layer:
            self._layer = layer
            self._hand_back()
        device = x.device if isinstance(x, Tensor) else x.batch.tokens.device
        for observer in self._by_signal[signal]:
            observer.hear(layer, x, self.current().on(device))

    def _hand_back(self) -> None:
        """Return freed memory between layers, as results are allocated between activations."""
        tokens = self.current().tokens
        if tokens.device.type == "cpu" and tokens.numel() >= _LARGE:
            trim()

    def close(self) -> list[Any]:
        """Each observer's result for the batch, without accumulating it."""
        return [observer.close(self.current()) for observer in self._observers]

    def drop(self) -> None:
        for observer in self._observers:
            observer.drop()


def forward(model: Any, batch: Batch) -> None:
    """One pass through the blocks, without the unembedding if the model allows it.

    Logits are the largest tensor of a long forward pass, and no metric reads them. Causal models
    need no mask for right padding and use their fastest kernel.
    """
    mask = batch.mask.long() if batch.ragged and not batch.causal else None
    backbone = getattr(model.original_model, "base_model", None)
    if backbone is None:
        model(batch.tokens, return_type=None)
    else:
        backbone(input_ids=batch.tokens, attention_mask=mask, use_cache=False)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode within the context, for one thread at a time, and restore all flags."""
    with exclusive(model), probe.evaluating(model.original_model):
        yield


def _sizes(batch: int | str, teams: Sequence[Replica], texts: Texts) -> Callable[[int], int]:
    """Maximum size of a batch that begins with a given prompt, which is its longest.

    With "auto", a batch has at most each replica's share of all tokens.
    """
    if isinstance(batch, int):
        return lambda prompt: batch
    size = min(_first_size(team.model, texts, team.path) for team in teams)
    lengths = texts.mask.sum(dim=1).tolist()
    share = -(-sum(lengths) // len(teams))
    if len(teams) == 1:
        return lambda prompt: size
    return lambda prompt: min(size, max(1, share // lengths[prompt]))


def _first_size(model: Any, texts: Texts, path: Path) -> int:
    """Size of the first batch, which about fills the device."""
    length = texts.mask.shape[1]
    size = _TOKENS_A_BATCH.get(input_device(model).type, 2**12) // length
    if path.name == "eager":
        # Scores, pattern and its fp32 copy are in memory at the same time in one layer.
        size = min(size, _PATTERN_BYTES // (12 * model.cfg.n_heads * length**2))
    return max(1, size)


def _smaller(size: int, batch: Batch, error: RuntimeError) -> int:
    """Half of the batch size after an out-of-memory error; other errors are re-raised."""
    if not ran_out_of_memory(error):
        raise error
    if size == 1:
        raise ModelError(
            f"One prompt of {batch.length} positions does not fit in the memory of "
            f'{batch.tokens.device}; use shorter texts, attention="streaming", metrics="core", '
            "or a device with more memory."
        ) from error
    if batch.tokens.is_cuda:
        torch.cuda.empty_cache()
    return size // 2
