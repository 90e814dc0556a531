"""The main entry point: `scan(model, texts)` returns a `SinkReport`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capture import observers, paths, runner
from sinkscope.capture.nulls import (
    NullAttention,
    NullDrain,
    NullPeak,
    check_one_sink,
    initial_fields,
)
from sinkscope.capture.observers import Observer, Scope
from sinkscope.capture.observers.discovery import FindSinks
from sinkscope.devices import exclusive, usual_torch
from sinkscope.errors import SinkscopeError, TextError, UnsupportedError
from sinkscope.metrics import positions, values
from sinkscope.metrics.attention import bucket_edges
from sinkscope.models.active import in_force, user_hooks
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model
from sinkscope.models.output import output_weight
from sinkscope.models.provenance import model_source, own_output, weights_of
from sinkscope.models.replicas import check_devices, further_devices, replicas
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts, check_reached
from sinkscope.report.chance import QUANTITIES, derived
from sinkscope.report.fields import metric_of
from sinkscope.report.labelled import extended
from sinkscope.report.report import SinkReport
from sinkscope.report.settings import Settings
from sinkscope.validation import probability, shown, strings, whole_number, whole_numbers

Metrics = str | Iterable[str]
Sinks = Iterable[int] | Literal["auto"]
_NULLED = tuple(filter(None, map(metric_of, QUANTITIES)))
"""Metrics with nulls, which are also measured on the model at initialisation."""
_WITH_NULLS = (*_NULLED, "sink_is_largest")
"""Metrics that are measured together with nulls."""


def scan(
    model: Any,
    texts: Any,
    *,
    metrics: Metrics = "all",
    sinks: Sinks = (0,),
    epsilon: float = 0.3,
    batch: int | Literal["auto"] = "auto",
    attention: str = "auto",
    nulls: int = 0,
    nulls_seed: int = 0,
    devices: Sequence[str | torch.device] | None = None,
    progress: bool = True,
    path: str | None = None,
) -> SinkReport:
    """Measure the sinks of a model on some texts, in one forward pass per batch.

    Args:
        model: A bridge, or anything that `load_model` accepts; a transformers model is not changed.
        texts: The result of `texts()` or `token_ids()`, or a list of strings.
        metrics: "all", "core" (cheap relative to the forward pass), or names from
            `capabilities(model).available`, including user-defined ones; a list may combine "core"
            or "all" with names. "all" leaves out metrics that cannot be measured exactly on this
            model, which are refused if requested by name, "ffn_dims", whose size grows with
            prompts × layers × dims, and "sink_is_largest", which computes all scores again.
        sinks: Positions counted from a prompt's first token, or "auto": a first pass finds the
            sinks of each prompt (`metrics.positions.primary_and_secondary`). All quantities refer
            to its primary sink; its other sinks are in `secondary_sinks`, by layer.
        epsilon: Threshold of the sink rate [probability].
        batch: Prompts per forward pass; "auto" fills the device and backs off when memory runs out.
        attention: Attention path: "streaming" (fused attention without materialised patterns),
            "eager" (every layer's pattern is materialised), or "auto", which streams if possible.
            Both are exact.
        nulls: Number of draws of each null with which sink attention, residual peak and value drain
            are compared (`sinkscope.capture.nulls`): the model at initialisation, a random position
            as the sink, and shuffled keys. Each draw of the first is a scan of a new model.
            Corrected p-values are at least 1 / (1 + nulls), so 20 is the smallest number that
            allows p below 0.05. The drain has no null if the model's values cannot be measured.
        nulls_seed: Seed of these draws; scans with different seeds share none.
        devices: Devices between which the prompts are divided, such as ["cuda:0", "cuda:1"]. A
            model that is loaded here is loaded on the first; for the duration of the scan it is
            copied to the others, with adapters and edited weights, and idle copies take the next
            batch. With an explicit `batch` and devices of one kind, all values are bit for bit
            those of a scan on one device (on CUDA, entropies and value-weighted shares are summed
            atomically and vary in their last digits); with "auto" each device gets a share of the
            tokens, and values agree up to rounding, as for any two batch sizes (relative 1e-4 in
            float32).
        progress: Whether to draw a progress bar.
        path: Deprecated; the former name of `attention`, whose "stock" is now "eager".

    Returns:
        The report; fields that were not measured are None.

    Raises:
        ModelError: If the model cannot be loaded, or copied to one of `devices`, no prompt fits in
            memory, or ("residual") a state of the residual stream is nan or infinite.
        TextError: If the texts do not fit the model, or a sink position lies beyond a prompt.
        UnsupportedError: If a requested metric or attention path cannot be exact for this model;
            if nulls are requested under interventions or for a model that cannot be created from
            its config; or if a model to be copied to `devices` has interventions or user hooks.
    """
    if path is not None:
        warnings.warn(
            'scan(path=...) is now scan(attention=...), and "stock" is "eager".',
            DeprecationWarning,
            stacklevel=2,
        )
        attention = "eager" if path == "stock" else path
    metrics, sinks, epsilon, batch = checked(metrics, sinks, epsilon, attention, batch)
    nulls = whole_number("nulls", nulls, at_least=0)
    nulls_seed = whole_number("nulls_seed", nulls_seed, at_least=0)
    places = None if devices is None else check_devices(devices)
    named = isinstance(model, str | os.PathLike)
    model = load_model(model, device=places[0]) if places and named else load_model(model)
    with exclusive(model), usual_torch():
        further = further_devices(model, places) if places else []
        return _scan(
            model,
            texts,
            metrics,
            sinks,
            epsilon,
            batch,
            attention,
            nulls,
            nulls_seed,
            progress,
            further,
        )


def _scan(
    model: Any,
    texts: Any,
    metrics: Metrics,
    sinks: Sinks,
    epsilon: float,
    batch: int | Literal["auto"],
    attention: str,
    nulls: int,
    nulls_seed: int,
    progress: bool,
    further: Sequence[torch.device],
) -> SinkReport:
    """Scan a bridge, with checked arguments."""
    caps = capabilities(model)
    prompts = as_texts(texts).tokenize(model).right_padded()
    _check_dense(caps, int(prompts.lengths.max()))
    how = paths.choose(model, caps, attention)
    interventions = in_force(model)
    softmax = caps.softmax and all(one.softmax for one in interventions)
    can_now = replace(caps, softmax=softmax)
    beside = _with_nulls(can_now, how.name) if nulls else ()
    chosen = choose_metrics((*metrics, *beside), can_now, how.name)

    scope = Scope(
        epsilon=epsilon,
        n_heads=caps.n_heads,
        bucket_edges=tuple(bucket_edges(prompts.tokens.shape[1])),
        gram=Grams(model),
        sizes={"layer": caps.n_layers, "head": caps.n_heads, "kv_head": caps.n_kv_heads},
    )

    # No more replicas than prompts.
    further = further[: len(prompts.tokens) - 1]
    copies = replicas(model, further)

    def measure(
        made: Callable[[Scope], list[Observer]],
        at: Bool[Tensor, "prompt position"],
        of: Any = model,
    ) -> dict[str, Any]:
        others = copies if of is model else replicas(of, further)
        requested, *theirs = [
            runner.Replica(
                one,
                how if one is model else paths.choose(one, capabilities(one), how.name),
                made(scope if one is model else replace(scope, gram=Grams(one))),
            )
            for one in (of, *others)
        ]
        order = runner.run(
            of,
            prompts,
            at,
            requested.observers,
            requested.path,
            causal=caps.causal,
            batch=batch,
            progress=progress,
            others=theirs,
        )
        result: dict[str, Any] = {}
        for observer in requested.observers:
            result |= observer.results(order)
        return result

    at, secondary = _sink_mask(sinks, prompts), None
    if sinks == "auto":
        windows = tuple(caps.windows[layer] for layer in caps.attending)
        places = measure(lambda scope: [FindSinks(scope, windows)], at)
        at, secondary = places["primary"], places["secondary"]
    kinds = [kind for name in chosen for kind in observers.metrics()[name]]
    drain = (NullDrain,) if metric_of("value_drain") in beside else ()
    drawn = (NullAttention, NullPeak, *drain) if nulls else ()
    if nulls:
        check_one_sink(at)
    result = measure(
        lambda scope: [
            *(kind(scope) for kind in kinds),
            *(null(scope, nulls, nulls_seed) for null in drawn),
        ],
        at,
    )
    if nulls:
        nulled = [name for name in _NULLED if name in beside]
        wanted = [kind for name in nulled for kind in observers.metrics()[name]]
        result |= initial_fields(
            model,
            nulls,
            lambda fresh: measure(lambda scope: [kind(scope) for kind in wanted], at, fresh),
            nulls_seed,
        )
    own = tuple(variable for kind in kinds for variable in kind.variables().values())
    report = extended(SinkReport, own)(
        settings=replace(
            _settings(model, caps, prompts, chosen, sinks, epsilon, how.name, further),
            nulls_seed=nulls_seed,
        ),
        tokens=prompts.tokens,
        mask=prompts.mask,
        sink_mask=at,
        secondary_sinks=secondary,
        token_text=prompts.strings,
        prompts_at=prompts.mask.sum(dim=0),
        position_embedding_norm=_position_embedding_norm(model, caps),
        **result,
    )
    return replace(report, **derived(report)) if nulls else report


def _with_nulls(caps: Capabilities, attention: str) -> tuple[str, ...]:
    """The metrics that a scan with nulls measures beside those asked for."""
    values = metric_of("value_drain")
    absent = {values} & observers.unavailable(caps, attention).keys()
    return tuple(name for name in _WITH_NULLS if name not in absent)


def choose_metrics(metrics: Metrics, caps: Capabilities, attention: str) -> tuple[str, ...]:
    """The metrics to measure, in the order of `observers.metrics`.

    Raises:
        UnsupportedError: If one is unknown, or requested by name but unavailable on this model.
    """
    known = observers.metrics()
    missing = observers.unavailable(caps, attention)
    left_out = {*missing, *observers.on_request()}
    groups = {"all": [name for name in known if name not in left_out], "core": observers.core()}
    requested = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    _check_names(requested)
    wanted = [name for group in requested for name in groups.get(group, (group,))]
    for name in wanted:
        if name in missing:
            raise UnsupportedError(f"{name} cannot be measured exactly: {missing[name]}.")
    return tuple(name for name in known if name in wanted)


def _check_names(requested: tuple[str, ...]) -> None:
    """Refuse names of no metric."""
    known = observers.metrics()
    for name in requested:
        if name in ("all", "core") or name in known:
            continue
        fields = observers.fields()
        measured_by = {field: metric for metric, named in fields.items() for field in named}
        if metric := metric_of(name) or measured_by.get(name):
            raise UnsupportedError(f"{name} is a field of the metric {metric!r}; request that.")
        raise UnsupportedError(
            f'There is no metric {name!r}; choose "all", "core", or some of {", ".join(known)}.'
        )


class Grams:
    """W_O^h W_O^hᵀ of each layer of a model, computed on first use."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[int, Tensor] = {}

    def __call__(self, layer: int) -> Float[Tensor, "head d_head d_head"]:
        """The Gram matrix of every head of a layer, on the layer's device."""
        if layer not in self._made:
            self._made[layer] = values.gram(output_weight(self._model, layer))
        return self._made[layer]


def _check_dense(caps: Capabilities, length: int) -> None:
    """Refuse prompts so long that visibility is not determined by causality and window alone."""
    if caps.dense_up_to is not None and length > caps.dense_up_to:
        raise UnsupportedError(
            f"In some layers of {caps.architecture} a query attends to {caps.dense_up_to} keys at "
            "most, those of its own chunk or selected by an indexer, but a prompt has "
            f"{length} tokens; sinkscope measures such layers only while they are dense, so use "
            f"prompts of {caps.dense_up_to} tokens or fewer."
        )


def _sink_mask(sinks: Sinks, texts: Texts) -> Bool[Tensor, "prompt position"]:
    """True at the requested sink positions; position 0 until "auto" has found them."""
    positions = [0] if sinks == "auto" else list(sinks)
    check_reached(positions, texts)
    mask = torch.zeros_like(texts.mask)
    mask[:, positions] = True
    return mask


def _positions(sinks: Any) -> tuple[int, ...] | Literal["auto"]:
    """The requested sinks, checked; positions without duplicates, in order."""
    if isinstance(sinks, str) and sinks == "auto":
        return "auto"
    try:
        return tuple(sorted(whole_numbers("sinks", sinks)))
    except SinkscopeError:
        raise TextError(
            f'sinks is {shown(sinks)}; expected positions such as [0], or "auto".'
        ) from None


def checked(
    metrics: Any, sinks: Any, epsilon: Any, attention: Any, batch: Any
) -> tuple[tuple[str, ...], Sinks, float, Any]:
    """What a scan is asked for, checked as far as that takes no model.

    Returns:
        The names of metrics and groups, the sinks, the threshold and the batch as plain values.

    Raises:
        SinkscopeError: If one of them cannot be what it is given as.
    """
    names = strings("metrics", metrics, expected='"all", "core", or a list of names')
    _check_names(names)
    paths.check_way(attention)
    if not isinstance(batch, str) or batch != "auto":
        batch = whole_number("batch", batch, at_least=1)
    return names, _positions(sinks), probability("epsilon", epsilon), batch


def _position_embedding_norm(model: Any, caps: Capabilities) -> Float[Tensor, "context"] | None:
    if caps.positions != "learned":
        return None
    # RoBERTa's table begins with unused rows, of which the bridge removes at most two.
    table = model.W_pos.detach()[-(caps.n_ctx or 0) :]
    return positions.position_embedding_norm(table)


def _settings(
    model: Any,
    caps: Capabilities,
    texts: Texts,
    metrics: tuple[str, ...],
    sinks: Sinks,
    epsilon: float,
    attention: str,
    further: Sequence[torch.device],
) -> Settings:
    source = model_source(model)
    weight = next(model.original_model.parameters())
    places = dict.fromkeys(map(str, (weight.device, *further)))
    return Settings(
        model=source.name,
        revision=source.revision,
        architecture=caps.architecture,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=", ".join(places),
        source=texts.source,
        bos=texts.bos,
        length=texts.tokens.shape[1],
        epsilon=epsilon,
        sinks="auto" if sinks == "auto" else ",".join(map(str, sinks)),
        attention=attention,
        causal=caps.causal,
        windows=caps.windows,
        without_attention=tuple(sorted({*range(caps.n_layers)} - {*caps.attending})),
        metrics=metrics,
        n_layers=caps.n_layers,
        n_heads=caps.n_heads,
        n_kv_heads=caps.n_kv_heads,
        seed=texts.seed,
        interventions=tuple(map(repr, in_force(model))),
        hooks=user_hooks(model),
        weights=weights_of(model),
        output=own_output(model),
    )
