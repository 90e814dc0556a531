"""Attention with the rounding of transformers' eager functions, for ranges of queries.

The fused kernels of `attend` compute scores and weights in float32 whatever the model's dtype. This
reproduces a model in bfloat16 or float16 in which each step is a separate operation: scores,
softcap and weights are rounded to the dtype, and the softmax runs in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention.call import AttentionCall

ELEMENTS = 2**24
"""Scores in memory at a time: 64 MiB in float32."""


def rounded_patterns(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    call: AttentionCall,
    *,
    wide: bool = False,
) -> Iterator[tuple[slice, slice, Float[Tensor, "prompt head _ _"]]]:
    """Yield the attention weights of ranges of queries over their visible keys.

    Args:
        query: Queries of the dot product.
        key: Keys, of the same dtype.
        call: Parameters of the attention call.
        wide: Whether to compute in float32 without rounding scores and weights.

    Yields:
        The queries, the keys, and the weights in the dtype of the queries, or in float32.
    """
    if wide:
        query, key = query.float(), key.float()
    dtype, (prompts, heads, n_queries, _) = query.dtype, query.shape
    key = repeat(key, "b k t d -> b (k g) t d", g=heads // key.shape[1])
    n_keys = key.shape[2]
    step = max(1, min(n_queries, ELEMENTS // (prompts * heads * n_keys)))
    for start in range(0, n_queries, step):
        rows = slice(start, min(start + step, n_queries))
        columns = slice(0, n_keys) if step == n_queries else call.key_range(rows, n_keys)
        scores = torch.matmul(query[:, :, rows], key[:, :, columns].mT) * call.scale
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        added = call.bias(rows, columns, scores.device)
        scores = scores if added is None else scores + added
        seen = call.visible(rows, columns, scores.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
        yield rows, columns, _softmax(scores, call.learned_sink)


def _softmax(scores: Tensor, sink: Float[Tensor, "head"] | None) -> Tensor:
    if sink is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    # A learned sink is added as in gpt-oss, in the dtype of the scores throughout.
    column = sink.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1, dtype=scores.dtype)[..., :-1]
