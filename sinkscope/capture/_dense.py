"""The materialised attention of a layer whose scores or pattern somebody hooked."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sinkscope.capture._attend import Attended
from sinkscope.capture._calls import AttentionCall
from sinkscope.capture._scores import grouped_matmul, scores


def attend_densely(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    value: Float[Tensor, "prompt kv_head key d_value"],
    call: AttentionCall,
    hook_scores: HookPoint,
    hook_pattern: HookPoint,
    dropout: float = 0.0,
) -> Attended:
    """Attention that goes through ``hook_attn_scores`` and ``hook_pattern``; edits take effect.

    As in the stock bridge, masked scores are the dtype's minimum, a learned sink joins after
    ``hook_attn_scores``, and its column is dropped before ``hook_pattern``, as is dropout applied.
    The log-sum-exp is that of the scores as hooks left them; z follows the pattern.
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
