"""softmax(scores) @ v with the log of its denominator, by the fastest exact kernel.

Only kernels that return the log-sum-exp qualify, since every sink statistic is computed from it.

- `attend` selects the kernel: `attend_in_tiles` is the definition in plain torch, exact for every
  call on every device; fused kernels for CPU and CUDA are used for calls that they support exactly.
- `attend_densely` materialises scores and pattern, for layers where one of them is hooked.

On CUDA in half precision cuDNN was the fastest on an H100; flash attention is used for calls that
cuDNN does not support (heads up to 256 wide, windows, a KV cache), and our Triton kernel for those
that no library kernel supports (softcaps, padding, windows in float32). Masks with a row for each
query are computed in tiles.

Tensors are [prompt head position d_head], as transformers passes them to attention functions.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sinkscope.attention.call import AttentionCall
from sinkscope.attention.kernels import kernels_for
from sinkscope.attention.scores import contiguous_rows, grouped_matmul, scores, tiles

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
CUDNN_WIDTH = 128
FLASH_WIDTH = 256


class Attended(NamedTuple):
    """Result of attention.

    Attributes:
        z: Weighted sum of values.
        lse: Log of the softmax's denominator, learned sink included; -inf for a query that sees
            nothing (a padded one), whose z is zero.
    """

    z: Float[Tensor, "prompt query head d_value"]
    lse: Float[Tensor, "prompt head query"]


def attend(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
) -> Attended:
    """Attention of one layer, with at most a bounded part of the pattern in memory."""
    width, narrow = query.shape[-1], value.shape[-1]
    if narrow < width:
        # Fused kernels need equal widths; zero channels have no effect and are removed again.
        value = torch.nn.functional.pad(value, (0, width - narrow))
    query, key, value = (contiguous_rows(x) for x in (query, key, value))
    if call.learned_sink is not None and needs_gradient(query, key, value, call.learned_sink):
        # Fused kernels give no gradient of the log-sum-exp, on which the sink's share depends.
        z, lse = attend_in_tiles(query, key, value, call)
    elif query.is_cuda:
        z, lse = attend_cuda(query, key, value, call)
    else:
        z, lse = _attend_cpu(query, key, value, call)
    if call.learned_sink is not None:
        z, lse = _share_with_sink(z, lse, call.learned_sink)
    return Attended(z[..., :narrow], lse)


def attend_densely(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
    hook_scores: HookPoint,
    hook_pattern: HookPoint,
    dropout: float = 0.0,
) -> Attended:
    """Attention with ``hook_attn_scores`` and ``hook_pattern``, whose edits take effect.

    As in the stock bridge, masked scores are the dtype's minimum, a learned sink is added after
    ``hook_attn_scores``, and its column is dropped, and dropout applied, before ``hook_pattern``.
    The log-sum-exp is that of the edited scores; z is computed from the edited pattern.
    """
    everything = slice(0, query.shape[2]), slice(0, key.shape[2])
    logits = scores(query, key, call, *everything).to(query.dtype)
    logits = logits.masked_fill(logits == -torch.inf, torch.finfo(query.dtype).min)
    logits = _upcast(hook_scores(logits))
    if call.learned_sink is not None:
        sink = call.learned_sink.to(logits)[None, :, None, None]
        logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], dim=-1)
    pattern = logits.softmax(-1).to(query.dtype)
    if call.learned_sink is not None:
        pattern = pattern[..., :-1]
    if dropout:
        pattern = torch.nn.functional.dropout(pattern, dropout)
    pattern = hook_pattern(pattern)
    z = grouped_matmul(pattern, value.to(pattern.dtype))
    return Attended(rearrange(z, "b h q d -> b q h d"), _log_sum_exp(logits, query.dtype))


def _log_sum_exp(logits: Tensor, dtype: torch.dtype) -> Float[Tensor, "prompt head query"]:
    """Log-sum-exp over the last axis; -inf where every entry is masked."""
    empty = (logits <= torch.finfo(dtype).min).all(-1)
    return logits.logsumexp(-1).masked_fill(empty, -torch.inf)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def is_plainly_causal(call: AttentionCall, n_queries: int, n_keys: int) -> bool:
    """Whether the mask is purely causal."""
    return (
        call.mask is None
        and call.key_bias is None
        and call.causal
        and call.offset == 0
        and n_queries == n_keys
        and (call.window is None or call.window >= n_keys)
    )


def sees_everything(call: AttentionCall, n_queries: int, n_keys: int) -> bool:
    """Whether every query sees every key, as in an encoder or in decoding one token."""
    return (
        call.mask is None
        and call.key_bias is None
        and (not call.causal or call.offset >= n_keys - 1)
        and (call.window is None or max(call.offset + n_queries, n_keys) <= call.window)
    )


def attend_in_tiles(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
) -> tuple[Float[Tensor, "prompt query head d_value"], Float[Tensor, "prompt head query"]]:
    """The definition, in tiles of bounded size: exact for every call, on every device."""
    pieces = [
        _attend_tile(query, key, value, call, queries, keys)
        for queries, keys in tiles(query, key.shape[2], call)
    ]
    z = torch.cat([z for z, _ in pieces], dim=1)
    return z, torch.cat([lse for _, lse in pieces], dim=2)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_tile(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, queries: slice, keys: slice
) -> tuple[Tensor, Tensor]:
    logits = scores(query, key, call, queries, keys)
    lse = logits.logsumexp(-1)
    # For a query without visible keys, exp(-inf - 0) = 0 instead of exp(-inf + inf) = nan.
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    pattern = (logits - base[..., None]).exp()
    z = grouped_matmul(pattern, value[:, :, keys].to(pattern.dtype))
    return rearrange(z.to(value.dtype), "b h q d -> b q h d"), lse


def _attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    n_queries, n_keys = query.shape[2], key.shape[2]
    fused = (
        call.softcap is None and query.shape[-1] == value.shape[-1] and query.dtype in CPU_DTYPES
    )
    # The kernel's bias has the dtype of the queries, which rounds it in half precision.
    fused &= call.key_bias is None or query.dtype not in HALF
    if not fused:
        return attend_in_tiles(query, key, value, call)
    if is_plainly_causal(call, n_queries, n_keys):
        z, lse = _flash_cpu(query, key, value, call.scale, causal=True)
        return z.transpose(1, 2), lse
    if sees_everything(call, n_queries, n_keys):
        z, lse = _flash_cpu(query, key, value, call.scale)
        return z.transpose(1, 2), lse
    return _flash_cpu_in_tiles(query, key, value, call)


def _flash_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_cpu_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Flash attention with a mask that is built for one range of queries at a time.

    With a sliding window, keys outside the window of a range are not read.
    """
    pieces = []
    heads = query if call.key_bias is not None else query[:, :1]
    for queries, keys in tiles(heads, key.shape[2], call):
        seen = call.visible(queries, keys, query.device)
        bias = call.bias(queries, keys, query.device)
        bias = bias if bias is None else bias.to(query.dtype)
        if seen is not None:
            bias = torch.zeros((), dtype=query.dtype) if bias is None else bias
            bias = torch.where(seen, bias, -torch.inf)
        z, lse = _flash_cpu(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], call.scale, bias=bias
        )
        if bias is not None:
            # For a query without visible keys the kernel returns 0 instead of log 0 = -inf.
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        pieces.append((z.transpose(1, 2), lse))
    return torch.cat([z for z, _ in pieces], 1), torch.cat([lse for _, lse in pieces], 2)


def _share_with_sink(
    z: Float[Tensor, "prompt query head d_value"],
    lse: Float[Tensor, "prompt head query"],
    sink: Float[Tensor, "head"],
) -> tuple[Tensor, Tensor]:
    """Add a learned sink logit to a softmax that was computed without it.

    The share of the keys becomes exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink).
    """
    sink = sink.to(lse)[:, None]
    share = rearrange(torch.sigmoid(lse - sink), "b h q -> b q h 1")
    return (z * share).to(z.dtype), torch.logaddexp(lse, sink)


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
    """Whether a library kernel supports this call, apart from its mask."""
    width = query.shape[-1]
    return (
        call.softcap is None
        and call.key_bias is None
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
    """Flash attention with a sliding window, for queries at the last key positions."""
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
    """The only library kernel for float32, which needs as many key heads as query heads."""
    group = query.shape[1] // key.shape[1]
    key, value = (repeat(x, "b k t d -> b (k g) t d", g=group) for x in (key, value))
    z, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return z.transpose(1, 2), lse[:, :, : query.shape[2]]


@cache
def _has_cudnn_attention(device: torch.device) -> bool:
    """Whether cuDNN's attention runs here; tested once, since its limits depend on the version."""
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
