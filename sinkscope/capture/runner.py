"""Feeds a text to a model, batch by batch, under observers that reduce inside the hooks.

One forward pass a batch measures everything. The model comes out as it went in: hooks, training
flags and attention, also after an error or Ctrl-C. Copies of the model on other devices may take a
share of the batches (`sinkscope.capture.replicas`).
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
from sinkscope.models.rope import length_class
from sinkscope.prompts.tokens import Texts

_TOKENS_A_BATCH = {"cuda": 2**16, "cpu": 2**12}
_PATTERN_BYTES = 2**30
"""Where "auto" starts: tokens that fill a device, and room for one layer's eager pattern."""
_LARGE = 2**11
"""Tokens of a batch on a CPU from which the C library's holes are worth returning (`trim`)."""


@dataclass(frozen=True)
class Replica:
    """A copy of the model that takes a share of the batches.

    Attributes:
        model: A bridge on another device, or with weights of its own on the same.
        path: How its attention is read.
        observers: The same as those of the model, made anew.
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
    """Run every prompt once and let the observers fold what they see.

    Args:
        model: A bridge.
        texts: Right-padded prompts.
        sinks: Sink positions of each prompt.
        observers: What to measure.
        path: How attention is read.
        causal: Whether attention is.
        batch: Prompts a forward pass, or "auto".
        progress: Whether to draw a progress bar.
        others: Replicas, each of which runs in a thread of its own. What they measure is folded by
            `observers` too.

    Returns:
        The order in which prompts were folded, for `Observer.results`.

    Raises:
        ModelError: If not even one prompt at a time fits in memory, or what was found so far.
        TextError: If a prompt does not reach a position that an intervention in force changes.
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
        ExitStack() as opened,  # all in this thread, since it ends what it began in reverse order
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

        first = left.next()  # always the model's own
        works: list[Callable[[], None]] = [lambda: workers[0].work(cut, first)]
        works += [lambda worker=worker: worker.work(cut) for worker in workers[1:]]
        side_by_side(works, stop)
    return order


class _Worker:
    """One model that runs batches until none is left."""

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
        """Inside, attention is read in the path's way and the observers hear the model."""
        path, listener = self._team.path, self._listener
        with path.opened():
            hooks = path.hooks(listener.wanted, listener.current, listener.emit)
            with self._team.model.hooks(fwd_hooks=hooks):
                yield

    def work(self, cut: Callable[..., Batch], first: Share | None = None) -> None:
        """Run batches, the model as it is, reductions in fp32."""
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
    """Inside, a GPU is this thread's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class _Finished:
    """What a batch came to; nothing is folded in yet.

    Attributes:
        found: What each observer's `close` gave.
        batch: The batch.
        heard_by: The observers that gave it.
    """

    found: list[Any]
    batch: Batch
    heard_by: Sequence[Observer]

    def fold(self, observers: Sequence[Observer], home: torch.device) -> None:
        """Fold the batch in. A smaller batch would be no way out: some have folded it already."""
        try:
            batch = self.batch.on(home)
            for observer, twin, found in zip(observers, self.heard_by, self.found, strict=True):
                observer.follow(twin)
                observer.add(_moved(found, home), batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise ModelError(
                f"What was found so far no longer fits in the memory of {home}; scan fewer prompts "
                "at a time and put the reports together, or ask for fewer metrics."
            ) from error


def _moved(found: Any, device: torch.device) -> Any:
    """Fields on another device; what else an observer gave knows where it lies."""
    if not isinstance(found, dict):
        return found
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}


class _Listener:
    """Hands what a hook heard to the observers of that signal."""

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
        """Return memory between layers: what is kept of a layer lies between freed activations."""
        tokens = self.current().tokens
        if tokens.device.type == "cpu" and tokens.numel() >= _LARGE:
            trim()

    def close(self) -> list[Any]:
        """What every observer makes of the batch; nothing is folded in yet."""
        return [observer.close(self.current()) for observer in self._observers]

    def drop(self) -> None:
        for observer in self._observers:
            observer.drop()


def forward(model: Any, batch: Batch) -> None:
    """One pass through the blocks; without the unembedding where the model can do without.

    Logits over a vocabulary are the largest tensor of a long forward pass and no metric reads
    them. A causal model needs no mask for right padding, and so keeps its fastest kernel.
    """
    mask = batch.mask.long() if batch.ragged and not batch.causal else None
    backbone = getattr(model.original_model, "base_model", None)
    if backbone is None:
        model(batch.tokens, return_type=None)
    else:
        backbone(input_ids=batch.tokens, attention_mask=mask, use_cache=False)


def input_device(model: Any) -> torch.device:
    """Where the embedding lies; the later layers may lie elsewhere."""
    return next(model.original_model.parameters()).device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, for this thread alone, inside; every module's own training flag outside."""
    with exclusive(model), probe.evaluating(model.original_model):
        yield


def _sizes(batch: int | str, teams: Sequence[Replica], texts: Texts) -> Callable[[int], int]:
    """The most prompts of a batch that begins with a given prompt, which is its longest.

    "auto" lets a batch hold no more than each replica's share of all tokens.
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
    """Prompts of the first batch: about what fills the device."""
    length = texts.mask.shape[1]
    size = _TOKENS_A_BATCH.get(input_device(model).type, 2**12) // length
    if path.name == "eager":
        # Scores, pattern and its fp32 copy live at once in one layer.
        size = min(size, _PATTERN_BYTES // (12 * model.cfg.n_heads * length**2))
    return max(1, size)


def _smaller(size: int, batch: Batch, error: RuntimeError) -> int:
    """Half the batch after running out of memory; any other error goes on up."""
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
