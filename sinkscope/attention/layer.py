"""One attention layer inside `streaming`: its overrides, and the order of its hook points.

The changes depend on how the stock bridge computes attention:

delegated
    `AttentionBridge` (BERT, OPT, …) calls transformers' own attention module, which calls our
    registered attention function.
split (re-implemented, separate projections)
    `PositionEmbeddingsAttentionBridge` (Llama, Gemma, gpt-oss, …) computes scores itself. Its
    `forward` is overridden to call transformers' module too, whose projections and norms *are* the
    bridge's submodules, so that their hook points fire. Details that a re-implementation may miss
    (scale, softcap, learned sinks, multipliers) are then correct by construction. The hook points
    that only the re-implementation fires are fired here. If the query projection also gives a gate
    for each head, as in Qwen3-Next and Qwen3.5, ``hook_q_gate`` is fired at its output. Falcon-H1
    multiplies its keys by a constant before ``hook_k``; here the key projection does.
    Subclasses without rotation in some layers (SmolLM3, Cohere2, EXAONE 4) need no further changes,
    since transformers' module handles it.
fused (re-implemented, one projection for q, k and v)
    `JointQKVAttentionBridge` (GPT-2, NeoX, Phi-3, Falcon, BLOOM, MPT, …) splits the fused weight at
    boot; transformers' module would bypass q, k and v. Only its method `_reconstruct_attention` is
    overridden, which takes q, k and v after their hooks. The position bias of ALiBi is among its
    arguments.

latent
    `MLAAttentionBridge` (DeepSeek-V2 and V3, Youtu) is re-implemented too, and overridden to call
    transformers' module like the split ones. Its queries, keys and values in the dot product are
    ``hook_q``, ``hook_k`` and ``hook_v``; ``hook_rot_q`` and ``hook_rot_k`` are the rotated
    channels at their ends. A KV cache stores the keys and values of every head, as in the stock
    bridge; transformers' module would store latents and recompute keys and values at each step,
    which would lose edits of earlier steps.

A few delegated modules call no attention function. GPT-Neo and GPT-J have a method ``_attn``
instead, which is overridden; XGLM's `forward` is re-implemented here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import BloomAttentionBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.mpt_alibi_attention import (
    MPTALiBiAttentionBridge,
)

from sinkscope.attention.attend import Attended, attend, attend_densely
from sinkscope.attention.bypass import show_as_stock, show_latents
from sinkscope.attention.call import AttentionCall
from sinkscope.attention.hooks import has_hooks
from sinkscope.attention.kv_cache import cache_in
from sinkscope.attention.masks import MaskSpec
from sinkscope.attention.overrides import Overrides
from sinkscope.attention.support import (
    core_module,
    entering,
    kind_of,
    refuse_forked_inputs,
    rescales_keys,
)
from sinkscope.errors import UnsupportedError


class StreamingLayer:
    """The attention of one block while its bridge streams.

    Args:
        index: Index of the block.
        attn: Its attention component, accepted by `support.attention_of`.
        calls: Maps a layer to its last call; updated at each call.

    Attributes:
        kernel: Function that computes the layer's attention unless the pattern is materialised.
    """

    def __init__(self, index: int, attn: AttentionBridge, calls: dict[int, AttentionCall]) -> None:
        self.attn = attn
        self.core = core_module(attn)
        self._index = index
        self._calls = calls
        self._kind = kind_of(attn)
        self._names = entering(attn)
        self._keys_have_fired = False
        self._enter_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.kernel: Callable[[Tensor, Tensor, Tensor, AttentionCall], Attended] = attend

    def override(self, overrides: Overrides) -> None:
        """Override the methods named in the module docstring."""
        if self._kind == "fused":
            overrides.attribute(self.attn, "_reconstruct_attention", self._reconstruct)
            return
        if hasattr(self.core, "_attn"):
            overrides.attribute(self.core, "_attn", self._attend_causally)
        elif type(self.core).__name__ == "XGLMAttention":
            overrides.attribute(self.core, "forward", self._attend_as_xglm)
        overrides.attribute(self.attn, "forward", self._delegate)
        if self._kind == "split":
            overrides.attribute(self.attn.o, "forward", self._project)
            if "hook_q_gate" in self.attn._modules:
                overrides.attribute(self.attn.q, "forward", self._project_queries_and_gates)
            if rescales_keys(self.attn):
                self._key_multiplier = self.core.key_multiplier
                overrides.attribute(self.core, "key_multiplier", 1.0)
                overrides.attribute(self.attn.k, "forward", self._project_rescaled_keys)
            show_as_stock(self.attn, overrides)
        elif self._kind == "latent":
            overrides.attribute(self.attn.o, "forward", self._project)
            overrides.attribute(self.attn.kv_b_proj, "forward", self._project_latents)
            show_latents(self.attn, overrides)

    def attend(
        self,
        query: Float[Tensor, "prompt head query d_head"],
        key: Float[Tensor, "prompt kv_head key d_head"],
        value: Float[Tensor, "prompt kv_head key d_value"],
        mask: MaskSpec | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> Float[Tensor, "prompt query head d_value"]:
        """The attention function that transformers' module calls."""
        if torch.is_autocast_enabled(query.device.type):
            # Rotary embedding may leave queries and keys in float32; kernels need equal dtypes.
            query, key = query.to(value.dtype), key.to(value.dtype)
        query = self._fire_query(query)
        if not self._keys_have_fired:
            key, value = self._fire_keys(key, value)
        if self._enter_cache is not None:
            key, value = self._enter_cache(key, value)
        call = describe(self.core, query, key, mask, scaling, **options)
        return self._attend(query, key, value, call, dropout)

    def _attend_causally(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Float[Tensor, "prompt head query d_value"], None]:
        """``_attn`` of GPT-Neo, some of whose layers have a window, and of GPT-J."""
        core = self.core
        query = self._fire_query(query)
        if not self._keys_have_fired:
            key, value = self._fire_keys(key, value)
        call = describe(core, query, key, attention_mask, 1.0 / getattr(core, "scale_attn", 1.0))
        local = getattr(core, "attention_type", "global") == "local"
        # The module has its own causal buffer, independent of the mask.
        call = replace(
            call,
            causal=True,
            window=core.config.window_size if local else None,
            offset=key.shape[2] - query.shape[2],
            prescale=1.0,
        )
        z = self._attend(query, key, value, call, _dropout(core))
        return rearrange(z, "b q h d -> b h q d"), None

    def _attend_as_xglm(
        self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """``forward`` of XGLM's attention."""
        core, width = self.core, self.core.head_dim
        query = core.q_proj(hidden_states) * core.scaling
        key, value = core.k_proj(hidden_states), core.v_proj(hidden_states)
        query, key, value = (
            rearrange(x, "b t (h d) -> b h t d", d=width) for x in (query, key, value)
        )
        cache = cache_in(kwargs)
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            key, value = cache.update(key, value, core.layer_idx)
        dropout = float(core.dropout) if core.training else 0.0
        z = self.attend(query, key, value, attention_mask, 1.0, dropout)
        return core.out_proj(rearrange(z, "b q h d -> b q (h d)")), None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, dropout: float
    ) -> Float[Tensor, "prompt query head d_value"]:
        attn = self.attn
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads or value.shape[1] != kv_heads:  # kernels may crash on that
            raise UnsupportedError(
                f"Layer {self._index} has {heads} heads of queries, {kv_heads} of keys and "
                f"{value.shape[1]} of values after its hooks; an edit must keep the shape."
            )
        self._calls[self._index] = call
        if dropout or materialises(attn):
            hooks = attn.hook_attn_scores, attn.hook_pattern
            z, lse = attend_densely(query, key, value, call, *hooks, dropout)
        else:
            z, lse = self.kernel(query, key, value, call)
        if has_hooks(attn.hook_lse) and attn.hook_lse(lse) is not lse:
            warnings.warn(
                f"A hook on blocks.{self._index}.attn.hook_lse returned a tensor; hook_lse is "
                "read-only, so it was ignored. Edit hook_attn_scores or hook_pattern instead.",
                UserWarning,
                stacklevel=2,
            )
        return z

    def _point(self, index: int) -> HookPoint:
        """The hook point of queries, keys or values in the dot product."""
        return getattr(self.attn, self._names[index])

    def _fire_query(self, query: Tensor) -> Tensor:
        if self._kind == "latent":
            query = self._with_rotated(self.attn.hook_rot_q, query)
        return self._point(0)(query)

    def _fire_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._kind == "latent":
            key = self._with_rotated(self.attn.hook_rot_k, key, shared=True)
        return self._point(1)(key), self._point(2)(value)

    def _with_rotated(self, point: HookPoint, x: Tensor, shared: bool = False) -> Tensor:
        """Fire the rotated channels, which are last; those of the keys are shared by all heads."""
        if not has_hooks(point):
            return x
        width = int(self.core.qk_rope_head_dim)
        plain, rotated = x[..., :-width], x[..., -width:]
        rotated = point(rotated[:, :1] if shared else rotated)
        return torch.cat([plain, rotated.expand(*plain.shape[:-1], -1)], dim=-1)

    def _delegate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' module, and fire hook points of the bridge's re-implementation."""
        if self._kind == "split":
            refuse_forked_inputs(self.attn)
        if self._kind in ("split", "latent"):
            rotary = kwargs.get("position_embeddings")
            if rotary is not None and self._rotates():
                rotary = self.attn._apply_position_embedding_hooks(rotary)
                kwargs["position_embeddings"] = rotary
        with self._keys_fire_into(cache_in(kwargs)):
            return AttentionBridge.forward(self.attn, *args, **kwargs)

    def _rotates(self) -> bool:
        """Whether this layer applies rotary embeddings, which the model passes to every layer."""
        if not getattr(self.attn, "rope_optional", False):
            return True
        without = getattr(self.attn, "_is_nope_layer", None)
        return bool(self.core.use_rope) if without is None else not without()

    @contextmanager
    def _keys_fire_into(self, cache: Any) -> Iterator[None]:
        """Fire keys and values when they enter a KV cache, as in the stock bridge.

        The attention function also receives cached ones, and edits there would not be cached.
        """
        caches_latents = self._kind == "latent" and hasattr(self.core, "expand_kv")
        hooked = has_hooks(self._point(1)) or has_hooks(self._point(2))
        if cache is None or not (hooked or caches_latents):
            yield
            return
        cache = getattr(cache, "self_attention_cache", cache)
        update = cache.update

        def fire(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self._keys_have_fired = True
            return update(*self._fire_keys(key, value), *args, **kwargs)

        def wait(latent: Tensor, rotated: Tensor, *args: Any, **_: Any) -> tuple[Tensor, Tensor]:
            self._enter_cache = lambda key, value: update(key, value, *args)
            return latent, rotated

        overrides = Overrides()
        overrides.attribute(cache, "update", wait if caches_latents else fire)
        try:
            yield
        finally:
            overrides.undo()
            self._keys_have_fired, self._enter_cache = False, None

    def _reconstruct(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """`JointQKVAttentionBridge._reconstruct_attention` with our kernel."""
        attn = self.attn
        n_heads = attn.config.n_heads
        n_kv_heads = getattr(attn.config, "n_key_value_heads", None) or n_heads
        clip = getattr(attn, "_clip_qkv", None)  # MPT's
        if clip:
            q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
        query, key, value, *_ = attn._reshape_qkv_to_heads(q, k, v, n_heads, n_kv_heads)
        rotary = kwargs.get("position_embeddings")
        if rotary is not None and hasattr(attn, "_apply_rotary_pos_emb"):
            cos, sin = attn._apply_position_embedding_hooks(rotary)
            query, key = attn._apply_rotary_pos_emb(query, key, cos, sin)
        query = self._fire_query(query)
        key, value = attn._update_kv_cache(*self._fire_keys(key, value), **kwargs)
        scaling = getattr(self.core, "scaling", getattr(self.core, "softmax_scale", None))
        mask = kwargs.get("attention_mask")
        if isinstance(attn, MPTALiBiAttentionBridge) and isinstance(mask, Tensor):
            mask = ~mask  # there True means masked
        call = describe(self.core, query, key, mask, scaling)
        call = replace(call, key_bias=_alibi(attn, kwargs, key, call.scale))
        z = self._attend(query, key, value, call, _dropout(self.core))
        return self._project(rearrange(z, "b q h d -> b q (h d)")), None

    def _project_queries_and_gates(
        self, x: Float[Tensor, "prompt position d_model"]
    ) -> Float[Tensor, "prompt position width"]:
        """The query projection of Qwen3-Next and Qwen3.5, which also gives each head's gate.

        The gate before its sigmoid is fired before transformers' module splits it off, so that
        edits take effect.
        """
        attn, q = self.attn, self.attn.q
        both = type(q).forward(q, x)
        if not has_hooks(attn.hook_q_gate):
            return both
        per_head = rearrange(both, "b t (h two d) -> b t h two d", two=2, d=self.core.head_dim)
        query, gate = per_head.unbind(3)
        edited = attn.hook_q_gate(rearrange(gate, "b t h d -> b t (h d)"))
        gate = rearrange(edited, "b t (h d) -> b t h d", d=self.core.head_dim)
        return rearrange(torch.stack([query, gate], 3), "b t h two d -> b t (h two d)")

    def _project_rescaled_keys(
        self, x: Float[Tensor, "prompt position d_model"]
    ) -> Float[Tensor, "prompt position width"]:
        """The key projection of Falcon-H1 with the factor that transformers' module applies to it.

        ``hook_k`` shows the product, so that edits take effect; ``k.hook_out`` does not include the
        factor, as in the stock bridge.
        """
        k = self.attn.k
        return self.attn.hook_k(type(k).forward(k, x) * self._key_multiplier)

    def _project_latents(self, x: Float[Tensor, "prompt *one position latent"]) -> Tensor:
        """The projection to keys and values, in the layout of the stock bridge.

        In transformers the latent has an additional head axis of length one.
        """
        up = self.attn.kv_b_proj
        return type(up).forward(up, x.squeeze(1) if x.ndim == 4 else x)

    def _project(self, z: Float[Tensor, "prompt position width"]) -> Tensor:
        """The output projection; per head if ``hook_result`` is enabled."""
        attn, o = self.attn, self.attn.o
        if not getattr(attn.config, "use_attn_result", False):
            return o(z) if self._kind == "fused" else type(o).forward(o, z)
        n_heads = attn.config.n_heads
        per_head = rearrange(o.hook_in(z), "b q (h d) -> b q h d", h=n_heads)
        return attn._compute_per_head_result(per_head, n_heads, per_head.shape[-1])


def _alibi(
    attn: AttentionBridge, kwargs: dict[str, Any], key: Tensor, scale: float
) -> Float[Tensor, "_ head key"] | None:
    """The ALiBi bias of the scores, from the arguments of BLOOM's, Falcon's or MPT's attention."""
    n_keys = key.shape[2]
    if kwargs.get("position_bias") is not None:  # MPT's, which ends at the last key
        return rearrange(kwargs["position_bias"][..., -n_keys:], "h 1 k -> 1 h k")
    if kwargs.get("alibi") is None:
        return None
    bias = rearrange(kwargs["alibi"], "(b h) 1 k -> b h k", b=len(key))[..., :n_keys].float()
    return bias if isinstance(attn, BloomAttentionBridge) else bias * scale  # Falcon's


def materialises(attn: AttentionBridge) -> bool:
    """Whether the scores or the pattern are hooked."""
    return has_hooks(attn.hook_attn_scores) or has_hooks(attn.hook_pattern)


def describe(
    core: nn.Module,
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    mask: MaskSpec | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, "head"] | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> AttentionCall:
    """An `AttentionCall` from the arguments of transformers' attention functions.

    Raises:
        UnsupportedError: If the module adds a position bias to its scores.
    """
    if position_bias is not None:
        raise UnsupportedError(
            f"{type(core).__name__} adds a position bias to its scores, which streaming attention "
            "does not take: use eager attention."
        )
    fixed: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        learned_sink=s_aux,
        prescale=getattr(core, "scaling", None) or 1.0 if scaling == 1.0 else 1.0,
        _keys=weakref.ref(key),
    )
    n_queries, n_keys = query.shape[2], key.shape[2]
    if isinstance(mask, MaskSpec):
        return AttentionCall(
            causal=mask.causal,
            window=mask.window,
            mask=mask.padding,
            offset=mask.offset,
            **fixed,
        )
    if mask is not None:
        # A mask with four axes is complete and includes causality.
        return AttentionCall(causal=False, mask=mask[..., :n_keys], **fixed)
    causal = getattr(core, "is_causal", True) if is_causal is None else is_causal
    return AttentionCall(causal=causal, window=sliding_window, offset=n_keys - n_queries, **fixed)


def _dropout(core: nn.Module) -> float:
    """Dropout on the pattern, which is a module or a number in transformers."""
    if not core.training:
        return 0.0
    dropout = getattr(core, "attn_dropout", getattr(core, "attention_dropout", 0.0))
    return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout)
