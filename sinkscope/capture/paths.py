"""The two attention paths: eager, with every pattern materialised, and streaming.

A path hooks the relevant hook points and converts their activations into signals: plain activations
by name, and one "attention" signal per layer with an `AttentionReader`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sinkscope.attention.streaming import Stream, streaming
from sinkscope.attention.support import attention_of, entering
from sinkscope.capture.batches import Batch
from sinkscope.capture.readers import GatedAttention, GatedValue, PatternReader, StreamReader
from sinkscope.errors import UnsupportedError
from sinkscope.metrics.gates import factors
from sinkscope.models.bridging import proof_of
from sinkscope.models.capabilities import Capabilities
from sinkscope.validation import shown

Emit = Callable[[str, int, Any], None]
Hooks = list[tuple[str, Callable[..., None]]]


@dataclass(frozen=True)
class Wanted:
    """Signals and statistics read by the observers of a scan.

    Attributes:
        signals: "attention", and names of activations.
        statistics: Statistics read from an attention reader that can share a pass with others.
    """

    signals: frozenset[str]
    statistics: frozenset[str]


@runtime_checkable
class Path(Protocol):
    """Interface of an attention path."""

    name: str

    def opened(self) -> AbstractContextManager[Any]:
        """Context in which the model must run."""
        ...

    def hooks(self, wanted: Wanted, batch: Callable[[], Batch], emit: Emit) -> Hooks:
        """Hooks that emit every wanted signal of every layer; `batch` returns the current batch."""
        ...


class _LayerInputs:
    """Tensors of a layer for its reader, collected until the last of them has fired.

    They are stored in the batch's cache and freed with it, so that after an out-of-memory error no
    scores of the failed batch remain.
    """

    def __init__(self, batch: Callable[[], Batch]) -> None:
        self._batch = batch

    def hold(self, layer: int, name: str, x: Tensor) -> None:
        self._of(layer)[name] = x

    def take(self, layer: int) -> dict[str, Tensor]:
        tensors = dict(self._of(layer))
        self._of(layer).clear()
        return tensors

    def _of(self, layer: int) -> dict[str, Tensor]:
        return self._batch().once(("inputs of a reader", layer), dict)


_PAIRS: dict[str, tuple[str, type]] = {
    "gated_attention": ("attention", GatedAttention),
    "gated_value": ("value", GatedValue),
}
"""Signals composed of another one and its gate."""


class _Gated:
    """Emits signals, combining gated ones with their gate.

    Depending on the model, a layer's gate fires before or after the other signal; the first of the
    two is stored in the batch, as in `_LayerInputs`.

    Attributes:
        signals: The signals that have to fire for the wanted ones.
    """

    def __init__(
        self, caps: Capabilities, wanted: Wanted, batch: Callable[[], Batch], emit: Emit
    ) -> None:
        self._caps, self._batch, self._emit = caps, batch, emit
        self._wanted = wanted.signals - _PAIRS.keys()
        self._pairs = wanted.signals & _PAIRS.keys()
        self._gate = caps.gate is not None
        parts = {_PAIRS[pair][0] for pair in self._pairs}
        gate = {"gate"} if self._pairs and self._gate else set()
        self.signals = frozenset(self._wanted | parts | gate)

    def emit(self, signal: str, layer: int, x: Any) -> None:
        """Receive a signal, and emit all that are complete."""
        if signal == "gate":
            assert self._caps.gate is not None, "the model has no verified gate"
            x = factors(x, self._caps.gate, self._caps.n_heads)
        if signal in self._wanted:
            self._emit(signal, layer, x)
        for pair in self._pairs:
            part, kind = _PAIRS[pair]
            if signal not in (part, "gate"):
                continue
            tensors = self._batch().once(("gated", pair, layer), dict)
            tensors[signal] = x
            if part in tensors and (not self._gate or "gate" in tensors):
                gate, other = tensors.pop("gate", None), tensors.pop(part)
                on = other.device if isinstance(other, Tensor) else other.batch.tokens.device
                whole = kind(self._batch().on(on), other, gate)
                self._emit(pair, layer, whole)


def _pattern_hook(
    layer: int, inputs: _LayerInputs, window: int | None, batch: Callable[[], Batch], emit: Emit
) -> Callable[..., None]:
    """A hook that emits a layer's attention when its pattern fires."""

    def hook_fn(x: Tensor, hook: object) -> None:
        tensors = inputs.take(layer)
        reader = PatternReader(batch=batch().on(x.device), pattern=x, window=window, **tensors)
        emit("attention", layer, reader)

    return hook_fn


class EagerPath:
    """The unmodified bridge, in which every layer materialises its pattern."""

    name = "eager"

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Refuse edits of patterns that have no effect on the model's output.

        TransformerLens warns about them: hooks run after transformers' module used the pattern.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*this attention delegates", UserWarning)
            try:
                yield
            except UserWarning as warning:
                raise UnsupportedError(
                    f"Eager attention of {self._capabilities.architecture} ignores edits of "
                    "hook_attn_scores and hook_pattern, so a scan there would not measure what the "
                    'model does; use attention="streaming" where the model has it.'
                ) from warning

    def hooks(self, wanted: Wanted, batch: Callable[[], Batch], emit: Emit) -> Hooks:
        """A reader is complete when a layer's pattern fires, after all of its other inputs."""
        inputs = _LayerInputs(batch)
        gated = _Gated(self._capabilities, wanted, batch, emit)
        caps, signals, emit = self._capabilities, gated.signals, gated.emit
        tensors = {name for name in ("scores", "query", "key", "value") if name in caps.signals}
        tensors = tensors if "attention" in signals else set()

        def heard(layer: int, signal: str) -> Callable[..., None]:
            def hook_fn(x: Tensor, hook: object) -> None:
                if signal in tensors:
                    inputs.hold(layer, signal, x)
                if signal in signals:
                    emit(signal, layer, x)

            return hook_fn

        hooks_of_layers: Hooks = []
        for signal in sorted((signals | tensors) - {"attention"}):
            for layer in caps.layers(signal):
                hooks_of_layers.append((caps.hook(signal, layer), heard(layer, signal)))
        if "attention" in signals:
            for layer in caps.attending:
                hook = _pattern_hook(layer, inputs, caps.windows[layer], batch, emit)
                hooks_of_layers.append((caps.hook("pattern", layer), hook))
        return hooks_of_layers


class StreamingPath:
    """Fused attention, from which queries, keys, values and log-sum-exps are read."""

    name = "streaming"

    def __init__(self, model: Any, capabilities: Capabilities) -> None:
        self._model = model
        self._capabilities = capabilities
        self._stream: Stream | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Enable streaming attention within the context; the bridge is restored afterwards."""
        with streaming(self._model) as stream:
            self._stream = stream
            try:
                yield
            finally:
                self._stream = None

    def hooks(self, wanted: Wanted, batch: Callable[[], Batch], emit: Emit) -> Hooks:
        """A reader is complete when a layer's log-sum-exp fires, the last of its four tensors.

        If scores or pattern of a layer have other hooks, both are materialised and may be edited;
        attention is then read from the pattern instead of queries and keys.
        """
        assert self._stream is not None, "the path is not open"
        inputs, calls = _LayerInputs(batch), self._stream.calls
        gated = _Gated(self._capabilities, wanted, batch, emit)
        caps, signals, emit = self._capabilities, gated.signals, gated.emit
        names = ("query", "key", "value")
        points = {at: entering(attn) for at, attn in attention_of(self._model).items()}

        def holding(layer: int, signal: str) -> Callable[..., None]:
            def hook_fn(x: Tensor, hook: object) -> None:
                if "attention" in signals:
                    inputs.hold(layer, signal, x)
                if signal in signals:
                    emit(signal, layer, x)

            return hook_fn

        def ready(layer: int) -> Callable[..., None]:
            def hook_fn(x: Tensor, hook: object) -> None:
                reader = StreamReader(
                    batch=batch().on(x.device),
                    lse=x,
                    call=calls[layer],
                    window=caps.windows[layer],
                    statistics=wanted.statistics,
                    **inputs.take(layer),
                )
                emit("attention", layer, reader)

            return hook_fn

        def passing(layer: int, signal: str) -> Callable[..., None]:
            return lambda x, hook: emit(signal, layer, x)

        hooks_of_layers: Hooks = []
        for layer in caps.attending:
            block = f"blocks.{layer}.attn"
            for signal, hook in zip(names, points[layer], strict=True):
                if "attention" in signals or signal in signals:
                    hooks_of_layers.append((f"{block}.{hook}", holding(layer, signal)))
            materialised = self._stream.materialises(layer) or bool(signals & {"pattern", "scores"})
            if "scores" in signals or ("attention" in signals and materialised):
                hooks_of_layers.append((f"{block}.hook_attn_scores", holding(layer, "scores")))
            if "pattern" in signals:
                hooks_of_layers.append((f"{block}.hook_pattern", passing(layer, "pattern")))
            if "attention" in signals and materialised:
                hook = _pattern_hook(layer, inputs, caps.windows[layer], batch, emit)
                hooks_of_layers.append((f"{block}.hook_pattern", hook))
            elif "attention" in signals:
                hooks_of_layers.append((f"{block}.hook_lse", ready(layer)))
        for signal in sorted(signals - {"attention", "pattern", "scores", *names}):
            for layer in caps.layers(signal):
                hooks_of_layers.append((caps.hook(signal, layer), passing(layer, signal)))
        return hooks_of_layers


def check_way(attention: Any) -> None:
    """Refuse what is no way of reading attention.

    Raises:
        UnsupportedError: If it is unknown.
    """
    if attention not in ("auto", "streaming", "eager"):
        raise UnsupportedError(
            f'attention is {shown(attention)}; choose "auto", "streaming" or "eager".'
        )


def choose(model: Any, capabilities: Capabilities, attention: str) -> Path:
    """The requested attention path; "auto" streams wherever that is exact.

    Raises:
        UnsupportedError: If it is unknown, or cannot be exact for this model.
    """
    check_way(attention)
    if attention == "eager":
        return _eager(capabilities)
    if (differs := proof_of(model).streaming) is not None:
        if attention == "auto":
            return _eager(capabilities)
        raise UnsupportedError(
            f"Streaming attention cannot be exact for {capabilities.architecture}: {differs}."
        )
    try:
        attention_of(model)  # the checks of `streaming` at a tenth of its cost
    except UnsupportedError:
        if attention == "streaming":
            raise
        return _eager(capabilities)
    return StreamingPath(model, capabilities)


def _eager(capabilities: Capabilities) -> EagerPath:
    """The eager path, unless the bridge deviates from its model on it."""
    if capabilities.stock_differs is not None:
        raise UnsupportedError(
            f"Eager attention cannot be exact for {capabilities.architecture}: "
            f"{capabilities.stock_differs}."
        )
    return EagerPath(capabilities)
