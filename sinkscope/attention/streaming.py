"""`with streaming(bridge):` attention by a fused kernel, with all hook points.

The stock bridge materialises T×T scores and a T×T pattern in each layer. Inside this context
attention runs through a fused kernel, with hook points for the queries, keys and values of the dot
product and for the log-sum-exp of every query's scores. As A_ij = exp(s_ij − lse_i), any column,
sum or entropy of the pattern can be computed without the rest of it. Layers where
``hook_attn_scores`` or ``hook_pattern`` is hooked still materialise them, and edits take effect.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from sinkscope.attention.bypass import skip_unread_statistics, take_shortcuts
from sinkscope.attention.call import AttentionCall
from sinkscope.attention.hooks import HeadsLast
from sinkscope.attention.layer import StreamingLayer, materialises
from sinkscope.attention.masks import MaskSpec, streaming_mask
from sinkscope.attention.overrides import Overrides
from sinkscope.attention.support import attention_of, entering
from sinkscope.attention.upstream import mended
from sinkscope.errors import ModelError, UnsupportedError

__all__ = ["AttentionCall", "Stream", "streaming"]

IMPLEMENTATION = "sinkscope_streaming"
"""Name under which our attention and mask functions are registered in transformers."""

_layers: dict[nn.Module, StreamingLayer] = {}
_streams: dict[nn.Module, Stream] = {}
_guard = threading.RLock()
"""Lock for entering and exiting contexts, which write to tables shared by all streams."""


@contextmanager
def streaming(bridge: TransformerBridge) -> Iterator[Stream]:
    """Run a bridge's attention through a fused kernel that also gives the log-sum-exp.

    Inside, on every architecture that can stream, these hook points fire in each block:
    ``attn.hook_rot_q``, ``attn.hook_rot_k`` and ``attn.hook_rot_v`` [prompt position (kv_)head
    d_head], the inputs of the dot product (in multi-head latent attention, where two of these names
    denote the rotated channels only, ``attn.hook_q``, ``attn.hook_k`` and ``attn.hook_v``), and
    ``attn.hook_lse`` [prompt head query]: float32, the log of the softmax's denominator, learned
    sink included, so that A_ij = exp(s_ij − lse_i) on every model (-inf for a query without visible
    keys). It is read-only and has no gradient. Hook points that the bridge lacks exist, under the
    usual names, until the context ends. All other hook points fire as on the stock bridge and edits
    take effect; ``hook_attn_scores`` and ``hook_pattern`` are materialised in the layers where one
    of them is hooked.

    A nested context on the same bridge does nothing, and a copy made inside is a plain bridge. The
    bridge is restored on exit, also after an exception (except that it keeps accepting the KV cache
    under transformers' new name).

    Args:
        bridge: Any bridge of a causal or bidirectional transformers model.

    Yields:
        The stream; ``stream.calls[layer]`` is that layer's last call.

    Raises:
        UnsupportedError: On entry, if the architecture's attention cannot be streamed exactly.
        ModelError: On entry, if it is not a bridge.

    Examples:
        >>> with streaming(bridge) as stream:  # doctest: +SKIP
        ...     bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_lse", read)])
    """
    if not isinstance(bridge, TransformerBridge):
        raise ModelError(
            f"streaming() takes a TransformerBridge, not a {type(bridge).__name__}; "
            "load_model(...) makes one."
        )
    if bridge in _streams:
        yield _streams[bridge]
        return
    with _guard:
        stream = Stream(mended(bridge))
        stream._begin()
    try:
        yield stream
    finally:
        with _guard:
            stream._end()


class Stream:
    """An active streaming context.

    Attributes:
        bridge: The bridge.
        calls: The last attention call of each layer.
        layers: The layers with attention; their `kernel` may be replaced until the context ends.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        self.calls: dict[int, AttentionCall] = {}
        self.layers: dict[int, StreamingLayer] = {}
        self._overrides = Overrides()
        self._attention = attention_of(bridge)
        # Kept, with the user's hooks, while a copy interrupts the context.
        self._points = {at: _missing_points(attn) for at, attn in self._attention.items()}

    def materialises(self, layer: int) -> bool:
        """Whether a layer computes scores and pattern, because one of them is hooked."""
        return materialises(self._attention[layer])

    def _begin(self) -> None:
        _streams[self.bridge] = self
        try:
            self._override()
        except BaseException:
            self._end()
            raise

    def _override(self) -> None:
        change = self._overrides.attribute
        # A cache of names that is only validated by the size of the registry.
        change(self.bridge, "_block_alias_cache", None)
        change(self.bridge, "__deepcopy__", self._copy_plain)
        for index, attn in self._attention.items():
            self._add_points(index)
            layer = StreamingLayer(index, attn, self.calls)
            layer.override(self._overrides)
            _layers[layer.core] = self.layers[index] = layer
        skip_unread_statistics(self.bridge, self._overrides)
        take_shortcuts(self.bridge, self._overrides)
        self._switch_implementation()
        AttentionInterface.register(IMPLEMENTATION, streaming_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, streaming_mask)

    def _end(self) -> None:
        _streams.pop(self.bridge, None)
        own = {id(attn) for attn in self._attention.values()}
        for core in [core for core, layer in _layers.items() if id(layer.attn) in own]:
            del _layers[core]
        for index in self._attention:
            self._remove_points(index)
        self._overrides.undo()
        if not _streams:
            AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
            AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)

    def _copy_plain(self, memo: dict[int, Any]) -> TransformerBridge:
        """Copy the bridge without this context, which would never end for the copy."""
        self._end()
        try:
            return copy.deepcopy(self.bridge, memo)
        finally:
            self._begin()

    def _add_points(self, index: int) -> None:
        attn = self._attention[index]
        for name, point in self._points[index].items():
            point.name = f"blocks.{index}.attn.{name}"
            attn._modules[name] = point
            attn._hook_registry[name] = point
            self.bridge._hook_registry[point.name] = point

    def _remove_points(self, index: int) -> None:
        attn = self._attention[index]
        for name, point in self._points[index].items():
            attn._modules.pop(name, None)
            attn._hook_registry.pop(name, None)
            self.bridge._hook_registry.pop(point.name, None)

    def _switch_implementation(self) -> None:
        """Make the model's modules use our functions, through copies of their configs.

        transformers shares one config object between the modules of a model, and between models
        built from it, so that writing to it would affect those too.
        """
        own: dict[int, PreTrainedConfig] = {}
        model = self.bridge.original_model
        kinds = {type(getattr(core, "config", model.config)) for core in _layers}
        for module in model.modules():
            config = module.__dict__.get("config")
            if type(config) not in kinds:
                continue
            if id(config) not in own:
                own[id(config)] = copy.copy(config)
                # The property would also write to sub-configs, which the copy shares.
                own[id(config)]._attn_implementation_internal = IMPLEMENTATION
            self._overrides.attribute(module, "config", own[id(config)])


def _missing_points(attn: AttentionBridge) -> dict[str, HookPoint]:
    points = {}
    for name in (*entering(attn), "hook_lse"):
        if name in attn._modules:
            continue
        points[name] = HookPoint()
        if name == "hook_lse":
            points[name].pos_dim = 2
        else:
            points[name].hook_conversion = HeadsLast()
    return points


def streaming_attention(
    module: nn.Module,
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    attention_mask: MaskSpec | Tensor | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "prompt query head d_value"], None]:
    """The function registered in `AttentionInterface`; dispatches to the layer of `module`."""
    layer = _layers.get(module)
    if layer is None:
        raise UnsupportedError(
            f"{type(module).__name__} called streaming attention, but is not the attention of "
            "any block of a bridge that streams: use eager attention for this model."
        )
    return layer.attend(query, key, value, attention_mask, **options), None
