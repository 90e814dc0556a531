"""Norms while a bridge streams: in the layout hooks know, and without work that nobody reads."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from sinkscope.capture._overrides import Overrides
from sinkscope.capture._support import is_heard


def skip_unread_statistics(bridge: nn.Module, overrides: Overrides) -> None:
    """Let norms whose ``hook_scale`` and ``hook_normalized`` nobody hooked run alone.

    The stock bridge computes both, in float32, next to transformers' own norm: measured, most of
    what a bridge costs on a GPU.
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
    """A norm's computation that takes the wrapped norm's own when nothing is hooked."""

    def __init__(self, norm: NormalizationBridge, path: str) -> None:
        self._norm = norm
        self._stock = {
            "native": type(norm)._hf_autograd_forward_with_hooks,
            "python": type(norm)._python_norm_forward,
        }[path]

    def __call__(self, x: Tensor) -> Tensor:
        norm = self._norm
        if is_heard(norm.hook_scale) or is_heard(norm.hook_normalized):
            return self._stock(norm, x)
        return norm.original_component(x).to(x.dtype)


def runs_natively(norm: NormalizationBridge) -> bool:
    """Whether a norm with nothing hooked inside is what the wrapped module computes."""
    folded = getattr(norm.config, "layer_norm_folding", False)
    return norm.use_native_layernorm_autograd or folded or _same_as_native(norm)


def _same_as_native(norm: NormalizationBridge) -> bool:
    """Whether the bridge's from-scratch LayerNorm is what the wrapped module computes."""
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
    """A query or key norm seen in the layout that the stock bridge shows it in.

    transformers norms [prompt position head d_head] or [prompt head position d_head], whichever it
    likes; the stock bridge always shows the latter (except norms with a weight for each head), and
    fires ``hook_q_normed`` / ``hook_k_normed`` after the norm.
    """

    def __init__(self, attn: AttentionBridge, norm: nn.Module, hook: HookPoint) -> None:
        self.points = [hook, norm.hook_in, norm.hook_out]
        self._norm = norm
        self._hook = hook
        self._flat = attn._qk_norm_phase == "pre_reshape"
        self._per_head = attn._qk_norm_per_head

    def __call__(self, x: Float[Tensor, "prompt _ *_"], **kwargs: Any) -> Tensor:
        run = type(self._norm).forward
        if self._flat:
            return self._hook(run(self._norm, x))
        if self._per_head:
            return self._hook(run(self._norm, x).transpose(1, 2)).transpose(1, 2)
        if not _positions_first(x):
            return self._hook(run(self._norm, x))
        return self._hook(run(self._norm, x.transpose(1, 2))).transpose(1, 2)


def _positions_first(x: Float[Tensor, "prompt _ _ d_head"]) -> bool:
    """Whether axis 1 is positions: heads are cut out of a row, so positions have longer strides."""
    if x.stride(1) == x.stride(2):  # one head: its axis is the one of size 1
        return x.shape[1] != 1
    return x.stride(1) > x.stride(2)
