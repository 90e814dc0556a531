"""Norms and angles of queries and keys, and the sink's logit gap, in one walk along a prompt."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

SINK: tl.constexpr = tl.constexpr(1)
OTHER: tl.constexpr = tl.constexpr(2)
ASKED: tl.constexpr = tl.constexpr(4)
"""Bits of a position's role: a sink; another real key; a query that counts."""


@triton.jit
@no_type_check
def angle_kernel(
    query,
    key,
    role,
    result,
    query_b,
    query_t,
    query_h,
    key_b,
    key_t,
    key_h,
    length,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    M: tl.constexpr,
):
    """Five means of one head under a causal mask, see `launch.Angles`.

    The keys before a position are only ever needed as sums: of the keys and of their directions,
    over the sinks and over all others. They are carried along from block to block.
    """
    head = tl.program_id(0)
    prompt = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, D_BLOCK)
    query += prompt * query_b + head * query_h
    key += prompt * key_b + (head // GROUP) * key_h
    role += prompt * length

    sink_keys = tl.zeros([D_BLOCK], dtype=tl.float32)
    sink_units = tl.zeros([D_BLOCK], dtype=tl.float32)
    other_keys = tl.zeros([D_BLOCK], dtype=tl.float32)
    other_units = tl.zeros([D_BLOCK], dtype=tl.float32)
    n_sinks = 0.0
    n_others = 0.0
    totals = tl.zeros([8], dtype=tl.float32)
    counts = tl.zeros([8], dtype=tl.float32)
    slot = tl.arange(0, 8)
    for first in tl.range(0, length, M):
        places = first + tl.arange(0, M)
        here = places < length
        at = places.to(tl.int64)[:, None]
        inside = here[:, None] & (dims < D)[None, :]
        q = tl.load(query + at * query_t + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        k = tl.load(key + at * key_t + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        roles = tl.load(role + places, mask=here, other=0)
        sink = (roles & SINK) != 0
        other = (roles & OTHER) != 0
        asked = (roles & ASKED) != 0

        q_norm = tl.sqrt(tl.sum(q * q, 1))
        k_norm = tl.sqrt(tl.sum(k * k, 1))
        unit = k / tl.maximum(k_norm, 1e-12)[:, None]
        sinks_seen = n_sinks + tl.cumsum(sink.to(tl.float32), 0)
        others_seen = n_others + tl.cumsum(other.to(tl.float32), 0) - other.to(tl.float32)
        per_sink = 1.0 / tl.maximum(sinks_seen, 1.0)
        per_other = 1.0 / tl.maximum(others_seen, 1.0)

        mine = tl.where(sink[:, None], k, 0.0)
        to_sink = tl.sum(q * (tl.cumsum(mine, 0) + sink_keys[None, :]), 1) * per_sink
        sink_keys += tl.sum(mine, 0)
        mine = tl.where(sink[:, None], unit, 0.0)
        sink_cosine = tl.sum(q * (tl.cumsum(mine, 0) + sink_units[None, :]), 1) * per_sink
        sink_units += tl.sum(mine, 0)
        # A query's own key is no other key to it.
        mine = tl.where(other[:, None], k, 0.0)
        to_other = tl.sum(q * (tl.cumsum(mine, 0) - mine + other_keys[None, :]), 1) * per_other
        other_keys += tl.sum(mine, 0)
        mine = tl.where(other[:, None], unit, 0.0)
        other_cosine = tl.sum(q * (tl.cumsum(mine, 0) - mine + other_units[None, :]), 1)
        other_cosine = other_cosine * per_other
        other_units += tl.sum(mine, 0)
        n_sinks += tl.sum(sink.to(tl.float32), 0)
        n_others += tl.sum(other.to(tl.float32), 0)

        near = asked & (sinks_seen > 0)
        far = asked & (others_seen > 0)
        both = near & far
        totals += _at(0, slot, asked, q_norm)
        totals += _at(1, slot, sink, k_norm)
        # A query of length 0 has a gap, but points nowhere.
        near = near & (q_norm > 0)
        far = far & (q_norm > 0)
        totals += _at(2, slot, near, sink_cosine / q_norm)
        totals += _at(3, slot, far, other_cosine / q_norm)
        totals += _at(4, slot, both, (to_sink - to_other) * scale)
        counts += _at(0, slot, asked, asked.to(tl.float32))
        counts += _at(1, slot, sink, sink.to(tl.float32))
        counts += _at(2, slot, near, near.to(tl.float32))
        counts += _at(3, slot, far, far.to(tl.float32))
        counts += _at(4, slot, both, both.to(tl.float32))
    row = prompt * tl.num_programs(0) + head
    means = tl.where(counts > 0, totals / tl.maximum(counts, 1.0), float("nan"))
    tl.store(result + row * 8 + slot, means)


@triton.jit
@no_type_check
def _at(index: tl.constexpr, slot, where, x):
    """The sum of some entries, in one slot."""
    return tl.where(slot == index, tl.sum(tl.where(where, x, 0.0), 0), 0.0)
