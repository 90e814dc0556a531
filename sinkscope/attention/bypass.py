"""Shortcuts that avoid the overhead of bridge components whose inner hook points are not in use.

A bridge component costs tens of microseconds per call: its own module call around the wrapped one,
contexts for offloaded weights, inspection of signatures, a dozen hook points. On a fast GPU this
dispatch takes longer than the forward pass of a billion-parameter model.

Inside `streaming`, a transformers module that looks up a child finds a `Shortcut`: a plain callable
that fires the component's ``hook_in`` and ``hook_out`` if they are hooked, calls the wrapped module
between them, and falls back to the component if any other part of it is in use. This is decided at
each call, so hooks may be added and removed at any time. Registered modules are unchanged: a
shortcut is stored in the parent's ``__dict__``, which takes precedence.

Norms are treated first: the stock bridge computes two statistics next to each of them, and query
and key norms fire hook points in a different layout. The shortcuts follow, one class for each kind
of component that needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import generalized_components as components
from transformer_lens.model_bridge.generalized_components import block
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from sinkscope.attention.hooks import has_hooks, hooks_of
from sinkscope.attention.kv_cache import cache_in
from sinkscope.attention.overrides import Overrides
from sinkscope.attention.support import kind_of


def skip_unread_statistics(bridge: nn.Module, overrides: Overrides) -> None:
    """Skip the statistics of norms whose ``hook_scale`` and ``hook_normalized`` are not hooked.

    The stock bridge computes both, in float32, next to transformers' own norm, which accounts for
    most of the measured overhead of a bridge on a GPU.
    """
    for module in bridge.modules():
        if not isinstance(module, NormalizationBridge):
            continue
        if module.original_component is None:
            continue
        overrides.attribute(module, "_hf_autograd_forward_with_hooks", _Native(module, "native"))
        if _same_as_native(module):
            overrides.attribute(module, "_python_norm_forward", _Native(module, "python"))


class _Native:
    """The forward pass of a norm: the wrapped norm's own unless a statistic is hooked."""

    def __init__(self, norm: NormalizationBridge, path: str) -> None:
        self._norm = norm
        self._stock = {
            "native": type(norm)._hf_autograd_forward_with_hooks,
            "python": type(norm)._python_norm_forward,
        }[path]

    def __call__(self, x: Tensor) -> Tensor:
        norm = self._norm
        if has_hooks(norm.hook_scale) or has_hooks(norm.hook_normalized):
            return self._stock(norm, x)
        return norm.original_component(x).to(x.dtype)


def runs_natively(norm: NormalizationBridge) -> bool:
    """Whether a norm without inner hooks equals the wrapped module."""
    folded = getattr(norm.config, "layer_norm_folding", False)
    return norm.use_native_layernorm_autograd or folded or _same_as_native(norm)


def _same_as_native(norm: NormalizationBridge) -> bool:
    """Whether the bridge's re-implementation of LayerNorm equals the wrapped module."""
    native = norm.original_component
    return (
        type(norm) is NormalizationBridge
        and isinstance(native, nn.LayerNorm)
        and not norm.uses_rms_norm
        and not norm.uses_weight_offset
        and native.eps == getattr(norm.config, "eps", 1e-5)
    )


def show_as_stock(attn: AttentionBridge, overrides: Overrides) -> None:
    """Make query and key norms fire their hook points as the bridge's re-implementation does."""
    for name in ("q_norm", "k_norm"):
        norm = attn._modules.get(name)
        hook = attn._modules.get(f"hook_{name[0]}_normed")
        if norm is not None and hook is not None:
            overrides.attribute(norm, "forward", _Positioned(attn, norm, hook))


class _Positioned:
    """A query or key norm whose hook points have the layout of the stock bridge.

    transformers applies it to [prompt position head d_head] or [prompt head position d_head],
    depending on the model; the hook points of the stock bridge always have the latter layout
    (except for norms with a weight for each head), and ``hook_q_normed`` / ``hook_k_normed`` fire
    after the norm.
    """

    def __init__(self, attn: AttentionBridge, norm: nn.Module, hook: HookPoint) -> None:
        self.points = [hook, norm.hook_in, norm.hook_out]
        self._norm = norm
        self._hook = hook
        self._flat = attn._qk_norm_phase == "pre_reshape"
        self._per_head = attn._qk_norm_per_head
        # Hunyuan's norms follow the rotation, with heads first like the stock bridge.
        self._rotated = bool(getattr(attn.config, "qk_norm_after_rope", False))

    def __call__(self, x: Float[Tensor, "prompt _ *_"], **kwargs: Any) -> Tensor:
        run = type(self._norm).forward
        if self._flat or self._rotated:
            return self._hook(run(self._norm, x))
        if self._per_head:
            return self._hook(run(self._norm, x).transpose(1, 2)).transpose(1, 2)
        if not _positions_first(x):
            return self._hook(run(self._norm, x))
        return self._hook(run(self._norm, x.transpose(1, 2))).transpose(1, 2)


def _positions_first(x: Float[Tensor, "prompt _ _ d_head"]) -> bool:
    """Whether axis 1 is positions, which have longer strides than heads."""
    if x.stride(1) == x.stride(2):  # one head: its axis is the one of size 1
        return x.shape[1] != 1
    return x.stride(1) > x.stride(2)


def show_latents(attn: AttentionBridge, overrides: Overrides) -> None:
    """Make the norms of latents fire ``hook_q_latent`` and ``hook_kv_latent`` after them."""
    for name, hook in (("q_a_layernorm", "hook_q_latent"), ("kv_a_layernorm", "hook_kv_latent")):
        norm = attn._modules.get(name)
        if getattr(norm, "original_component", None) is not None:
            overrides.attribute(norm, "forward", _Followed(norm, attn._modules[hook]))


class _Followed:
    """A norm followed by a hook point of its attention."""

    def __init__(self, norm: nn.Module, hook: HookPoint) -> None:
        self.points = [hook]
        self._norm = norm

    def __call__(self, x: Float[Tensor, "prompt position latent"], **kwargs: Any) -> Tensor:
        return self.points[0](type(self._norm).forward(self._norm, x, **kwargs))


def take_shortcuts(bridge: Any, overrides: Overrides) -> None:
    """Install a shortcut for every component that supports one."""
    for parent in bridge.original_model.modules():
        if isinstance(parent, GeneralizedComponent):
            continue
        for name, child in parent._modules.items():
            if isinstance(child, nn.ModuleList):
                shortcuts = [shortcut_for(bridge, member) for member in child]
                if shortcuts and None not in shortcuts:
                    # The model uses it as a list: iteration, slices, length.
                    overrides.attribute(parent, name, shortcuts)
            elif (shortcut := shortcut_for(bridge, child)) is not None:
                overrides.attribute(parent, name, shortcut)


class Shortcut:
    """A component's forward pass, reduced to its wrapped module and its two outer hook points.

    Args:
        component: The component.
        inner: Its other hook points, which only its own forward pass fires.
        busy: Whether its own forward pass must run for other reasons.
    """

    __slots__ = ("_before", "_busy", "_component", "_hooked", "_in", "_original", "_out")

    def __init__(
        self,
        component: GeneralizedComponent,
        inner: list[HookPoint],
        busy: Callable[[], Any] | None = None,
    ) -> None:
        self._component = component
        self._original = component.original_component
        self._in = component.hook_in
        self._out = component.hook_out
        self._busy = busy
        # torch's dictionaries of hooks are read directly, as this runs at every call.
        self._before = component._forward_pre_hooks
        self._hooked = [component._forward_hooks, component._backward_hooks]
        self._hooked.append(component._backward_pre_hooks)
        for point in inner:
            self._hooked += hooks_of(point)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the component."""
        if self._must_run():
            return self._component(*args, **kwargs)
        if has_hooks(self._in):
            args, kwargs = _with_first(self._in, args, kwargs)
        output = self._original(*args, **kwargs)
        if not has_hooks(self._out):
            return output
        # Otherwise an MLP fires the hook of its output projection a second time.
        self._component.__dict__["_fired_hook_out"] = True
        if isinstance(output, tuple):
            return (self._out(output[0]), *output[1:])
        return self._out(output)

    def __getattr__(self, name: str) -> Any:
        """Forward all other attributes to the component."""
        return getattr(self._component, name)

    def _must_run(self) -> bool:
        for hooks in self._hooked:
            if hooks:
                return True
        # Blocks hook some of their norms themselves, to set flags that `busy` reads.
        if self._before and any(h.__module__ != block.__name__ for h in self._before.values()):
            return True
        return self._busy is not None and bool(self._busy())


class _NormShortcut(Shortcut):
    """A shortcut for a norm, whose output keeps the dtype of its input."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().__call__(x, *args, **kwargs)
        return output if output.dtype is x.dtype else output.to(x.dtype)


def shortcut_for(bridge: Any, component: nn.Module | None) -> Shortcut | None:
    """A shortcut for a component, or None if its kind does not support one."""
    if getattr(component, "original_component", None) is None:
        return None
    kind = type(component)
    if kind in _PROJECTIONS:
        return _projection(bridge, component)
    if kind in _NORMS and runs_natively(component):
        return _norm(bridge, component)
    if kind in _MLPS:
        return _mlp(bridge, component)
    if kind in _BLOCKS:
        return Shortcut(component, [], lambda: _stops_or_starts(component.__dict__))
    if isinstance(component, components.AttentionBridge) and kind_of(component) != "fused":
        return _attention(bridge, component)
    return None


_PROJECTIONS = (components.LinearBridge, components.Conv1DBridge)
_NORMS = (components.NormalizationBridge, components.RMSNormalizationBridge)
_MLPS = (components.MLPBridge, components.GatedMLPBridge)
_BLOCKS = (block.BlockBridge, block.ParallelBlockBridge, block.DelegatedAttentionBlockBridge)


def _projection(bridge: Any, projection: GeneralizedComponent) -> Shortcut | None:
    own = projection.__dict__.get("forward")  # see `StreamingLayer.override`
    if own is not None and own.__name__ in ("_project_latents", "_project_rescaled_keys"):
        return None
    if own is not None and own.__name__ == "_project_queries_and_gates":
        return Shortcut(projection, [own.__self__.attn.hook_q_gate])
    if own is not None:  # W_O
        return Shortcut(projection, [], lambda: bridge.cfg.use_attn_result)
    return Shortcut(projection, [], lambda: projection._suppress_next_hook_in)


def _norm(bridge: Any, norm: components.NormalizationBridge) -> Shortcut:
    inner = [norm.hook_scale, norm.hook_normalized]
    if "forward" in norm.__dict__:  # see `show_as_stock` and `show_latents`
        inner += norm.__dict__["forward"].points
    return _NormShortcut(norm, inner, lambda: _forks(bridge.cfg))


def _mlp(bridge: Any, mlp: GeneralizedComponent) -> Shortcut:
    # It fires its projections' outer hook points itself if they are not called as modules.
    projections = mlp._modules.get("in"), mlp._modules.get("out")
    inner = [part.hook_in for part in projections[:1] if part is not None]
    inner += [part.hook_out for part in projections[1:] if part is not None]
    inner = inner if type(mlp) is components.MLPBridge else []
    own = mlp.__dict__
    return Shortcut(mlp, inner, lambda: own.get("_use_processed_weights") or _forks(bridge.cfg))


def _attention(bridge: Any, attn: components.AttentionBridge) -> Shortcut:
    inner = [attn._modules[name] for name in ("hook_cos", "hook_sin") if name in attn._modules]
    return _AttentionShortcut(attn, inner, lambda: _forks(bridge.cfg))


class _AttentionShortcut(Shortcut):
    """A shortcut for attention, which fires keys when they enter a KV cache."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if cache_in(kwargs) is not None:
            return self._component(*args, **kwargs)
        return super().__call__(*args, **kwargs)


def _stops_or_starts(own: dict[str, Any]) -> bool:
    stop, start = own.get("_stop_at_layer_idx"), own.get("_start_at_layer_idx")
    return stop is not None or start is not None


def _forks(cfg: Any) -> bool:
    """Whether inputs are forked for hook points that are off by default."""
    return cfg.use_hook_mlp_in or cfg.use_attn_in or cfg.use_split_qkv_input or cfg.use_attn_result


def _with_first(
    point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the input through a hook point, whether it is a positional or keyword argument."""
    if args:
        return (point(args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: point(kwargs[name])}
