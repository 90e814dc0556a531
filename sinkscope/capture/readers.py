"""Statistics of one layer's attention, by a common interface for both paths.

Observers use an `AttentionReader`, independent of whether a pattern was materialised.
`PatternReader` applies the definitions of `sinkscope.metrics` to the eager bridge's scores and
pattern: the slow oracle. `StreamReader` computes the same values from queries, keys and the
log-sum-exp, without T×T tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.attention import pattern_sums as _columns
from sinkscope.attention.call import AttentionCall
from sinkscope.attention.kernels import Angles, kernels_for
from sinkscope.attention.pattern_sums import logit_gap_in_tiles
from sinkscope.capture.batches import Batch
from sinkscope.errors import UnsupportedError
from sinkscope.metrics import attention, geometry, positions, values
from sinkscope.metrics.geometry import SinkLogit


@runtime_checkable
class AttentionReader(Protocol):
    """One layer's attention over one batch."""

    window: int | None

    def on_keys(
        self, keys: Bool[Tensor, "prompt key"], most: int | None = None
    ) -> Float[Tensor, "prompt head query"]:
        """Total attention of each query to the given keys.

        Args:
            keys: Mask of keys in each prompt.
            most: Maximum number of keys in a prompt, if known, which avoids a synchronisation.
        """
        ...

    def is_largest(self, keys: Bool[Tensor, "prompt key"]) -> Bool[Tensor, "prompt head query"]:
        """Whether each query pays its largest attention to one of the given keys."""
        ...

    def received(self) -> Float[Tensor, "prompt head key"]:
        """Attention that each key receives, summed over real queries."""
        ...

    def by_key(self) -> Iterator[Float[Tensor, "prompt head query"]]:
        """Yield the attention of each query to key 0, key 1 and so on."""
        ...

    def nearby(self, widths: Sequence[int]) -> Float[Tensor, "prompt head query span"]:
        """Attention of each query to its neighbourhoods of these widths."""
        ...

    def total(self) -> Float[Tensor, "prompt head query"]:
        """Total attention of each query to keys: 1 minus the share of a learned sink."""
        ...

    def entropy(self) -> Float[Tensor, "prompt head query"]:
        """Entropy of each query's row, in nat."""
        ...

    def logit_gap(self) -> Float[Tensor, "prompt head"]:
        """Mean sink logit minus mean other logit over queries that see both."""
        ...

    def learned_sink_mass(self) -> Float[Tensor, "prompt head"]:
        """Mean over real queries of the attention to a learned sink logit."""
        ...

    def sink_logit(self) -> SinkLogit:
        """Norms and cosines of the sink logit."""
        ...

    def value_norms(self) -> Float[Tensor, "prompt kv_head key"]:
        """Norm of every value vector."""
        ...

    def value_weighted_share(self) -> Float[Tensor, "prompt head"]:
        """Share of the sinks in Σ_j A_ij ‖v_j‖, mean over queries after the sink."""
        ...


@dataclass(frozen=True)
class GatedAttention:
    """A layer's attention, and the gate on its heads' outputs.

    Attributes:
        batch: The batch, on the layer's device.
        attention: The reader.
        gate: Factors of the gate.
    """

    batch: Batch
    attention: AttentionReader
    gate: Float[Tensor, "prompt position head d_gate"]


@dataclass(frozen=True)
class GatedValue:
    """A layer's values, and the gate between them and W_O.

    Attributes:
        batch: The batch, on the layer's device.
        value: The values.
        gate: Factors of the gate, or None if there is none.
    """

    batch: Batch
    value: Float[Tensor, "prompt position kv_head d_head"]
    gate: Float[Tensor, "prompt position head d_gate"] | None


@dataclass(frozen=True)
class PatternReader:
    """The oracle: definitions applied to a materialised pattern.

    Attributes:
        batch: The batch, on the layer's device.
        pattern: Attention probabilities.
        value: Values averaged by the attention weights, or None if the bridge does not expose them.
        scores: Pre-softmax scores, or None if the bridge does not expose true ones.
        query: Queries of the dot product (post-rotary), or None.
        key: Keys of the dot product, or None.
        window: Sliding window of this layer in tokens, or None.
    """

    batch: Batch
    pattern: Float[Tensor, "prompt head query key"]
    value: Float[Tensor, "prompt position kv_head d_value"] | None = None
    scores: Float[Tensor, "prompt head query key"] | None = None
    query: Float[Tensor, "prompt position head d_head"] | None = None
    key: Float[Tensor, "prompt position kv_head d_head"] | None = None
    window: int | None = None

    @cached_property
    def _pattern(self) -> Float[Tensor, "prompt head query key"]:
        return self.pattern.float()

    def on_keys(
        self, keys: Bool[Tensor, "prompt key"], most: int | None = None
    ) -> Float[Tensor, "prompt head query"]:
        """See `metrics.attention.attention_to`."""
        return attention.attention_to(self._pattern, keys)

    def is_largest(self, keys: Bool[Tensor, "prompt key"]) -> Bool[Tensor, "prompt head query"]:
        """See `metrics.attention.is_largest`."""
        return attention.is_largest(self.pattern, keys)

    def received(self) -> Float[Tensor, "prompt head key"]:
        """See `metrics.attention.received_mass`."""
        return attention.received_mass(self._pattern, self.batch.mask)

    def by_key(self) -> Iterator[Float[Tensor, "prompt head query"]]:
        """A_ij, column by column."""
        yield from self._pattern.unbind(dim=-1)

    def nearby(self, widths: Sequence[int]) -> Float[Tensor, "prompt head query span"]:
        """See `metrics.attention.nearby_attention`."""
        return attention.nearby_attention(self._pattern, widths)

    def total(self) -> Float[Tensor, "prompt head query"]:
        """Σ_j A_ij."""
        return self._pattern.sum(dim=-1)

    def entropy(self) -> Float[Tensor, "prompt head query"]:
        """See `metrics.attention.row_entropy`."""
        return attention.row_entropy(self._pattern)

    def logit_gap(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.logit_gap_rows`.

        Raises:
            UnsupportedError: If the eager bridge does not expose true pre-softmax scores.
        """
        if self.scores is None:
            raise UnsupportedError(
                "sink_logit_gap needs pre-softmax scores, which the eager bridge of this "
                'architecture does not show; measure it with attention="streaming".'
            )
        b = self.batch
        gap, valid = attention.logit_gap_rows(self.scores, b.sinks, b.mask, b.causal, self.window)
        return attention.sink_logit_gap(gap, valid)

    def learned_sink_mass(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.learned_sink_mass`."""
        return attention.learned_sink_mass(self._pattern, self.batch.mask)

    def sink_logit(self) -> SinkLogit:
        """See `metrics.geometry.sink_logit_decomposition`.

        Raises:
            UnsupportedError: If the eager bridge does not expose post-rotary queries and keys.
        """
        if self.query is None or self.key is None:
            raise UnsupportedError(
                "The norms and cosines of the sink logit need post-rotary queries and keys, which "
                'the eager bridge of this architecture does not fire; use attention="streaming".'
            )
        b = self.batch
        return geometry.sink_logit_decomposition(
            self.query, self.key, b.sinks, b.mask, b.causal, self.window
        )

    def value_norms(self) -> Float[Tensor, "prompt kv_head key"]:
        """See `metrics.values.norms`.

        Raises:
            UnsupportedError: If the eager bridge does not expose true values.
        """
        if self.value is None:
            raise UnsupportedError(
                "Statistics of attention and values need the values averaged by the attention "
                "weights, which the eager bridge of this architecture does not expose; use "
                'attention="streaming".'
            )
        return values.norms(self.value)

    def value_weighted_share(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.value_weighted_share`.

        Raises:
            UnsupportedError: If the eager bridge does not expose true values.
        """
        b, norm = self.batch, self.value_norms()
        return attention.value_weighted_share(self._pattern, norm, b.sinks, b.mask, b.causal)


@dataclass(frozen=True)
class StreamReader:
    """Computes the same values from q, k and the log-sum-exp: A_ij = exp(s_ij − lse_i).

    Attributes:
        batch: The batch, on the layer's device.
        query: Queries of the dot product.
        key: Keys of the dot product.
        value: Values averaged by the attention weights.
        lse: Log of each softmax's denominator, a learned sink included.
        call: Scale, softcap and mask of this call.
        window: Sliding window of this layer in tokens, or None. It may be missing in `call`: if
            transformers builds a dense mask, the window is part of the mask.
        statistics: Those of "received", "entropy" and "value_share" that will be read; with
            "received", all share one pass.
    """

    batch: Batch
    query: Float[Tensor, "prompt position head d_head"]
    key: Float[Tensor, "prompt position kv_head d_head"]
    value: Float[Tensor, "prompt position kv_head d_value"]
    lse: Float[Tensor, "prompt head query"]
    call: AttentionCall
    window: int | None = None
    statistics: frozenset[str] = frozenset()
    _paid: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _attended(self) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
        return self.query, self.key, self.lse, self.call

    @property
    def _real_queries(self) -> Bool[Tensor, "prompt query"] | None:
        return self.batch.mask if self.batch.ragged else None

    @cached_property
    def _sums(self) -> _columns.RowAndColumnSums:
        """All requested sums over the pattern, in one pass."""
        requested = self.statistics
        return _columns.row_and_column_sums(
            *self._attended,
            self._real_queries,
            entropy="entropy" in requested,
            weights=self._value_sizes if "value_share" in requested else None,
        )

    @cached_property
    def _received(self) -> Float[Tensor, "prompt head key"]:
        if self.statistics & {"entropy", "value_share"}:
            return self._sums.received
        return _columns.received_mass(*self._attended, self._real_queries)

    @cached_property
    def _value_norms(self) -> Float[Tensor, "prompt kv_head key"]:
        return values.norms(self.value)

    @cached_property
    def _value_sizes(self) -> Float[Tensor, "prompt position kv_head"]:
        norm = self._value_norms
        return (
            torch.where(self.batch.mask[:, None, :], norm, 0.0) if self.batch.ragged else norm
        ).mT

    @cached_property
    def _angles(self) -> Angles | None:
        """Statistics linear in the keys from one kernel; None if it does not support this call."""
        call, length = self.call, self.query.shape[1]
        kernels = kernels_for(self.query, call)
        whole = call.causal and not call.offset and (self.window is None or self.window >= length)
        if kernels is None or not whole:
            return None
        return kernels.causal_angles(
            self.query, self.key, self.batch.roles, self.batch.seen, call.scale
        )

    def on_keys(
        self, keys: Bool[Tensor, "prompt key"], most: int | None = None
    ) -> Float[Tensor, "prompt head query"]:
        """Σ_{j∈keys} exp(s_ij − lse_i), O(T) per key; the key set is computed once per batch."""
        # The mask is stored with its set, so that no other tensor can get its id.
        _, chosen = self.batch.once(
            ("key set", id(keys)), lambda: (keys, _columns.KeySet.of(keys, most))
        )
        if id(keys) not in self._paid:
            self._paid[id(keys)] = _columns.attention_to_keys(*self._attended, chosen)
        return self._paid[id(keys)]

    def is_largest(self, keys: Bool[Tensor, "prompt key"]) -> Bool[Tensor, "prompt head query"]:
        """max_j s_ij is at one of the keys; every score is computed once more."""
        return _columns.is_largest(self.query, self.key, self.call, keys)

    def received(self) -> Float[Tensor, "prompt head key"]:
        """Σ_i exp(s_ij − lse_i)."""
        return self._received

    def by_key(self) -> Iterator[Float[Tensor, "prompt head query"]]:
        """exp(s_ij − lse_i), column by column, without storing them."""
        for index in range(self.batch.length):
            place = self.batch.mask.new_full((len(self.batch.mask), 1), index, dtype=torch.long)
            one = _columns.KeySet(place, self.batch.mask[:, index].long())
            yield _columns.attention_to_keys(*self._attended, one)

    def nearby(self, widths: Sequence[int]) -> Float[Tensor, "prompt head query span"]:
        """Σ exp(s_ij − lse_i) over a band of scores."""
        return _columns.nearby_attention(*self._attended, widths)

    def total(self) -> Float[Tensor, "prompt head query"]:
        """1 − exp(sink − lse_i)."""
        return 1 - _columns.learned_sink_share(self.lse, self.call)

    def entropy(self) -> Float[Tensor, "prompt head query"]:
        """−Σ_j A_ij (s_ij − lse_i)."""
        if "received" in self.statistics and self._sums.entropy is not None:
            return self._sums.entropy
        return _columns.row_entropy(*self._attended)

    def logit_gap(self) -> Float[Tensor, "prompt head"]:
        """From prefix sums of keys if scores are linear in them; otherwise from single scores.

        Scores are not linear with a softcap or a position bias, nor if a mask (an intervention's,
        say) changes scores beyond causality, window and padding.
        """
        b, mask = self.batch, self.call.mask
        plain = self.call.softcap is None and self.call.key_bias is None
        if plain and (mask is None or mask.ndim == 2):
            if self._angles is not None:
                return self._angles.gap
            gap, valid = geometry.logit_gap_rows(
                self.query, self.key, self.call.scale, b.sinks, b.mask, b.causal, self.window
            )
        else:
            gap, valid = logit_gap_in_tiles(*self._attended, b.sinks, b.mask, b.causal)
        return attention.sink_logit_gap(gap, valid)

    def learned_sink_mass(self) -> Float[Tensor, "prompt head"]:
        """exp(sink − lse_i), mean over real queries."""
        share = _columns.learned_sink_share(self.lse, self.call)
        return positions.masked_mean(share, self.batch.mask[:, None, :], dim=-1)

    def sink_logit(self) -> SinkLogit:
        """See `metrics.geometry.sink_logit_decomposition`."""
        b, angles = self.batch, self._angles
        if angles is not None:
            parts = SinkLogit(*angles[:4])
        else:
            parts = geometry.sink_logit_decomposition(
                self.query, self.key, b.sinks, b.mask, b.causal, self.window
            )
        return parts._replace(query_norm=parts.query_norm / self.call.prescale)

    def value_norms(self) -> Float[Tensor, "prompt kv_head key"]:
        """See `metrics.values.norms`."""
        return self._value_norms

    def value_weighted_share(self) -> Float[Tensor, "prompt head"]:
        """Both sums are computed as attention over the value norms."""
        b, sizes = self.batch, self._value_sizes
        if "received" in self.statistics and self._sums.weighted is not None:
            whole = self._sums.weighted
        else:
            whole = _columns.weighted_mass(*self._attended, sizes)
        if b.one_sink_each:  # a single column suffices
            size = sizes[:, 0] if b.sink_is_first_token else values.norm_at(sizes.mT, b.first_sink)
            size = values.per_query_head(size, whole.shape[1])
            part = self.on_keys(b.sinks, most=1) * size[..., None]
        else:
            part = _columns.weighted_mass(*self._attended, sizes * b.sinks[..., None])
        return attention.mean_share(part, whole, b.queries)
