"""The sink logit gap where scores are not linear in the keys, a bounded piece at a time."""

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
) -> tuple[LogSumExp, Bool[Tensor, "prompt query"]]:
    """`metrics.attention.logit_gap_rows` for softcapped scores: every score is computed once.

    Returns:
        The gap of each query [logit], nan where it has none, and the queries that have one.
    """
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    gap = torch.full_like(lse, torch.nan)
    valid = torch.zeros_like(mask)
    after = queries_after(sinks, mask, call.causal)
    for rows, columns in tiles(query, key.shape[2], call):
        logits = scores(query, key, call, rows, columns)
        seen = torch.isfinite(logits[:, 0]) & mask[:, None, columns]
        index = torch.arange(mask.shape[1], device=mask.device)
        itself = index[rows, None] == index[None, columns]
        at_sinks = seen & sinks[:, None, columns]
        others = seen & ~sinks[:, None, columns] & ~itself
        valid[:, rows] = after[:, rows] & at_sinks.any(dim=-1) & others.any(dim=-1)
        gap[:, :, rows] = masked_mean(logits, at_sinks[:, None], dim=-1) - masked_mean(
            logits, others[:, None], dim=-1
        )
    return torch.where(valid[:, None, :], gap, torch.nan), valid
