"""Structure of a model and the metrics it supports, determined from forward passes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sinkscope.attention.upstream import mended
from sinkscope.devices import exclusive, ran_out_of_memory, usual_torch
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.anatomy import Anatomy, read_anatomy
from sinkscope.models.bridging import proof_of
from sinkscope.models.output import why_no_map
from sinkscope.models.probe import (
    CANDIDATES,
    PROJECTED,
    B,
    Findings,
    Probe,
    Z,
    evaluating,
    fails_without_cache,
    input_device,
    only_hooks,
    probe,
)
from sinkscope.models.provenance import model_source
from sinkscope.models.signals import OF_ATTENTION, close, find_signals, is_causal
from sinkscope.output import listed

NO_SOFTMAX = (
    "attention is not a softmax of the scores here, so its rows are not distributions and have no "
    "entropy"
)
"""Why the entropy is not defined on a model."""

STREAMED = frozenset({"pattern", "scores", "query", "key", "value"})
"""Signals that the streaming path reads in the model's own attention function."""

FROM_READER = frozenset({"scores", "query", "key"})
"""Tensors that observers receive together with the pattern on the eager path."""

_OBSERVERS = "sinkscope.capture.observers"
"""The module of the metrics, imported by name, because it is in a higher layer."""


def _undefined(model: Any, anatomy: Anatomy, findings: Findings, causal: bool) -> dict[str, str]:
    """Why quantities other than metrics are not available."""
    reasons: dict[str, str] = {}
    if "neurons" in findings.reasons:
        reasons["neurons"] = findings.reasons["neurons"]
    if anatomy.positions != "learned":
        reasons["position_embedding_norm"] = f"positions are {anatomy.positions}, not learned"
    if not model_source(model).trained_head:
        reasons["loss"] = "the checkpoint has no output head; the one in use is untrained"
    elif not causal:
        reasons["loss"] = "a bidirectional model predicts no next token"
    return reasons


def _not_streamed(model: Any) -> str | None:
    """Why the streaming path does not support this model, or None."""
    from sinkscope.attention.support import attention_of

    try:
        attention_of(model)
    except UnsupportedError as error:
        return str(error)
    return proof_of(model).streaming


@dataclass(frozen=True)
class Capabilities:
    """Structure of a model, the hook points of its signals, and the metrics it supports.

    Attributes:
        architecture: The model's class, for example "LlamaForCausalLM".
        n_layers: Number of blocks.
        attending: Indices of the layers with attention (empty where TransformerLens exposes none,
            see `absent`). The other layers of a hybrid model have linear attention, a state-space
            model or a convolution instead.
        n_heads: Query heads of a layer with attention; 0 without any.
        n_kv_heads: Key/value heads of a layer with attention.
        d_model: Width of the residual stream.
        d_head: Width of a head's values, and of its input to W_O.
        d_key: Width of a head's queries and keys; differs from `d_head` only in multi-head latent
            attention.
        d_mlp: FFN hidden units; ``None`` where no hook point carries them.
        n_ctx: Longest context in positions, as the config states it.
        d_vocab: Vocabulary size.
        causal: Whether a position attends to itself and earlier positions only.
        moe: Whether any block has a mixture of experts.
        learned_sinks: Whether heads have a learned sink logit, so that attention sums to less
            than one.
        softmax: Whether attention is a softmax of the scores (of which a learned sink, or another
            term that is not a key, may take a share).
        gated: Whether a gate multiplies each head's mixture of values before W_O; ``z`` is the
            gated input of W_O.
        gate: Activation that maps the hook point of the signal "gate" to the gate's factors:
            "sigmoid", "softplus" or "identity"; ``None`` without a gate, or where its place could
            not be verified.
        even_kv_heads: Whether all layers with attention have the same number of KV heads.
        split_output: Whether the output projection of each layer with attention was verified to be
            a linear map of z, so that each head has a W_O; false where layers differ in geometry
            or weights are offloaded.
        windows: Sliding window of each layer in positions, the query's own included; ``None`` is
            full attention, or none at all.
        dense_up_to: Length up to which a query attends to all keys that causality and windows allow
            [positions]; in longer prompts, which a scan refuses, it attends only to its own chunk
            (Llama-4) or to keys it selects (GLM-5). ``None`` where there is no such limit.
        softcap: Bound on the scores, or ``None``.
        scales: Factor on q·k in each layer; ``None`` for layers without attention.
        parallel_blocks: Whether the FFN's input excludes the attention output of the same block.
        positions: "rotary", "learned", "alibi", "none" or another term of TransformerLens.
        lm_head: Whether the output head is trained; logits are meaningless otherwise.
        stock_differs: How the unmodified bridge deviates from the model, so that its activations
            are not the model's; ``None`` where the two agree.
        not_streamed: Why the streaming path does not support the model; ``None`` where it does.
        signals: Signal name to hook name with ``{layer}``, for the eager bridge.
        elsewhere: The same in layers without attention, for signals on another hook point there.
        absent: Signal name to the reason why no hook point carries it.
        undefined: Why the model lacks a quantity that is not a metric: ``loss``, ``neurons`` or
            ``position_embedding_norm``. Quantities without an entry are available.
        hooks: All hook points that fire; those in every block once, with ``{layer}``.
    """

    architecture: str
    n_layers: int
    attending: tuple[int, ...]
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_key: int
    d_mlp: int | None
    n_ctx: int | None
    d_vocab: int
    causal: bool
    moe: bool
    learned_sinks: bool
    softmax: bool
    gated: bool
    gate: str | None
    even_kv_heads: bool
    split_output: bool
    windows: tuple[int | None, ...]
    dense_up_to: int | None
    softcap: float | None
    scales: tuple[float | None, ...]
    parallel_blocks: bool
    positions: str
    lm_head: bool
    stock_differs: str | None
    not_streamed: str | None
    signals: Mapping[str, str]
    elsewhere: Mapping[str, str]
    absent: Mapping[str, str]
    undefined: Mapping[str, str]
    hooks: tuple[str, ...]

    @property
    def available(self) -> tuple[str, ...]:
        """Metrics that `scan` can measure on this model, user-defined ones included."""
        missing = self.unavailable
        return tuple(metric for metric in _observers().metrics() if metric not in missing)

    @property
    def unavailable(self) -> dict[str, str]:
        """Why `scan` cannot measure the other metrics: metric to reason."""
        return self.unavailable_on("auto")

    def unavailable_on(self, attention: str) -> dict[str, str]:
        """Why metrics cannot be measured exactly on an attention path: metric to reason.

        Args:
            attention: "eager", "streaming", or "auto": streaming if it supports the model.
        """
        if attention == "auto":
            attention = "eager" if self.not_streamed else "streaming"
        if attention == "streaming" and self.not_streamed is not None:
            return dict.fromkeys(_observers().metrics(), self.not_streamed.removesuffix("."))
        return _observers().unavailable(self, attention)

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        """The fields of a report for each available metric."""
        named = _observers().fields()
        return {metric: named[metric] for metric in self.available}

    def withheld(self, tensor: str, attention: str) -> str | None:
        """Why a signal cannot be read exactly in every layer, or None.

        Args:
            tensor: Name of a signal.
            attention: "streaming" or "eager".
        """
        if attention == "streaming":
            missing = tensor not in STREAMED and tensor not in self.signals
            return self._absent(tensor) if missing else None
        if self.stock_differs is not None:
            reason: str | None = self.stock_differs
        elif tensor not in self.signals:
            reason = self._absent(tensor)
        else:
            without = tensor in FROM_READER and "pattern" not in self.signals
            reason = self._absent("pattern") if without else None
        streams = self.not_streamed is None and self.withheld(tensor, "streaming") is None
        if reason is not None and streams:
            reason += '; attention="streaming" measures it'
        return reason

    def _absent(self, signal: str) -> str:
        return self.absent.get(signal, f"no hook point of {self.architecture} carries {signal!r}")

    def layers(self, signal: str) -> tuple[int, ...]:
        """The layers that have ``signal``: those with attention, or all of them."""
        of_attention = signal == "attention" or signal in OF_ATTENTION
        return self.attending if of_attention else tuple(range(self.n_layers))

    def measured_at(self, layer: int) -> tuple[str, ...]:
        """Available metrics that have values in ``layer``; in the others their fields are nan."""
        observers = _observers().metrics()
        return tuple(
            metric
            for metric in self.available
            if any(
                all(layer in self.layers(tensor) for tensor in observer.needs)
                for observer in observers[metric]
            )
        )

    def hook(self, signal: str, layer: int) -> str:
        """Name of the hook point that carries ``signal`` in ``layer``.

        Raises:
            UnsupportedError: If no hook point of this architecture, or of this layer, carries it.
        """
        if signal not in self.signals:
            raise UnsupportedError(
                f"{self.architecture} has no hook point for {signal!r}; it has "
                f"{', '.join(sorted(self.signals))}."
            )
        if layer not in self.layers(signal):
            raise self.no_attention(layer)
        names = self.signals if layer in self.attending else {**self.signals, **self.elsewhere}
        return names[signal].format(layer=layer)

    def no_attention(self, layer: int) -> UnsupportedError:
        """The error for a request that needs attention in a layer without it."""
        return UnsupportedError(
            f"Layer {layer} of this {self.architecture} has no attention; choose from the layers "
            f"with attention, {_spans(self.attending)}."
        )

    def __str__(self) -> str:
        return as_text(describe(self))

    def __rich__(self) -> RenderableType:
        return describe(self)


def _observers() -> Any:
    return importlib.import_module(_OBSERVERS)


_known: WeakKeyDictionary[Any, tuple[Any, Capabilities]] = WeakKeyDictionary()


def capabilities(model: Any) -> Capabilities:
    """Determine what can be measured on a bridge, from two forward passes over a dozen tokens.

    The result is cached for the bridge's lifetime. Hooks on the bridge are temporarily removed, and
    its state is restored.

    Args:
        model: A TransformerBridge.

    Returns:
        What can be measured, and for everything else the reason why it cannot.

    Raises:
        UnsupportedError: If the architecture cannot be measured exactly.
    """
    if not hasattr(model, "hook_dict"):
        raise UnsupportedError(
            f"A TransformerBridge is needed here, not a {type(model).__name__}; "
            "sinkscope.load_model makes one."
        )
    with exclusive(model), usual_torch():
        state = _attention_state(model)
        kept = _known.get(model)
        if kept is None or kept[0] != state:
            _known[model] = kept = (state, _look(mended(model)))
        return kept[1]


def _attention_state(model: Any) -> tuple[Any, ...]:
    """State that determines which attention hooks fire: implementation and attention modules."""
    config = getattr(model.original_model, "config", None)
    attention = (id(getattr(block, "attn", None)) for block in getattr(model, "blocks", ()))
    return (getattr(config, "_attn_implementation", None), *attention)


def _look(model: Any) -> Capabilities:
    """Probe a bridge and assemble the findings."""
    anatomy = read_anatomy(model)
    wanted = {hook.format(layer=i) for hook in CANDIDATES for i in range(anatomy.n_layers)}
    try:
        seen = probe(model, wanted.__contains__)
    except Exception as error:  # the model's forward may raise anything
        if ran_out_of_memory(error):
            raise ModelError(
                f"A dozen tokens of {anatomy.architecture} do not fit in the memory of "
                f"{input_device(model)} beside the weights; use a device with more memory, or "
                "dtype='bfloat16'."
            ) from error
        raise UnsupportedError(
            f"{anatomy.architecture} does not run on plain token ids, so sinkscope cannot measure "
            f"it: {str(error).partition(chr(10))[0] or type(error).__name__}"
        ) from error
    half = model.cfg.dtype in (torch.float16, torch.bfloat16)
    tolerance = 3e-2 if half else 2e-3  # the tighter one allows for TF32 on a GPU
    causal = is_causal(seen, anatomy, tolerance)
    findings = find_signals(seen, anatomy, causal, tolerance)
    if anatomy.architecture == "FalconForCausalLM" and anatomy.positions == "alibi":
        # transformers 5.23 also adds the bias to the mask, as only its sdpa attention expects.
        findings.stock_differs = "transformers' eager attention adds ALiBi twice, its sdpa one once"
    findings.stock_differs = findings.stock_differs or proof_of(model).stock
    if half and findings.stock_differs is None and (why := fails_without_cache(model)):
        findings.stock_differs = f"it does not run without a KV cache in this dtype ({why})"
    _refuse_unmeasurable(anatomy, findings, seen)
    return _assemble(model, anatomy, seen, findings, causal, tolerance)


def _refuse_unmeasurable(anatomy: Anatomy, findings: Findings, seen: Probe) -> None:
    """Refuse a model whose blocks, attention or residual stream failed verification."""
    runs = {seen.fired[f"blocks.{layer}.hook_in"] for layer in range(anatomy.n_layers)}
    if runs != {1}:
        reason = "does not run each of its blocks exactly once"
    elif anatomy.attending and "pattern" in findings.reasons and "z" in findings.reasons:
        reason = f"does not show its attention ({findings.reasons['z']})"
    elif "resid_post" in findings.reasons:
        reason = f"has no plain residual stream ({findings.reasons['resid_post']})"
    else:
        return
    raise UnsupportedError(
        f"{anatomy.architecture} {reason}, so sinkscope cannot measure it exactly."
    )


def _assemble(
    model: Any, anatomy: Anatomy, seen: Probe, findings: Findings, causal: bool, tolerance: float
) -> Capabilities:
    cfg = model.cfg

    def width(signal: str, dim: int, otherwise: Any) -> Any:
        """Size of a verified signal; the sizes in configs are not always the model's."""
        hook = findings.signals.get(signal)
        at = first if signal in OF_ATTENTION else 0
        return otherwise if hook is None else seen.kept[hook.format(layer=at)].shape[dim]

    attends = bool(anatomy.attending)
    first = anatomy.attending[0] if attends else 0
    of_layer = dict(zip(anatomy.attending, findings.scales, strict=True))
    return Capabilities(
        architecture=anatomy.architecture,
        n_layers=anatomy.n_layers,
        attending=anatomy.attending,
        n_heads=width("z", 2, cfg.n_heads if attends else 0),
        n_kv_heads=width("value", 2, _stated_kv_heads(model, anatomy)),
        d_model=anatomy.d_model,
        d_head=width("value", 3, cfg.d_head if attends else 0),
        d_key=width("key", 3, width("value", 3, cfg.d_head if attends else 0)),
        d_mlp=width("neurons", 2, None),
        n_ctx=anatomy.n_ctx,
        d_vocab=cfg.d_vocab,
        causal=causal,
        moe=anatomy.moe,
        learned_sinks=any(sink is not None for sink in anatomy.sinks),
        softmax=findings.softmax,
        gated=findings.gated,
        gate=findings.gate,
        even_kv_heads=len({_kv_groups(model.blocks[at]) for at in anatomy.attending}) <= 1,
        split_output=attends and _why_no_map(model, seen, anatomy, tolerance) is None,
        windows=anatomy.windows,
        dense_up_to=anatomy.dense_up_to,
        softcap=anatomy.softcap,
        scales=tuple(of_layer.get(layer) for layer in range(anatomy.n_layers)),
        parallel_blocks=_is_parallel(model, findings, seen, anatomy.attending),
        positions=anatomy.positions,
        lm_head=model_source(model).trained_head,
        stock_differs=findings.stock_differs,
        signals=MappingProxyType(dict(findings.signals)),
        elsewhere=MappingProxyType(dict(findings.elsewhere)),
        not_streamed=_not_streamed(model),
        absent=MappingProxyType(dict(findings.reasons)),
        undefined=MappingProxyType(_undefined(model, anatomy, findings, causal)),
        hooks=_fired(seen, anatomy.n_layers),
    )


def _stated_kv_heads(model: Any, anatomy: Anatomy) -> int:
    """KV heads of a layer with attention, where no verified value shows them."""
    if not anatomy.attending:
        return 0
    # The config of JetMoE states those of one expert, which its module repeats for each choice.
    groups = _kv_groups(model.blocks[anatomy.attending[0]])
    if groups is not None:
        return model.cfg.n_heads // groups
    return model.cfg.n_key_value_heads or model.cfg.n_heads


def _kv_groups(block: Any) -> int | None:
    """Query heads per KV head in a block, as transformers' module states it."""
    attn = getattr(block.attn, "original_component", block.attn)
    return getattr(attn, "num_key_value_groups", None)


def _why_no_map(model: Any, seen: Probe, anatomy: Anatomy, tolerance: float) -> str | None:
    """Why the output projections cannot be split into a W_O for each head, or None."""
    at = anatomy.attending
    return why_no_map(model, at, seen.layers(Z, at), seen.layers(PROJECTED, at), tolerance)


def _is_parallel(model: Any, findings: Findings, seen: Probe, attending: tuple[int, ...]) -> bool:
    """Whether a block's FFN output stays the same when its attention output is removed.

    Tested in the first block with attention, or the first block if there is none.
    """
    if not {"attn_out", "mlp_out"} <= findings.signals.keys():
        return bool(getattr(model.cfg, "parallel_attn_mlp", False))
    names = findings.signals if attending else {**findings.signals, **findings.elsewhere}
    layer = attending[0] if attending else 0
    attn_hook, mlp_hook = (names[s].format(layer=layer) for s in ("attn_out", "mlp_out"))
    attn_point, mlp_point = model.hook_dict[attn_hook], model.hook_dict[mlp_hook]
    without: list[torch.Tensor] = []

    def remove_attention(activation: torch.Tensor, hook: Any) -> torch.Tensor | None:
        if hook is attn_point:
            return torch.zeros_like(activation)
        without.append(activation.float().cpu())
        return None

    points = {*model.hook_dict.values()}
    with only_hooks(points, {attn_point, mlp_point}, remove_attention), evaluating(model):
        with torch.no_grad():
            model(seen.tokens.to(input_device(model)), return_type=None, stop_at_layer=layer + 1)
    return close(without[0], seen.kept[mlp_hook], 1e-4)


def _fired(seen: Probe, n_layers: int) -> tuple[str, ...]:
    """Hook points that fire; those in every block are listed once, as a template."""
    templates: dict[str, None] = {}
    for name in seen.fired:
        stack, _, rest = name.partition(".")
        layer, _, point = rest.partition(".")
        template = B + point
        shared = stack == "blocks" and all(
            seen.fired[template.format(layer=i)] for i in range(n_layers)
        )
        templates[template if shared and layer.isdigit() else name] = None
    return tuple(templates)


# -- display in a terminal or notebook -------------------------------------------------------------


def describe(capabilities: Capabilities) -> RenderableType:
    """Tables for a terminal or a notebook: structure, metrics and hook points."""
    tables = [_structure(capabilities), _metrics(capabilities), _signals(capabilities)]
    if len(capabilities.attending) not in (0, capabilities.n_layers):
        tables.insert(2, _layer_by_layer(capabilities))
    return Group(*tables)


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """Render as plain text, without colours."""
    page = StringIO()
    Console(file=page, width=width, color_system=None, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip().splitlines())


def _structure(caps: Capabilities) -> Table:
    table = Table(title=caps.architecture, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "layers": _layers(caps),
        "heads": _heads(caps),
        "widths": f"d_model {caps.d_model}, d_head {_width(caps)}, d_mlp {caps.d_mlp or '-'}",
        "context": f"{caps.n_ctx or '-'} positions, {caps.positions} position scheme",
        "attention": _attention(caps),
        "windows": _runs(tuple(caps.windows[layer] for layer in caps.attending), caps.attending),
        "blocks": ("parallel" if caps.parallel_blocks else "sequential")
        + (", mixture of experts" if caps.moe else ""),
        "output head": "trained" if caps.lm_head else "not trained: losses are meaningless",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layers(caps: Capabilities) -> str:
    if len(caps.attending) == caps.n_layers:
        return str(caps.n_layers)
    if not caps.attending:
        return f"{caps.n_layers}: {caps.absent['pattern']}"
    return f"{caps.n_layers}, of which {_spans(caps.attending)} attend"


def _spans(layers: Iterable[int]) -> str:
    """Layer indices as text: "3, 7 and 11", "0 to 4 and 8", or every fourth layer."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return listed([str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in spans])


def _heads(caps: Capabilities) -> str:
    if not caps.attending:
        return "none"
    if caps.n_heads == caps.n_kv_heads:
        return str(caps.n_heads)
    return f"{caps.n_heads} query, {caps.n_kv_heads} key/value"


def _width(caps: Capabilities) -> str:
    if caps.d_key == caps.d_head:
        return str(caps.d_head)
    return f"{caps.d_head} ({caps.d_key} of queries and keys)"


def _attention(caps: Capabilities) -> str:
    words = ["causal" if caps.causal else "bidirectional"]
    if not caps.attending:
        return f"none; {words[0]}"
    words.append("softmax" if caps.softmax else "not a softmax")
    if caps.learned_sinks:
        words.append("learned sinks")
    if caps.gated:
        words.append("gated outputs" + (f" ({caps.gate})" if caps.gate else ""))
    if "latent" in caps.signals:
        words.append("keys and values from a latent")
    if caps.dense_up_to is not None:
        words.append(f"chunked or sparse beyond {caps.dense_up_to} positions")
    if caps.softcap is not None:
        words.append(f"scores capped at {caps.softcap:g}")
    scales = tuple(round(scale, 6) for scale in caps.scales if scale is not None)
    words.append(f"scale {_runs(scales, caps.attending)}")
    return ", ".join(words)


def _runs(values: tuple[int | float | None, ...], layers: tuple[int, ...]) -> str:
    """Values by layer: "512 in layers 0-4 · full in layer 5"; one value if all layers agree."""

    def word(value: int | float | None) -> str:
        return "full" if value is None else f"{value:g}"

    if not values:
        return "-"
    if len(set(values)) == 1:
        return word(values[0])
    parts = []
    for value, group in groupby(range(len(values)), key=values.__getitem__):
        run = [layers[at] for at in group]
        span = f"layers {run[0]}-{run[-1]}" if len(run) > 1 else f"layer {run[0]}"
        parts.append(f"{word(value)} in {span}")
    return " · ".join(parts)


def _metrics(caps: Capabilities) -> Table:
    table = Table(
        title="What can be measured",
        caption="metric: name to pass to a scan, which then measures these fields of its report",
        title_justify="left",
    )
    table.add_column("metric", no_wrap=True)
    table.add_column("fields")
    table.add_column("")
    missing, eager = caps.unavailable, caps.unavailable_on("eager")
    for metric, fields in _observers().fields().items():
        if metric in missing:
            word = Text(f"no: {missing[metric]}", style="yellow")
        else:
            word = Text("yes" if metric not in eager else "streaming only", style="green")
        table.add_row(metric, ", ".join(fields), word)
    for quantity in ("loss", "neurons", "position_embedding_norm"):
        reason = caps.undefined.get(quantity)
        word = Text(f"no: {reason}", style="yellow") if reason else Text("yes", style="green")
        table.add_row("-", quantity, word)
    return table


def _layer_by_layer(caps: Capabilities) -> Table:
    """The metrics available in a hybrid model's layers with and without attention."""
    table = Table(
        title="What can be measured in each layer",
        caption="elsewhere these metrics are undefined (nan), shown as –",
        title_justify="left",
    )
    for column in ("layers", "block", "metrics"):
        table.add_column(column)
    mixer = caps.elsewhere.get("attn_out", "").removeprefix("blocks.{layer}.").split(".")[0]
    others = [layer for layer in range(caps.n_layers) if layer not in caps.attending]
    without = "no attention" + (f" ({mixer})" if mixer else "")
    for layers, block in ((caps.attending, "attention"), (others, without)):
        table.add_row(_spans(layers), block, ", ".join(caps.measured_at(layers[0])))
    return table


def _signals(caps: Capabilities) -> Table:
    table = Table(
        title="Checked hook points",
        caption=f"{len(caps.hooks)} hook points fire in all",
        title_justify="left",
    )
    table.add_column("signal", no_wrap=True)
    table.add_column("hook point")
    for signal, hook in caps.signals.items():
        table.add_row(signal, Text(hook))
    return table
