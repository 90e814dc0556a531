"""Attention with the roundings of transformers' eager functions, some queries at a time.

The fused kernels that `attend` chooses keep scores and weights in float32 whatever the model's
dtype; this keeps what a model in bfloat16 or float16 computes when each step is an operation of its
own: scores, softcap and weights are rounded to the dtype, the softmax itself runs in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention.call import AttentionCall

ELEMENTS = 2**24
"""Scores held at once: 64 MiB in float32."""


def rounded_patterns(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    call: AttentionCall,
    *,
    wide: bool = False,
) -> Iterator[tuple[slice, slice, Float[Tensor, "prompt head _ _"]]]:
    """The attention weights of a range of queries over the keys that it may see.

    Args:
        query: Queries as they enter the dot product.
        key: Keys, of the same dtype.
        call: What the call was.
        wide: Whether to compute in float32 and leave scores and weights so.

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
    # A learned sink joins as gpt-oss lets it: in the dtype of the scores throughout.
    column = sink.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1, dtype=scores.dtype)[..., :-1]
