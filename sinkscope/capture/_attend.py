"""softmax(scores) @ v with the log of its denominator, on whatever kernel is exact and fastest.

Only kernels that return the log-sum-exp qualify: every sink statistic is computed from it.
Tensors are [prompt head position d_head], as transformers' attention functions see them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope.capture._calls import AttentionCall
from sinkscope.capture._scores import grouped_matmul, scores, tiles

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Attended(NamedTuple):
    """What attention computed.

    Attributes:
        z: Mixed values.
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
    """Attention of one layer; the pattern is never held beyond a bounded piece."""
    query, key, value = _rows(query), _rows(key), _rows(value)
    if call.learned_sink is not None and needs_gradient(query, key, value, call.learned_sink):
        # No fused kernel differentiates the log-sum-exp, on which the sink's share depends.
        z, lse = attend_in_tiles(query, key, value, call)
    elif query.is_cuda:
        from sinkscope.capture._attend_cuda import attend_cuda

        z, lse = attend_cuda(query, key, value, call)
    else:
        z, lse = _attend_cpu(query, key, value, call)
    if call.learned_sink is not None:
        z, lse = _share_with_sink(z, lse, call.learned_sink)
    return Attended(z, lse)


def _rows(x: Float[Tensor, "prompt _ _ d"]) -> Float[Tensor, "prompt _ _ d"]:
    """The same tensor; copied if a row's numbers do not lie side by side.

    A hook may hand back any layout, and library kernels take rows for contiguous without looking.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def is_plainly_causal(call: AttentionCall, n_queries: int, n_keys: int) -> bool:
    """Whether "a query sees no later key" is all there is to say about who sees whom."""
    return (
        call.mask is None
        and call.causal
        and call.offset == 0
        and n_queries == n_keys
        and (call.window is None or call.window >= n_keys)
    )


def sees_everything(call: AttentionCall, n_queries: int, n_keys: int) -> bool:
    """Whether every query sees every key, as in an encoder or in decoding one token."""
    return (
        call.mask is None
        and (not call.causal or call.offset >= n_keys - 1)
        and (call.window is None or max(call.offset + n_queries, n_keys) <= call.window)
    )


def attend_in_tiles(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
) -> tuple[Float[Tensor, "prompt query head d_value"], Float[Tensor, "prompt head query"]]:
    """The definition, a bounded piece at a time: exact for everything, on every device."""
    pieces = [
        _attend_tile(query, key, value, call, queries, keys)
        for queries, keys in tiles(query, key.shape[2], call)
    ]
    z = torch.cat([z for z, _ in pieces], dim=1)
    return z, torch.cat([lse for _, lse in pieces], dim=2)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether anything computed from these will be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_tile(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, queries: slice, keys: slice
) -> tuple[Tensor, Tensor]:
    logits = scores(query, key, call, queries, keys)
    lse = logits.logsumexp(-1)
    # A query that sees nothing: exp(-inf - 0) = 0 instead of exp(-inf + inf) = nan.
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
    """Flash attention under a mask that is built for a range of queries at a time.

    A sliding window then also saves its work: keys that a range cannot see are never read.
    """
    pieces = []
    for queries, keys in tiles(query[:, :1], key.shape[2], call):
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
            # The kernel reports 0 for a query that sees nothing; its denominator is 0.
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        pieces.append((z.transpose(1, 2), lse))
    return torch.cat([z for z, _ in pieces], 1), torch.cat([lse for _, lse in pieces], 2)


def _share_with_sink(
    z: Float[Tensor, "prompt query head d_value"],
    lse: Float[Tensor, "prompt head query"],
    sink: Float[Tensor, "head"],
) -> tuple[Tensor, Tensor]:
    """Let a learned logit join a softmax that was computed without it.

    The keys keep the share exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink).
    """
    sink = sink.to(lse)[:, None]
    share = rearrange(torch.sigmoid(lse - sink), "b h q -> b q h 1")
    return (z * share).to(z.dtype), torch.logaddexp(lse, sink)
