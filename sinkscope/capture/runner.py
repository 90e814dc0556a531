"""Feeds a text to a model, batch by batch, under observers that reduce inside the hooks.

One forward pass a batch measures everything. The model comes out as it went in: hooks, training
flags and attention, also after an error or Ctrl-C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    Returns:
        The order in which prompts were folded, for `Observer.results`.

    Raises:
        ModelError: If not even one prompt at a time fits in memory, or what was found so far.
        TextError: If a prompt does not reach a position that an intervention in force changes.
    """
    refuse_short_prompts(model, texts.mask)
    device = input_device(model)
    order = batches.by_length(texts.mask)
    classes = batches.classes(texts.mask, length_class(model.original_model))
    size = batch if isinstance(batch, int) else _first_size(model, texts, path)
    listener = _Listener(observers)
    has_external_hooks = any(has_hooks(point) for point in model.hook_dict.values())
    done = 0
    with (
        torch.inference_mode(),
        evaluating(model),
        torch.autocast(device.type, enabled=False),  # the model as it is, reductions in fp32
        path.opened(),
        model.hooks(fwd_hooks=path.hooks(listener.wanted, listener.current, listener.emit)),
        tqdm(total=len(order), unit="prompt", disable=not progress, leave=False) as bar,
    ):
        while done < len(order):
            rows = next(batches.together(order[done:], classes, size))
            listener.batch = batches.cut(
                texts.tokens,
                texts.mask,
                sinks,
                rows,
                causal=causal,
                device=device,
                has_external_hooks=has_external_hooks,
            )
            try:
                forward(model, listener.batch)
                finished = listener.close()
            except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
                listener.drop()
                size = _smaller(len(rows), listener.batch, error)
                continue
            except BaseException:
                listener.drop()
                raise
            listener.add(finished)
            done += len(rows)
            bar.update(len(rows))
    return order


class _Listener:
    """Hands what a hook heard to the observers of that signal."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.batch: Batch | None = None
        self._observers = observers
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

    def add(self, finished: list[Any]) -> None:
        """Fold the batch in. A smaller batch would be no way out: some have folded it already."""
        try:
            for observer, found in zip(self._observers, finished, strict=True):
                observer.add(found, self.current())
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise ModelError(
                f"What was found so far no longer fits in the memory of "
                f"{self.current().tokens.device}; scan fewer prompts at a time and put the reports "
                "together, or ask for fewer metrics."
            ) from error

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
