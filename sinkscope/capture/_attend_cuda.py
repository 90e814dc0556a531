"""Attention with its log-sum-exp on CUDA: the choice of kernel.

In half precision cuDNN was the fastest measured on an H100, flash attention takes what it refuses
(heads up to 256 wide, windows, a KV cache), and our Triton kernel takes what no library kernel does
(softcaps, padding, windows in float32). Only a mask with a row for each query is left to tiles.
"""

from __future__ import annotations

from functools import cache

import torch
from einops import repeat
from torch import Tensor

from sinkscope.capture._attend import (
    attend_in_tiles,
    is_plainly_causal,
    needs_gradient,
    sees_everything,
)
from sinkscope.capture._calls import AttentionCall
from sinkscope.capture._kernels import kernels_for

HALF = (torch.bfloat16, torch.float16)
CUDNN_WIDTH = 128
FLASH_WIDTH = 256


def attend_cuda(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Return z [prompt query head d_value] and log-sum-exp [prompt head query], no learned sink."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    causal = is_plainly_causal(call, n_queries, n_keys)
    if fused_kernels_take(query, value, call):
        half = query.dtype in HALF
        if causal or sees_everything(call, n_queries, n_keys):
            attend = _cudnn_or_flash if half else _efficient
            return attend(query, key, value, call.scale, causal)
        if half and call.mask is None and call.offset == n_keys - n_queries:
            return _flash_banded(query, key, value, call)
    kernels = kernels_for(query, call)
    if kernels is None or needs_gradient(query, key, value):
        return attend_in_tiles(query, key, value, call)
    return kernels.forward(query, key, value, call)


def fused_kernels_take(query: Tensor, value: Tensor, call: AttentionCall) -> bool:
    """Whether a library kernel could compute this call, whoever sees whom."""
    width = query.shape[-1]
    return (
        call.softcap is None
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= FLASH_WIDTH
        and query.dtype in (*HALF, torch.float32)
    )


def _cudnn_or_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if query.shape[-1] <= CUDNN_WIDTH and _has_cudnn_attention(query.device):
        z, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return z.transpose(1, 2), lse.squeeze(-1) if lse.ndim == 4 else lse
    z, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return z.transpose(1, 2), lse


def _flash_banded(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Flash attention whose queries are the last of the keys, each with a window of its own."""
    far = -1 if call.window is None else call.window - 1
    z, lse, *_ = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        call.causal,
        False,
        scale=call.scale,
        window_size_left=far,
        window_size_right=0 if call.causal else far,
    )
    return z, lse


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The one library kernel for float32; it wants every head to have its own keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "b k t d -> b (k g) t d", g=group) for x in (key, value))
    z, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return z.transpose(1, 2), lse[:, :, : query.shape[2]]


@cache
def _has_cudnn_attention(device: torch.device) -> bool:
    """Whether cuDNN's attention runs here: asked of it once, since its limits change by version."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    probe = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16, device=device)
    try:
        torch.ops.aten._scaled_dot_product_cudnn_attention(
            probe, probe[:, :1], probe[:, :1], None, True, 0.0, True, False, scale=1.0
        )
    except RuntimeError:
        return False
    return True
