"""What one layer's attention looked like, whichever path computed it.

Observers ask an `AttentionReader`; they never learn whether a pattern was materialised.
`PatternReader` applies the definitions of `sinkscope.metrics` to the stock bridge's scores and
pattern: the slow oracle. `StreamReader` gets the same numbers out of queries, keys and the
log-sum-exp, with nothing T×T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capture.batches import Batch
from sinkscope.errors import UnsupportedError
from sinkscope.metrics import attention, geometry, values
from sinkscope.metrics.geometry import SinkLogit


class AttentionReader(Protocol):
    """One layer's attention over one batch."""

    window: int | None

    def on_keys(self, keys: Bool[Tensor, "prompt key"]) -> Float[Tensor, "prompt head query"]:
        """Attention that each query pays to the given keys together."""
        ...

    def received(self) -> Float[Tensor, "prompt head key"]:
        """Attention that each key receives, summed over real queries."""
        ...

    def entropy(self) -> Float[Tensor, "prompt head query"]:
        """Entropy of each query's row, in nat."""
        ...

    def logit_gap(self) -> Float[Tensor, "prompt head"]:
        """Mean sink logit minus mean other logit over queries that see both."""
        ...

    def learned_sink_mass(self) -> Float[Tensor, "prompt head"]:
        """Mean over real queries of the attention that a learned sink logit takes."""
        ...

    def sink_logit(self) -> SinkLogit:
        """Norms and cosines that make the sink logit."""
        ...

    def value_weighted_share(self) -> Float[Tensor, "prompt head"]:
        """Share of the sinks in Σ_j A_ij ‖v_j‖, mean over queries after the sink."""
        ...


@dataclass(frozen=True)
class PatternReader:
    """The oracle: definitions applied to a materialised pattern.

    Attributes:
        batch: The batch, on the layer's device.
        pattern: Attention probabilities.
        value: Values, as the attention weights mix them.
        scores: Pre-softmax scores, or None where the bridge does not show true ones.
        query: Queries as they enter the dot product (post-rotary), or None.
        key: Keys as they enter the dot product, or None.
        window: Sliding window of this layer in tokens, or None.
    """

    batch: Batch
    pattern: Float[Tensor, "prompt head query key"]
    value: Float[Tensor, "prompt position kv_head d_head"]
    scores: Float[Tensor, "prompt head query key"] | None = None
    query: Float[Tensor, "prompt position head d_head"] | None = None
    key: Float[Tensor, "prompt position kv_head d_head"] | None = None
    window: int | None = None

    @cached_property
    def _pattern(self) -> Float[Tensor, "prompt head query key"]:
        return self.pattern.float()

    def on_keys(self, keys: Bool[Tensor, "prompt key"]) -> Float[Tensor, "prompt head query"]:
        """See `metrics.attention.attention_to`."""
        return attention.attention_to(self._pattern, keys)

    def received(self) -> Float[Tensor, "prompt head key"]:
        """See `metrics.attention.received_mass`."""
        return attention.received_mass(self._pattern, self.batch.mask)

    def entropy(self) -> Float[Tensor, "prompt head query"]:
        """See `metrics.attention.row_entropy`."""
        return attention.row_entropy(self._pattern)

    def logit_gap(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.logit_gap_rows`.

        Raises:
            UnsupportedError: If the stock bridge shows no true pre-softmax scores here.
        """
        if self.scores is None:
            raise UnsupportedError(
                "sink_logit_gap needs pre-softmax scores, which the stock bridge of this "
                'architecture does not show; measure it with path="streaming".'
            )
        b = self.batch
        gap, valid = attention.logit_gap_rows(
            self.scores.float(), b.sinks, b.mask, b.causal, self.window
        )
        return attention.sink_logit_gap(gap, valid)

    def learned_sink_mass(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.learned_sink_mass`."""
        return attention.learned_sink_mass(self._pattern, self.batch.mask)

    def sink_logit(self) -> SinkLogit:
        """See `metrics.geometry.sink_logit_decomposition`.

        Raises:
            UnsupportedError: If the stock bridge never fires post-rotary queries and keys here.
        """
        if self.query is None or self.key is None:
            raise UnsupportedError(
                "The norms and cosines of the sink logit need post-rotary queries and keys, which "
                'the stock bridge of this architecture does not fire; use path="streaming".'
            )
        b = self.batch
        return geometry.sink_logit_decomposition(
            self.query, self.key, b.sinks, b.mask, b.causal, self.window
        )

    def value_weighted_share(self) -> Float[Tensor, "prompt head"]:
        """See `metrics.attention.value_weighted_share`."""
        b, norm = self.batch, values.norms(self.value)
        return attention.value_weighted_share(self._pattern, norm, b.sinks, b.mask, b.causal)
