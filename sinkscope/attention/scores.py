"""Scores in float32, in tiles of bounded size, used by all computations in plain torch.

Tensors are [prompt head position d_head], as transformers passes them to attention functions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention.call import AttentionCall, ChosenKeys

TILE_ELEMENTS = 2**22
"""Scores in memory at a time in chunked computations: 16 MiB in float32."""


def scores(
    query: Float[Tensor, "prompt head query d_head"],
    key: Float[Tensor, "prompt kv_head key d_head"],
    call: AttentionCall,
    queries: slice,
    keys: slice,
) -> Float[Tensor, "prompt head _ _"]:
    """Scaled, softcapped and masked scores of a range of queries against a range of keys.

    Returns:
        Scores [logit] in float32 (float64 for float64 inputs); -inf where a key is not visible.
    """
    raw = _capped(query[:, :, queries], key[:, :, keys], call)
    seen = call.visible(queries, keys, raw.device)
    return _masked(raw, call.bias(queries, keys, raw.device), seen)


def scores_at(
    query: Float[Tensor, "prompt head query d_head"],
    chosen_key: Float[Tensor, "prompt kv_head chosen d_head"],
    chosen: ChosenKeys,
    queries: slice,
) -> Float[Tensor, "prompt head _ chosen"]:
    """`scores` of a range of queries against a few selected keys of each prompt."""
    raw = _capped(query[:, :, queries], chosen_key, chosen.call)
    return _masked(raw, chosen.bias(queries), chosen.visible(queries))


def _capped(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    raw = grouped_matmul(wide(query), wide(key).mT) * call.scale
    return raw if call.softcap is None else torch.tanh(raw / call.softcap) * call.softcap


def _masked(raw: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    raw = raw if bias is None else raw + bias
    return raw if seen is None else raw.masked_fill(~seen, -torch.inf)


def grouped_matmul(
    left: Float[Tensor, "prompt head row inner"], right: Float[Tensor, "prompt kv_head inner col"]
) -> Float[Tensor, "prompt head row col"]:
    """Product left @ right in which a group of heads shares each kv_head, without copying it."""
    n_kv_heads = right.shape[1]
    packed = rearrange(left, "b (k g) r i -> b k (g r) i", k=n_kv_heads)
    return rearrange(packed @ right, "b k (g r) c -> b (k g) r c", r=left.shape[2])


def tiles(
    query: Float[Tensor, "prompt head query d_head"], n_keys: int, call: AttentionCall
) -> Iterator[tuple[slice, slice]]:
    """Ranges of queries, each with its visible keys, of bounded size."""
    for queries in query_ranges(query, n_keys):
        yield queries, call.key_range(queries, n_keys)


def query_ranges(query: Float[Tensor, "prompt head query d_head"], n_keys: int) -> Iterator[slice]:
    """Ranges of queries so that the scores of one against every key have bounded size."""
    prompts, heads, n_queries, _ = query.shape
    rows = max(1, min(n_queries, TILE_ELEMENTS // (prompts * heads * n_keys)))
    for start in range(0, n_queries, rows):
        yield slice(start, min(start + rows, n_queries))


def bands(
    query: Float[Tensor, "prompt head query d_head"], n_keys: int, call: AttentionCall, reach: int
) -> Iterator[tuple[slice, slice]]:
    """Ranges of queries, each with the keys at most ``reach`` away, of bounded size.

    A range has as many queries as a query has near keys, so that half of the scores are used.
    """
    prompts, heads, n_queries, _ = query.shape
    rows = max(1, min(reach, TILE_ELEMENTS // (prompts * heads * 3 * reach)))
    ahead = 0 if call.causal else reach
    for start in range(0, n_queries, rows):
        queries = slice(start, min(start + rows, n_queries))
        first, last = call.offset + queries.start, call.offset + queries.stop
        yield queries, slice(max(0, first - reach), min(n_keys, last + ahead))


def contiguous_rows(x: Float[Tensor, "_ _ _ d"]) -> Float[Tensor, "_ _ _ d"]:
    """Copy a tensor if the entries of its rows are not contiguous.

    Hooks may return any layout, and kernels assume contiguous rows.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cast to at least float32."""
    return x if x.dtype == torch.float64 else x.float()
