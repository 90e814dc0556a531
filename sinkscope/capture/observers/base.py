"""Metrics: observers that read one signal of every layer and measure fields of a report.

`Observer` is the base class of the metrics of this package and of user-defined ones; naming a
metric in a class statement registers it. `metrics` lists the registered metrics, and `unavailable`
those that cannot be measured on a model.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture.accumulators import Accumulator, OverPrompts, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.errors import ReportError, UnsupportedError
from sinkscope.models.capabilities import Capabilities
from sinkscope.report.labelled import Variable
from sinkscope.report.report import SinkReport

SIGNALS: Mapping[str, str] = {
    "attention": "an AttentionReader, which gives statistics of attention on either path",
    "pattern": "prompt head query key",
    "scores": "prompt head query key",
    "query": "prompt position head d_head",
    "key": "prompt position kv_head d_head",
    "value": "prompt position kv_head d_head",
    "z": "prompt position head d_head",
    "gate": "prompt position head d_gate",
    "gated_attention": "a GatedAttention: an AttentionReader, and the gate's factors",
    "gated_value": "a GatedValue: values, and the gate's factors or None without a gate",
    "latent": "prompt position latent_dim",
    "normed_latent": "prompt position latent_dim",
    "attn_out": "prompt position dim",
    "mlp_out": "prompt position dim",
    "neurons": "prompt position neuron",
    "resid_pre": "prompt position dim",
    "resid_post": "prompt position dim",
}
"""The signals of a layer that an observer may read, with the dimensions of their tensors."""

_NEEDED = {
    "attention": frozenset({"pattern"}),
    "gated_attention": frozenset({"pattern", "gate"}),
    "gated_value": frozenset({"value"}),
}
"""The tensors that a model must expose for a composite signal."""


@dataclass(frozen=True)
class Scope:
    """Properties of the model and settings of the scan, for observers.

    Attributes:
        epsilon: Threshold of the sink rate [probability].
        n_heads: Query heads per layer.
        bucket_edges: Lower edges of the buckets of query positions.
        gram: W_O^h W_O^hᵀ of every head of a layer, for norms through the output projection.
        sizes: Sizes of the model's dimensions, to check the measured tensors.
    """

    epsilon: float
    n_heads: int
    bucket_edges: tuple[int, ...]
    gram: Callable[[int], Float[Tensor, "head d_head d_head"]]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Observer:
    """Base class of a metric: reads one signal of every layer and measures fields of the report.

    A class statement that names a metric registers it, so that `scan` accepts the name::

        class ValueKurtosis(ss.Observer, metric="value_kurtosis", reads="value"):
            fields = {
                "value_kurtosis": ss.measured(
                    "prompt layer kv_head", unit="1", about="kurtosis of the value states"
                )
            }

            def observe(self, x, batch):        # x: [prompt position kv_head d_head] of one layer
                return {"value_kurtosis": kurtosis(x, batch.mask)}       # [prompt kv_head]

    `observe` runs inside the hook, once per layer and batch, and returns the measurements of that
    layer: a dict from names to tensors with the prompt as first dimension. Padding is right of the
    real tokens, where `batch.mask` is False; `batch.sinks` is True at the sinks; both are [prompt
    position] (see `sinkscope.capture.batches.Batch`). `x` must not be changed in place. The tensors
    of all layers are stacked to [layer prompt ...] and passed to `finish`, which returns a dict
    with one entry per field; by default these are the stacked tensors. Override `finish` to move
    work out of the hooks: at short lengths kernel launches in hooks dominate the cost of a scan.

    `fields` declares new fields of the report. The dimensions of a field determine how its values
    are combined over batches:

    - "prompt layer ...": every prompt is stored, and `report.interval` gives a bootstrap interval.
      If the last dimension is "position", padding is nan.
    - "prompt ..." without a layer: the same; `finish` returns [prompt ...].
    - "layer ... position": the mean over the prompts that reach the position.

    If only some layers have the signal (in a hybrid model, the layers with attention), `finish`
    receives those, and the field is nan in the others.

    A batch that fails half-way (out of memory, Ctrl-C) is discarded as a whole, so a report never
    contains part of a batch. An observer is used for one scan.

    Args (of the class statement):
        metric: Name for `scan(metrics=...)`; without one the class is not registered.
        reads: The signal, one of `SIGNALS`. "attention" gives an `AttentionReader`
            (`sinkscope.capture.readers`), "gated_attention" and "gated_value" a `GatedAttention`
            and a `GatedValue` of the same module; the others an activation that was verified on the
            model: "query" and "z" [prompt position head d_head], "key" and "value" [prompt position
            kv_head d_head], "gate" [prompt position head d_gate] (factors, d_gate being 1 or
            d_head), "latent" and "normed_latent" [prompt position latent_dim], "pattern" and
            "scores" [prompt head query key], "resid_pre",
            "resid_post", "attn_out" and "mlp_out" [prompt position dim], "neurons" [prompt
            position neuron].
        needs: Tensors that a model must expose for the statistics read from that signal.
        core: Whether the metric belongs to "core".
        on_request: Whether it is measured only if requested by name, and not with "all", because
            its fields are large or it is slow.

    Attributes:
        layer: The layer for which `observe` is called.
        scope: The model's sizes and the settings of the scan.
        statistics: Statistics read from an attention reader that can share a pass with others.

    Raises:
        UnsupportedError: If the signal is unknown, or the name of the metric is taken.
        ReportError: If the name of a field is taken, or no accumulator fits its dimensions.
    """

    metric: ClassVar[str] = ""
    signal: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    core: ClassVar[bool] = False
    on_request: ClassVar[bool] = False
    statistics: ClassVar[frozenset[str]] = frozenset()
    fields: ClassVar[Mapping[str, Any]] = {}

    layer: int = -1

    def __init_subclass__(
        cls,
        metric: str = "",
        reads: str = "",
        needs: Iterable[str] = (),
        core: bool = False,
        on_request: bool = False,
        **options: Any,
    ) -> None:
        super().__init_subclass__(**options)
        if reads:
            _check_signal(cls, reads)
            cls.signal = reads
            cls.needs = frozenset(needs) or _NEEDED.get(reads, frozenset({reads}))
        cls.metric, cls.core, cls.on_request = metric, core, on_request
        if metric and not cls.signal:
            raise UnsupportedError(
                f"{cls.__name__} names the metric {metric!r} but no signal; add reads=, one of "
                f"{', '.join(SIGNALS)}."
            )
        if metric:
            _register(cls)

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """Why this cannot be measured exactly on a model that has the signal, or None."""
        return None

    @classmethod
    def variables(cls) -> dict[str, Variable]:
        """The fields added to the report, by name."""
        return {name: _variable(cls, name, field) for name, field in cls.fields.items()}

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._layers: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._accumulators: dict[str, Accumulator] = {}
        self._heard: set[int] = set()
        self._own = self.variables()

    def observe(self, x: Any, batch: Batch) -> Mapping[str, Tensor] | None:
        """Measure one layer; called inside the hook, on the layer's device.

        Args:
            x: The signal of `self.layer`.
            batch: Token ids, mask and sinks of the prompts, on the same device.

        Returns:
            The measurements by name, each tensor with the prompt first; or None if they are stored
            on the observer until `finish`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no observe(self, x, batch), which measures one layer."
        )

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Compute the fields of a completed batch.

        Args:
            layers: The tensors returned by `observe`, stacked to [layer prompt ...].
            batch: The batch, on the model's first device.

        Returns:
            One tensor per field: [layer prompt ...], or [prompt ...] for a field without layers.
        """
        return layers

    def accumulator(self, name: str) -> Accumulator:
        """The accumulator of a field over batches, determined by its dimensions."""
        known = self._own.get(name) or SinkReport.variables().get(name)
        if known is None:
            raise ReportError(
                f"{type(self).__name__} measured {name!r}, which is not a field of a report; "
                f"declare it in its `fields` (these are {', '.join(self._own) or 'empty'}), or, in "
                "the package, in report/fields.py."
            )
        if self.metric and known.metric not in (None, self.metric):
            raise ReportError(
                f"{type(self).__name__} of the metric {self.metric!r} measured {name!r}, a field "
                f"of the metric {known.metric!r}; give both the same metric."
            )
        if known.dims[0] != "prompt":
            return OverPrompts()
        return PerPrompt(layers="layer" in known.dims, positions=known.dims[-1] == "position")

    def where(self, name: str, batch: Batch) -> Bool[Tensor, "prompt position"]:
        """Entries along the last axis at which a prompt enters a field's mean over prompts."""
        return batch.mask

    # -- called by the runner --------------------------------------------------------------------

    def hear(self, layer: int, x: Any, batch: Batch) -> None:
        """Measure one layer and store the result until the batch is complete."""
        self.layer = layer
        self._heard.add(layer)
        found = self.observe(x, batch)
        if not isinstance(found, Mapping | None):
            raise self._no_tensors(found)
        for name, value in (found or {}).items():
            if not isinstance(value, Tensor):
                raise self._no_tensors(value, f" for {name}")
            self._layers[name][layer] = value

    def _no_tensors(self, given: Any, where: str = "") -> ReportError:
        """The error for what `observe` returned."""
        return ReportError(
            f"observe() of {type(self).__name__} returned a {type(given).__name__}{where}; "
            "expected a dict from names to one layer's tensors, with the prompt first."
        )

    def close(self, batch: Batch) -> Any:
        """Compute the fields of the completed batch, without adding it to the others yet."""
        device = batch.tokens.device
        stacked = {
            name: torch.stack([kept[layer].to(device) for layer in sorted(kept)])
            for name, kept in self._layers.items()
        }
        self.drop()
        return self.finish(stacked, batch)

    def add(self, finished: Any, batch: Batch) -> None:
        """Add the result of `close` to the accumulators."""
        for name, value in finished.items():
            if name in self._own:
                value = self._checked(name, value, batch)
            if name not in self._accumulators:
                self._accumulators[name] = self.accumulator(name)
            self._accumulators[name].update(value, self.where(name, batch))

    def follow(self, twin: Observer) -> None:
        """Know the layers that the same observer of a replica heard, whose batch is added next."""
        self._heard |= twin._heard

    def conclude(self) -> None:
        """Check what can be checked only after the last batch, for which `close` was called."""

    def drop(self) -> None:
        """Discard the current batch."""
        self._layers.clear()

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The report's fields, with prompts in the order of the text.

        Raises:
            ReportError: If a declared field was not measured.
        """
        if missing := [name for name in self._own if name not in self._accumulators]:
            raise ReportError(
                f"{type(self).__name__} declares the field {missing[0]!r} but did not measure it; "
                "return it from observe() or finish()."
            )
        return {
            name: self._in_all_layers(name, kept.compute(order))
            for name, kept in self._accumulators.items()
        }

    def _in_all_layers(self, name: str, value: Tensor) -> Tensor:
        """Expand a field to all layers, with nan in layers without the signal (hybrid models)."""
        known = self._own.get(name) or SinkReport.variables().get(name)
        dims = ("prompt", "layer") if known is None else known.dims
        size = self.scope.sizes.get("layer", len(self._heard))
        if "layer" not in dims or not 0 < len(self._heard) < size:
            return value
        at = dims.index("layer")
        absent = torch.nan if value.is_floating_point() else -1
        whole = value.new_full((*value.shape[:at], size, *value.shape[at + 1 :]), absent)
        return whole.index_copy_(at, torch.tensor(sorted(self._heard), device=value.device), value)

    def _checked(self, name: str, value: Any, batch: Batch) -> Tensor:
        """A value of a user-defined field as float32, with its shape checked."""
        dims = self._own[name].dims
        if dims[:2] == ("prompt", "layer"):
            dims = ("layer", "prompt", *dims[2:])
        elif dims[0] == "layer":
            dims = ("layer", "prompt", *dims[1:])
        sizes = {**self.scope.sizes, "prompt": len(batch.rows), "position": batch.length}
        sizes["layer"] = len(self._heard) or sizes.get("layer", 0)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        fits = shape is not None and len(shape) == len(dims)
        if not fits or any(sizes.get(d, n) != n for d, n in zip(dims, shape or (), strict=True)):
            wanted = ", ".join(f"{dim} {sizes[dim]}" if dim in sizes else dim for dim in dims)
            given = f"the shape {shape}" if shape is not None else f"a {type(value).__name__}"
            raise ReportError(
                f"{type(self).__name__} gave {given} for {name}, expected [{wanted}] after the "
                "layers were stacked; observe() must return one layer's tensor, with the prompt "
                "first."
            )
        return value if value.dtype == torch.float64 else value.float()


# -- the registry ----------------------------------------------------------------------------------

_registered: dict[str, list[type[Observer]]] = {}


def metrics() -> dict[str, tuple[type[Observer], ...]]:
    """Every metric by name, with its observers.

    The order is that of "core", the package's others in the order of the report's fields, and
    user-defined metrics in the order of their definition.
    """
    named = list(dict.fromkeys(SinkReport.metrics().values()))

    def place(metric: str) -> tuple[bool, int]:
        core = all(kind.core for kind in _registered[metric])
        return not core, named.index(metric) if metric in named else len(named)

    return {metric: tuple(_registered[metric]) for metric in sorted(_registered, key=place)}


def core() -> tuple[str, ...]:
    """The metrics that are cheap relative to the forward pass at any length."""
    return tuple(name for name, kinds in metrics().items() if all(kind.core for kind in kinds))


def on_request() -> tuple[str, ...]:
    """The metrics that "all" leaves out because their fields are large or they are slow."""
    return tuple(
        name for name, kinds in metrics().items() if all(kind.on_request for kind in kinds)
    )


def fields() -> dict[str, tuple[str, ...]]:
    """The fields of a report by metric."""
    measured_by = SinkReport.metrics()
    return {
        metric: (
            *(name for name, by in measured_by.items() if by == metric),
            *(name for kind in kinds for name in kind.fields),
        )
        for metric, kinds in metrics().items()
    }


def unavailable(can: Capabilities, attention: str) -> dict[str, str]:
    """Metrics that cannot be measured exactly on a model, with the reasons.

    Args:
        can: The model's capabilities.
        attention: "streaming" or "eager".
    """
    per_kv_head = {name for name, v in SinkReport.variables().items() if "kv_head" in v.dims}
    reasons: dict[str, str] = {}
    for metric, names in fields().items():
        own = [kind.variables() for kind in metrics()[metric]]
        uneven = any("kv_head" in v.dims for one in own for v in one.values())
        if not can.even_kv_heads and (uneven or per_kv_head.intersection(names)):
            reasons[metric] = f"the layers of {can.architecture} have different numbers of KV heads"
        for kind in metrics()[metric]:
            withheld = [can.withheld(tensor, attention) for tensor in sorted(kind.needs)]
            for reason in filter(None, [kind.unavailable(can), *withheld]):
                reasons.setdefault(metric, reason)
    return reasons


def _register(cls: type[Observer]) -> None:
    """Add an observer to its metric; a redefined class replaces the previous one."""
    metric, variables = cls.metric, cls.variables()
    others = _registered.get(metric, [])
    if metric in ("all", "core") or any(kind.__module__ != cls.__module__ for kind in others):
        raise UnsupportedError(f"There is a metric {metric!r} already; give yours another name.")

    def superseded(kind: type[Observer]) -> bool:
        return kind.__qualname__ == cls.__qualname__ or bool(kind.fields.keys() & variables.keys())

    for name in variables:
        if name in _taken(metric):
            raise ReportError(
                f"{name!r} is already used in reports, so {cls.__name__} cannot declare a field of "
                "that name; choose another."
            )
    owner = SinkReport.metrics().get(metric)
    if variables and owner is not None and owner != metric:
        raise UnsupportedError(
            f"{metric!r} is a field of the metric {owner!r}; give your metric another name."
        )
    _registered[metric] = [kind for kind in others if not superseded(kind)] + [cls]


def _taken(metric: str) -> set[str]:
    """Names that are not available to a field of this metric."""
    parts = {
        f"{part}_{name}" for part, kind in SinkReport.parts().items() for name in kind.variables()
    }
    dims = {dim for variable in SinkReport.variables().values() for dim in variable.dims}
    elsewhere = {
        name
        for other, kinds in _registered.items()
        if other != metric
        for kind in kinds
        for name in kind.fields
    }
    fields = {field.name for field in dataclasses.fields(SinkReport)}
    return {*dir(SinkReport), *fields, *dims, *parts, *elsewhere, "token", "neuron"}


def _check_signal(cls: type[Observer], reads: str) -> None:
    if reads not in SIGNALS:
        raise UnsupportedError(
            f"{cls.__name__} reads {reads!r}, which is not a signal; choose from "
            f"{', '.join(SIGNALS)}."
        )


def _variable(cls: type[Observer], name: str, field: Any) -> Variable:
    """Check a declared field and return its variable."""
    metadata = getattr(field, "metadata", {})
    dims = tuple((metadata.get("dims") or "").split())
    if not name.isidentifier() or name.startswith("_") or not all(d.isidentifier() for d in dims):
        raise ReportError(
            f"{cls.__name__} declares the field {name!r} with the dimensions {dims}; names must be "
            "Python identifiers such as value_kurtosis."
        )
    repeated = len(set(dims)) != len(dims)
    over_prompts = dims[:1] == ("layer",) and dims[-1] == "position" and "prompt" not in dims
    per_prompt = dims[:1] == ("prompt",) and dims.index("layer") == 1 if "layer" in dims else False
    plain = dims[:1] == ("prompt",) and len(dims) > 1 and "layer" not in dims
    inside = "position" in dims[:-1]
    if repeated or inside or not (over_prompts or per_prompt or plain):
        shown = repr(metadata.get("dims")) if metadata else f"{field!r:.40}"
        raise ReportError(
            f"{cls.__name__} declares {name} with the dimensions {shown}; expected "
            'measured("prompt layer ...") or measured("layer ... position"), with "position" only '
            "at the end."
        )
    return Variable(
        name,
        dims,
        metadata.get("unit"),
        metadata.get("about", ""),
        weight="prompts_at" if over_prompts else None,
        metric=cls.metric,
        tabled=metadata.get("tabled", False),
        declared=True,
    )
