"""Sums over the attention pattern, from queries, keys and the log-sum-exp, without the pattern.

With s_ij the scaled, softcapped scores and lse_i the log of the softmax's denominator,
A_ij = exp(s_ij − lse_i). Everything here is a sum over such entries, in float32, in pieces of
bounded size: exact for causal, bidirectional, sliding-window, softcapped, grouped-query and
learned-sink attention, and under any mask. On CUDA our Triton kernels do the same in one pass.

Tensors come in the layout of hooks, [prompt position head d_head].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.attention.call import AttentionCall
from sinkscope.attention.kernels import kernels_for
from sinkscope.attention.scores import (
    bands,
    grouped_matmul,
    query_ranges,
    scores,
    scores_at,
    tiles,
    wide,
)
from sinkscope.metrics.attention import spans
from sinkscope.metrics.positions import masked_mean, queries_after

Query = Float[Tensor, "prompt query head d_head"]
Key = Float[Tensor, "prompt key kv_head d_head"]
LogSumExp = Float[Tensor, "prompt head query"]


class RowAndColumnSums(NamedTuple):
    """The sums of one pass over the pattern.

    Attributes:
        received: See `received_mass`.
        entropy: See `row_entropy`; None if it was not requested.
        weighted: See `weighted_mass`; None without weights.
    """

    received: Float[Tensor, "prompt head key"]
    entropy: Float[Tensor, "prompt head query"] | None
    weighted: Float[Tensor, "prompt head query"] | None


@dataclass(frozen=True)
class KeySet:
    """Some keys of each prompt.

    Attributes:
        index: Their indices, padded with indices of other keys.
        number: Number of valid indices per prompt.
    """

    index: Int[Tensor, "prompt slot"]
    number: Int[Tensor, "prompt"]

    @classmethod
    def of(cls, keys: Bool[Tensor, "prompt key"], most: int | None = None) -> KeySet:
        """The keys that are True.

        Args:
            keys: Mask of keys in each prompt.
            most: Maximum number in a prompt; if None, counting them synchronises with the device.
        """
        index, number = keys.int().argsort(dim=1, descending=True, stable=True), keys.sum(dim=1)
        return cls(index[:, : int(number.max()) if most is None else most], number)


def attention_to_keys(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    keys: Bool[Tensor, "prompt key"] | KeySet,
) -> Float[Tensor, "prompt head query"]:
    """Attention that each query pays to a set of keys: Σ_{j∈keys} A_ij [probability].

    Costs O(position · d_head) per key, as only the chosen keys are read.
    """
    kernels = kernels_for(query, call)
    if kernels is not None:
        chosen = keys if isinstance(keys, KeySet) else KeySet.of(keys, most=keys.shape[1])
        return kernels.attention_to_keys(query, key, lse, call, chosen.index, chosen.number)
    chosen = keys if isinstance(keys, KeySet) else KeySet.of(keys)
    prompts, slots = chosen.index.shape
    if slots == 0:
        return torch.zeros_like(lse)
    row = torch.arange(prompts, device=key.device)[:, None]
    picked = key[row, chosen.index].transpose(1, 2)
    counts = torch.arange(slots, device=key.device) < chosen.number[:, None]
    query, base, seen_from = query.transpose(1, 2), _finite(lse), call.at_keys(chosen.index)
    paid = torch.zeros_like(lse)
    for rows in query_ranges(query, slots):
        logits = scores_at(query, picked, seen_from, rows) - base[:, :, rows, None]
        pattern = logits.exp().masked_fill(~counts[:, None, None, :], 0.0)
        paid[:, :, rows] = pattern.sum(-1)
    return paid


def received_mass(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None = None,
) -> Float[Tensor, "prompt head key"]:
    """Total attention that each key receives: Σ_i A_ij over the chosen queries i [queries].

    Args:
        query: Queries of the dot product.
        key: Keys of the dot product.
        lse: Log of the softmax's denominator of each query.
        call: Parameters of the attention call.
        queries: Mask of the queries to sum over; by default all.
    """
    kernels = kernels_for(query, call)
    if kernels is not None:
        return kernels.received_mass(query, key, lse, call, queries)
    mass = lse.new_zeros(len(key), query.shape[2], key.shape[1])
    for _, columns, log_pattern in _log_pattern(query, key, lse, call, queries):
        mass[:, :, columns] += log_pattern.exp_().sum(2)
    return mass


def received_mass_by(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    weights: Float[Tensor, "prompt query bucket"],
) -> Float[Tensor, "prompt bucket head key"]:
    """`received_mass` split by a weight of each query: Σ_i w_ib A_ij.

    One-hot weights divide the queries into buckets, for example of near and far queries.
    """
    kernels = kernels_for(query, call)
    if kernels is not None:
        return kernels.received_mass_by(query, key, lse, call, weights)
    buckets = weights.to(lse.dtype).mT[:, :, None]
    mass = lse.new_zeros(len(key), weights.shape[-1], query.shape[2], key.shape[1])
    for rows, columns, log_pattern in _log_pattern(query, key, lse, call):
        by_bucket = torch.einsum("bnq,bhqk->bnhk", buckets[:, :, 0, rows], log_pattern.exp_())
        mass[..., columns] += by_bucket
    return mass


def row_entropy(
    query: Query, key: Key, lse: LogSumExp, call: AttentionCall
) -> Float[Tensor, "prompt head query"]:
    """Entropy of each query's row over the keys: −Σ_j A_ij ln A_ij [nat].

    A learned sink reduces the row's total but is left out of the sum, as in
    `metrics.attention.row_entropy`.
    """
    kernels = kernels_for(query, call)
    if kernels is not None:
        return kernels.row_entropy(query, key, lse, call)
    entropy = torch.zeros_like(lse)
    for rows, _, log_pattern in _log_pattern(query, key, lse, call):
        entropy[:, :, rows] = _entropy(log_pattern, log_pattern.exp())
    return entropy


def row_and_column_sums(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None = None,
    *,
    entropy: bool = False,
    weights: Float[Tensor, "prompt key kv_head"] | None = None,
) -> RowAndColumnSums:
    """`received_mass`, with `row_entropy` and `weighted_mass` at little additional cost.

    Rows of excluded queries are 0.
    """
    kernels = kernels_for(query, call)
    if kernels is not None:
        return RowAndColumnSums(
            *kernels.row_and_column_sums(query, key, lse, call, queries, entropy, weights)
        )
    received = lse.new_zeros(len(key), query.shape[2], key.shape[1])
    rows_entropy = torch.zeros_like(lse) if entropy else None
    weighted = None if weights is None else torch.zeros_like(lse)
    sizes = None if weights is None else weights.to(lse.dtype).mT[..., None]
    for rows, columns, log_pattern in _log_pattern(query, key, lse, call, queries):
        pattern = log_pattern.exp()
        received[:, :, columns] += pattern.sum(2)
        if rows_entropy is not None:
            rows_entropy[:, :, rows] = _entropy(log_pattern, pattern)
        if weighted is not None and sizes is not None:
            weighted[:, :, rows] = grouped_matmul(pattern, sizes[:, :, columns])[..., 0]
    return RowAndColumnSums(received, rows_entropy, weighted)


def weighted_mass(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    weights: Float[Tensor, "prompt key kv_head"],
) -> Float[Tensor, "prompt head query"]:
    """Σ_j A_ij w_j; with w_j = ‖v_j‖, an upper bound on the norm of a query's output."""
    kernels = kernels_for(query, call)
    if kernels is not None:
        return kernels.weighted_mass(query, key, lse, call, weights)
    columns = weights.to(lse.dtype).mT[..., None]
    mass = torch.zeros_like(lse)
    for rows, keys, log_pattern in _log_pattern(query, key, lse, call):
        product = grouped_matmul(log_pattern.exp_(), columns[:, :, keys])
        mass[:, :, rows] = product[..., 0]
    return mass


def logit_gap_in_tiles(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    causal: bool,
) -> tuple[LogSumExp, Bool[Tensor, "prompt head query"]]:
    """`metrics.attention.logit_gap_rows` with a softcap, or a mask that edits scores.

    Every score is computed once. `causal` is needed because a dense mask does not state it.

    Returns:
        The gap of each query [logit], nan where it is undefined, and where it is defined.
    """
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    # A float mask uses the dtype's minimum, which is finite.
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


def is_largest(
    query: Query,
    key: Key,
    call: AttentionCall,
    keys: Bool[Tensor, "prompt key"],
) -> Bool[Tensor, "prompt head query"]:
    """`metrics.attention.is_largest`: the largest score is at one of the keys.

    Every score is computed once more, in plain torch on any device, and both maxima come from the
    same numbers.
    """
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    result = keys.new_zeros(query.shape[:3])
    for rows, columns in tiles(query, key.shape[2], call):
        logits = scores(query, key, call, rows, columns)
        largest = logits.amax(dim=-1)
        at_keys = logits.masked_fill_(~keys[:, None, None, columns], -torch.inf).amax(dim=-1)
        result[:, :, rows] = (at_keys >= largest) & (largest > -torch.inf)
    return result


def nearby_attention(
    query: Query, key: Key, lse: LogSumExp, call: AttentionCall, widths: Sequence[int]
) -> Float[Tensor, "prompt head query span"]:
    """`metrics.attention.nearby_attention` from a band of scores, O(T · width)."""
    kernels = kernels_for(query, call)
    if kernels is not None:
        return kernels.nearby_attention(query, key, lse, call, widths)
    query, key = query.transpose(1, 2), wide(key.transpose(1, 2))
    base, n_keys = _finite(lse), key.shape[2]
    paid = lse.new_zeros(*lse.shape, 2 * len(widths))
    index = torch.arange(max(n_keys, call.offset + query.shape[2]), device=query.device)
    for rows, columns in bands(query, n_keys, call, max(widths)):
        pattern = (scores(query, key, call, rows, columns) - base[:, :, rows, None]).exp_()
        stand = index[call.offset + rows.start : call.offset + rows.stop, None]
        for at, span in enumerate(spans((index[columns] - stand).abs(), widths)):
            paid[:, :, rows, at] = pattern.masked_fill(~span, 0.0).sum(-1)
    return paid


def learned_sink_share(lse: LogSumExp, call: AttentionCall) -> Float[Tensor, "prompt head query"]:
    """Attention to the learned sink: exp(sink − lse); 0 if there is none."""
    if call.learned_sink is None:
        return torch.zeros_like(lse)
    return (call.learned_sink.detach().to(lse)[:, None] - lse).exp()


def _log_pattern(
    query: Query,
    key: Key,
    lse: LogSumExp,
    call: AttentionCall,
    queries: Bool[Tensor, "prompt query"] | None = None,
) -> Iterator[tuple[slice, slice, Float[Tensor, "prompt head _ _"]]]:
    """Yield ln A_ij for ranges of queries with their visible keys; -inf where A_ij = 0."""
    query, key = query.transpose(1, 2), wide(key.transpose(1, 2))
    base = _finite(lse)
    for rows, columns in tiles(query, key.shape[2], call):
        log_pattern = scores(query, key, call, rows, columns) - base[:, :, rows, None]
        if queries is not None:
            log_pattern = log_pattern.masked_fill(~queries[:, None, rows, None], -torch.inf)
        yield rows, columns, log_pattern


def _finite(lse: LogSumExp) -> LogSumExp:
    """Replace lse = -inf of queries without visible keys by 0: exp(-inf - 0) = 0 instead of nan."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _entropy(log_pattern: Tensor, pattern: Tensor) -> Tensor:
    return -(pattern * log_pattern.clamp(min=torch.finfo(pattern.dtype).min)).sum(-1)
