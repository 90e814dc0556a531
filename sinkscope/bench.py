"""The cost of measuring, relative to a plain forward pass of transformers on the same machine.

Models have the shapes of real ones and random weights, since time depends almost only on shapes.
The exception is a massive activation at the first token, for which a scan does extra work in every
layer; the random weights therefore produce one too. A row is one configuration on one batch: the
baseline, which is the transformers model with sdpa attention and without TransformerLens; observers
on the eager bridge; or observers on the streaming path.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sinkscope.capture import paths, runner
from sinkscope.capture.observers import Observer, Scope, metrics
from sinkscope.capture.scan import Grams, choose_metrics
from sinkscope.devices import chosen_device, ran_out_of_memory
from sinkscope.errors import ModelError, SinkscopeError
from sinkscope.metrics.attention import bucket_edges
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.prompts.tokens import check_length, context_size, token_ids
from sinkscope.validation import whole_number

# -- the models of a benchmark: the baseline from transformers, and its bridge ---------------------

LLAMA = dict(vocab_size=128256, max_position_embeddings=2**18, num_key_value_heads=8)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(
        LLAMA,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        intermediate_size=8192,
    ),
    "llama-8b": dict(
        LLAMA,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
    ),
}
"""Shapes by name, as arguments of `LlamaConfig`."""

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes of random weights."""

FIRST_TOKEN, MASSIVE = 0, 1e4
"""Id of every prompt's first token, and the massive activation in its embedding."""


@dataclass
class Subject:
    """The model under test.

    Attributes:
        name: Name of the shape or model.
        bare: The baseline: the model without TransformerLens.
        context: Longest context in positions, or None where the config states none.
        load: Makes the bridge, after the baseline has been measured.
    """

    name: str
    bare: PreTrainedModel
    context: int | None
    load: Callable[[PreTrainedModel], Any]


def subject(
    shape: Any, device: str | torch.device | None, dtype: str | torch.dtype = "bfloat16"
) -> Subject:
    """Baseline and bridge for the name of a shape, or for anything that `load_model` accepts.

    Raises:
        SinkscopeError: If the dtype does not exist.
        ModelError: If the device is not available, or the model cannot be loaded, does not fit in
            memory, is spread over several devices, or is not a transformers model.
    """
    where, kind = chosen_device(device), chosen_dtype(dtype)
    if isinstance(shape, str) and shape in SHAPES:
        config = LlamaConfig(**SHAPES[shape], dtype=kind)
        bare = random_model(config, LlamaForCausalLM, where, shape)
        bare.model.embed_tokens.weight[FIRST_TOKEN, 0] = MASSIVE
        return Subject(shape, bare, config.max_position_embeddings, load_model)
    bridge = load_model(shape) if not isinstance(shape, str) else load_model(shape, device=where)
    original = bridge.original_model
    name = shape if isinstance(shape, str) else type(original).__name__
    if not isinstance(original, PreTrainedModel):
        raise ModelError(
            f"{name} is not a transformers model, so there is no baseline to compare it with; "
            f"choose one that is, or a shape: {', '.join(SHAPES)}."
        )
    places = sorted({str(weight.device) for weight in original.parameters()})
    if len(places) > 1:
        raise ModelError(
            f"{name} is spread over {', '.join(places)}, whereas its baseline would be on a single "
            "device; load it without device_map."
        )
    weight = next(original.parameters())
    config = copy.deepcopy(original.config)
    config.dtype = weight.dtype
    bare = random_model(config, type(original), weight.device, name)
    return Subject(name, bare, context_size(bridge), lambda _: bridge)


def random_model(config: Any, kind: type[PreTrainedModel], device: torch.device, name: str) -> Any:
    """A model with random weights on a device, with sdpa attention if its class supports it.

    Raises:
        ModelError: If it does not fit in the device's memory.
    """
    try:
        with torch.device(device):
            try:
                model = kind._from_config(config, attn_implementation="sdpa", dtype=config.dtype)
            except ValueError:  # softcaps and learned sinks have no sdpa attention in transformers
                model = kind._from_config(config, attn_implementation="eager", dtype=config.dtype)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise ModelError(f"The weights of {name} do not fit in the memory of {device}.") from error
    return model.eval().requires_grad_(False)


def chosen_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of random weights.

    Raises:
        SinkscopeError: If it is not in `DTYPES`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SinkscopeError(f"dtype is {name}; choose from {', '.join(DTYPES)}.")
    return getattr(torch, name)


SIZES = ((100, 64), (8, 1024), (1, 8192), (1, 32768))
"""Batches (prompts, length) that are measured by default."""

BARE = "transformers"
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "eager core": ("eager", ("core",)),
    "eager all": ("eager", ("all",)),
    "core": ("streaming", ("core",)),
    "core + received": ("streaming", ("core", "received")),
    "core + received + entropy": ("streaming", ("core", "received", "entropy")),
    "all": ("streaming", ("all",)),
}
"""The configurations compared with the baseline: attention path and metrics."""


@dataclass(frozen=True)
class BenchRow:
    """One configuration on one batch.

    Attributes:
        shape: Name of the shape or model.
        prompts: Prompts in the batch.
        length: Positions of a prompt.
        way: Configuration, see `WAYS`; "transformers" is the baseline.
        milliseconds: Median time of a batch.
        ratio: `milliseconds` divided by the baseline's.
        memory: Peak memory of a batch beyond what was allocated before it, results included [GiB];
            None on a CPU.
        tokens_per_second: Tokens per second.
        first_milliseconds: Time of the first batch, including one-off costs (compiling kernels).
        note: Why no time was measured, or None.
        own: Cost of one metric alone, in forward passes of the baseline; only with `by_metric`, and
            None for rows that are not a metric.
    """

    shape: str
    prompts: int
    length: int
    way: str
    milliseconds: float | None = None
    ratio: float | None = None
    memory: float | None = None
    tokens_per_second: float | None = None
    first_milliseconds: float | None = None
    note: str | None = None
    own: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as a dictionary for JSON."""
        return asdict(self)


def run_bench(
    shape: Any = "llama-1b",
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    ways: Sequence[str] = tuple(WAYS),
    by_metric: bool = False,
    repeats: int = 5,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
) -> Iterator[BenchRow]:
    """Time each configuration at each size, yielding each row as soon as it is measured.

    Args:
        shape: A name from `SHAPES`, or anything that `load_model` accepts; the baseline of the
            latter is a random model with the same config and dtype.
        sizes: Batches as (prompts, length).
        ways: Configurations: names from `WAYS`.
        by_metric: Measure, instead of `ways`, the cost of each metric alone: the ratio of `core`
            with it minus the ratio of `core` without it.
        repeats: Number of batches timed after the first; their median is reported.
        device: Device to run on; by default a GPU if there is one.
        dtype: Dtype of the weights of a named shape: float32, bfloat16, or float16.

    Yields:
        The baseline's row for every size, then the other rows, size by size.

    Raises:
        SinkscopeError: If a configuration or the dtype does not exist, or a size or `repeats` is
            not positive.
        TextError: If a prompt is longer than the model's context.
        ModelError: If the device is not available, or the model cannot be loaded, does not fit in
            memory, is spread over several devices, or is not a transformers model.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise SinkscopeError(
            f"There is no configuration {unknown[0]!r}; choose from {', '.join(WAYS)}."
        )
    if repeats < 1:
        raise SinkscopeError(f"repeats is {repeats}; expected 1 or more timed batches.")
    _check_sizes(sizes, None)  # before a large model is loaded
    what = subject(shape, device, dtype)
    _check_sizes(sizes, what.context)
    times: dict[tuple[int, int], float | None] = {}
    for size in sizes:
        row = _bare_row(what.name, what.bare, size, repeats)
        times[size] = row.milliseconds
        yield row
    name, bridge = what.name, what.load(what.bare)
    del what
    for size in sizes:
        if by_metric:
            yield from _rows_by_metric(name, bridge, size, repeats, times[size])
        else:
            for way in ways:
                yield _bridge_row(name, bridge, size, way, *WAYS[way], repeats, times[size])


def _rows_by_metric(
    name: str, bridge: Any, size: tuple[int, int], repeats: int, bare: float | None
) -> Iterator[BenchRow]:
    """`core`, `core` plus each other metric, `core` minus each of its own, then all metrics."""
    caps = capabilities(bridge)
    path = paths.choose(bridge, caps, "auto").name
    every = choose_metrics(("all",), caps, path)
    core = choose_metrics(("core",), caps, path)

    def row(way: str, *names: str) -> BenchRow:
        return _bridge_row(name, bridge, size, way, path, names, repeats, bare)

    def difference(larger: BenchRow, smaller: BenchRow) -> float | None:
        if larger.ratio is None or smaller.ratio is None:
            return None
        return larger.ratio - smaller.ratio

    yield (without := row("core", *core))
    for metric in every:
        if metric in core:
            one = row(f"core − {metric}", *(other for other in core if other != metric))
            yield replace(one, own=difference(without, one))
        else:
            one = row(f"core + {metric}", *core, metric)
            yield replace(one, own=difference(one, without))
    yield row("all", *every)


def _check_sizes(sizes: Sequence[tuple[int, int]], context: int | None) -> None:
    for prompts, length in sizes:
        if prompts < 1 or length < 1:
            raise SinkscopeError(
                f"A batch of {prompts} prompts of {length} tokens cannot be measured; both must be "
                "1 or more."
            )
        whole_number("the number of tokens of a batch", prompts * length, at_most=2**40)
        check_length(length, context)


def _bare_row(name: str, model: PreTrainedModel, size: tuple[int, int], repeats: int) -> BenchRow:
    tokens = _tokens(size, model.config.get_text_config().vocab_size)
    tokens = tokens.to(input_device(model))
    laps = _Laps(tokens.device)
    try:
        with torch.inference_mode(), laps:
            for _ in range(repeats + 1):
                model.base_model(input_ids=tokens, use_cache=False)
                laps.lap()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return BenchRow(name, *size, BARE, note="out of memory")
    return laps.row(name, size, BARE)


def _bridge_row(
    name: str,
    bridge: Any,
    size: tuple[int, int],
    way: str,
    where: str,
    wanted: tuple[str, ...],
    repeats: int,
    bare: float | None,
) -> BenchRow:
    prompts, length = size
    caps = capabilities(bridge)
    path = paths.choose(bridge, caps, where)
    names = choose_metrics(wanted, caps, path.name)
    scope = Scope(0.3, caps.n_heads, tuple(bucket_edges(length)), Grams(bridge))
    laps = _Laps(input_device(bridge))
    observers = [kind(scope) for metric in names for kind in metrics()[metric]]
    tokens = _tokens(size, bridge.cfg.d_vocab).repeat(repeats + 1, 1)
    texts = token_ids(tokens).tokenize(bridge).right_padded()
    sinks = torch.zeros_like(texts.mask)
    sinks[:, 0] = True
    try:
        with laps:
            runner.run(
                bridge,
                texts,
                sinks,
                [*observers, _Clock(scope, laps)],
                path,
                causal=caps.causal,
                batch=prompts,
                progress=False,
            )
    except (ModelError, RuntimeError) as error:
        if not ran_out_of_memory(error.__cause__ or error):
            raise
        return BenchRow(name, *size, way, note="out of memory")
    if laps.count != repeats + 1:
        return BenchRow(name, *size, way, note="out of memory; fits in smaller batches")
    return laps.row(name, size, way, bare)


def _tokens(size: tuple[int, int], vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(1000, vocabulary // 2), vocabulary, size, generator=generator)
    tokens[:, 0] = FIRST_TOKEN
    return tokens


class _Laps:
    """Times from the end of each batch to the end of the next, and peak memory in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        self._in_use = 0
        self._memory = 0

    @property
    def count(self) -> int:
        return len(self._marks) - 1

    def __enter__(self) -> _Laps:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            self._start_memory()
        self.lap()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _start_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._in_use = torch.cuda.memory_allocated(self._device)

    def lap(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        grown = torch.cuda.max_memory_allocated(self._device) - self._in_use
        self._memory = max(self._memory, grown)
        self._start_memory()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self._device))
        self._marks.append(mark)

    def row(
        self, name: str, size: tuple[int, int], way: str, bare: float | None = None
    ) -> BenchRow:
        first, *others = (
            self._between(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)
        )
        median = sorted(others)[len(others) // 2]
        bare = median if way == BARE else bare
        return BenchRow(
            shape=name,
            prompts=size[0],
            length=size[1],
            way=way,
            milliseconds=median,
            ratio=None if bare is None else median / bare,
            memory=self._memory / 2**30 if self._device.type == "cuda" else None,
            tokens_per_second=size[0] * size[1] / median * 1e3,
            first_milliseconds=first,
        )

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._device.type == "cuda" else 1e3 * (end - start)


class _Clock(Observer, reads="resid_post"):
    """An observer that records the time at which each batch ends."""

    def __init__(self, scope: Scope, laps: _Laps) -> None:
        super().__init__(scope)
        self._laps = laps

    def observe(self, x: Tensor, batch: Any) -> None:
        pass

    def close(self, batch: Any) -> dict[str, Tensor]:
        self._laps.lap()
        return {}
