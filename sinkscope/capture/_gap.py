"""The sink logit gap where no sum of keys gives it, a bounded piece at a time."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.capture._calls import AttentionCall
from sinkscope.capture._columns import Key, LogSumExp, Query
from sinkscope.capture._scores import scores, tiles
from sinkscope.metrics.positions import masked_mean, queries_after


def logit_gap_in_tiles(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
) -> tuple[LogSumExp, Bool[Tensor, "prompt head query"]]:
    """`metrics.attention.logit_gap_rows` where a softcap bends scores, or a mask edits some.

    Every score is computed once. Whether attention is causal a dense mask does not say.

    Returns:
        The gap of each query [logit], nan where it has none, and the queries that have one.
    """
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    # A float mask hides by the least number of its dtype, which is no infinity.
    adds = call.mask is not None and call.mask.is_floating_point()
    hidden = torch.finfo(call.mask.dtype if adds else lse.dtype).min / 2
    gap = torch.full_like(lse, torch.nan)
    valid = torch.zeros_like(lse, dtype=torch.bool)
    after = queries_after(sinks, mask, causal)[:, None]
    index = torch.arange(mask.shape[1], device=mask.device)
    for rows, columns in tiles(query, key.shape[2], call):
        logits = scores(query, key, call, rows, columns)
        seen = (logits > hidden) & mask[:, None, None, columns]
        itself = index[rows, None] == index[None, columns]
        at_sinks = sinks[:, None, None, columns]
        to_sinks, to_others = seen & at_sinks, seen & ~at_sinks & ~itself
        valid[:, :, rows] = after[:, :, rows] & to_sinks.any(dim=-1) & to_others.any(dim=-1)
        gap[:, :, rows] = masked_mean(logits, to_sinks, dim=-1) - masked_mean(
            logits, to_others, dim=-1
        )
    return torch.where(valid, gap, torch.nan), valid
