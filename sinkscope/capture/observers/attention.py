"""Observers of attention, which read it through an `AttentionReader` on either path."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope.capture.accumulators import Accumulator, OverPrompts, Summed
from sinkscope.capture.batches import Batch, average, mean_weights
from sinkscope.capture.observers.base import Observer, Scope
from sinkscope.capture.readers import AttentionReader
from sinkscope.capture.reductions import received_summary
from sinkscope.metrics import attention, values
from sinkscope.models.capabilities import NO_SOFTMAX, Capabilities


class SinkAttention(Observer, metric="sink_attention", reads="attention", core=True):
    """Attention to the sinks: mean, AWFT, Gu's importance, and mean by query position."""

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Average a column of the pattern over all sets of queries at once.

        With several sinks, or a sink other than the first token, up to three columns.
        """
        weights = batch.sink_averages(x.window, self.scope.bucket_edges)
        to_sinks = average(x.on_keys(batch.sinks, batch.most_sinks), weights)
        to_first_sink = to_first_token = to_sinks
        if not batch.one_sink_each:
            to_first_sink = average(x.on_keys(batch.first_sink_mask, most=1), weights)
        if not batch.sink_is_first_token:
            to_first_token = average(x.on_keys(batch.first_token, most=1), weights)
        return {
            "to_sinks": to_sinks,
            "to_first_sink": to_first_sink,
            "to_first_token": to_first_token,
        }

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Split the columns of `Batch.sink_averages` into fields."""
        return {
            "sink_attention": layers["to_sinks"][..., 0],
            "first_token_attention": layers["to_first_token"][..., 1],
            "sink_importance": layers["to_first_sink"][..., 2],
            "received_by_distance": layers["to_sinks"][..., 3:],
        }

    def where(self, name: str, batch: Batch) -> Bool[Tensor, "prompt position"]:
        """Buckets in which a prompt has a query after the sink."""
        if name == "received_by_distance":
            return batch.buckets(self.scope.bucket_edges).any(dim=1)
        return super().where(name, batch)

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The fields, and the buckets of `received_by_distance`."""
        found = super().results(order)
        by_bucket = self._accumulators["received_by_distance"]
        assert isinstance(by_bucket, OverPrompts)
        edges = torch.tensor(self.scope.bucket_edges)
        return found | {"bucket": edges, "prompts_in_bucket": by_bucket.count}


class SinkIsLargest(Observer, metric="sink_is_largest", reads="attention", on_request=True):
    """How often the sink is the key that a query pays most, whatever the amount."""

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Mean over the queries after the sinks."""
        first = x.is_largest(batch.sinks) & batch.queries[:, None]
        return {"sink_is_largest": first.sum(-1) / batch.queries[:, None].sum(-1)}


class Received(Observer, metric="received", reads="attention"):
    """Attention that every key receives from every head, and the share of heads above ε."""

    statistics = frozenset({"received"})

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._windows: dict[int, int | None] = {}

    def accumulator(self, name: str) -> Accumulator:
        """All fields except `received_peak` are already summed over prompts in the hook."""
        return super().accumulator(name) if name == "received_peak" else Summed()

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Gu's importance of every key, summed over prompts or heads."""
        thresholds = batch.constant((self.scope.epsilon, *attention.EPSILONS))
        found = received_summary(x.received(), batch.per_query(x.window), thresholds)
        self._windows[self.layer] = x.window
        kept = {
            "received_attention": found.importance,
            "received_peak": found.peak,
            "above": found.above,
        }
        if batch.ragged:
            kept["uniform_ratio"] = found.over(batch.per_uniform(x.window))
        return kept

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Split the counts above the thresholds into those of the requested ε and of the curve."""
        above = layers.pop("above").float().mean(dim=0) / self.scope.n_heads
        layers |= {"sink_rate": above[0], "sink_rate_curve": above[1:]}
        layers["received_peak"] = layers["received_peak"].mean(dim=0)
        if not batch.ragged:  # uniform attention is the same for all prompts
            rows = [batch.per_uniform(window)[0] for _, window in sorted(self._windows.items())]
            ratio = layers["received_attention"] * torch.stack(rows)[:, None, :]
            layers["uniform_ratio"] = ratio
        return layers

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The fields, and the thresholds of the curve."""
        return super().results(order) | {"epsilon": torch.tensor(attention.EPSILONS)}


class TopReceived(Observer, metric="top_received", reads="attention", needs=("pattern", "value")):
    """The keys that receive most from each head in each prompt, and the norms of their values."""

    statistics = frozenset({"received"})

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """The largest values of Gu's importance score."""
        alpha = x.received().float() * batch.per_query(x.window)[:, None, :]
        score, position = attention.strongest(alpha, batch.eligible_keys)
        norm = values.per_query_head(x.value_norms(), alpha.shape[1])
        return {"score": score, "position": position, "norm": norm.gather(-1, position)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Undefined where a prompt has fewer eligible keys, in all layers at once."""
        score, position, norm = attention.ranked(
            layers["score"], layers["position"], layers["norm"]
        )
        return {
            "top_received": score,
            "top_received_position": position,
            "top_received_value_norm": norm,
        }


class Entropy(Observer, metric="entropy", reads="attention"):
    """Entropy of the attention rows."""

    statistics = frozenset({"entropy"})

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """Entropy is undefined for rows that are not distributions."""
        return None if can.softmax else NO_SOFTMAX

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Mean over all real queries."""
        return {"attention_entropy": average(x.entropy(), batch.averages("mask"))[..., 0]}


class LogitGap(Observer, metric="logit_gap", reads="attention", needs=("scores",)):
    """Sink logit minus the mean logit of the other keys."""

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Mean over the queries that see the sink and another key."""
        return {"sink_logit_gap": x.logit_gap()}


class SinkLogitGeometry(Observer, metric="sink_logit", reads="attention", needs=("query", "key")):
    """Norms and cosines of the sink logit."""

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Two norms and two cosines."""
        logit = x.sink_logit()
        return {
            "sink_query_norm": logit.query_norm,
            "sink_key_norm": logit.key_norm,
            "sink_cosine": logit.cosine,
            "other_cosine": logit.other_cosine,
        }


class Recency(Observer, metric="recency", reads="attention"):
    """Attention to near keys, sinks and the remaining keys, over queries that see all three."""

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """Shares are undefined for rows that are not distributions."""
        return None if can.softmax else NO_SOFTMAX

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Means over `metrics.positions.queries_beyond` of each width."""
        weights = batch.once(
            ("beyond weights", x.window), lambda: mean_weights(batch.beyond(x.window))
        )
        near = x.nearby(attention.RECENT).unflatten(-1, (2, -1))
        return {
            "near": torch.einsum("phqiw,pqw->piwh", near, weights.to(near.dtype)),
            "to_sinks": average(x.on_keys(batch.sinks, batch.most_sinks), weights),
            "total": average(x.total(), weights),
            "uniform": batch.uniform_nearby(x.window),
        }

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Ratios to uniform attention, and what remains, in all layers at once."""
        recent, without_self = layers["near"].unbind(2)
        uniform, uniform_without_self = layers["uniform"].unflatten(-1, (2, -1)).unbind(-2)
        recent, to_sinks = recent.mT, layers["to_sinks"]
        return {
            "recent_attention": recent,
            "recent_without_self": without_self.mT,
            "recent_uniform": uniform,
            "recent_uniform_without_self": uniform_without_self,
            "recency_ratio": recent / uniform[:, :, None],
            "recent_sink_attention": to_sinks,
            "remaining_attention": layers["total"] - recent - to_sinks,
        }

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The fields, and their widths."""
        return super().results(order) | {"width": torch.tensor(attention.RECENT)}


class LearnedSink(Observer, metric="learned_sink", reads="attention"):
    """Attention to a learned sink logit."""

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """Only models with learned sinks."""
        if not can.attending:
            return can.absent["pattern"]
        return None if can.learned_sinks else f"{can.architecture} has no learned sink"

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Mean over all real queries."""
        return {"learned_sink_mass": x.learned_sink_mass()}


class ValueShare(Observer, metric="value_share", reads="attention", needs=("pattern", "value")):
    """The sink's share of attention weighted by value norms."""

    statistics = frozenset({"value_share"})

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Mean over the queries after the sink."""
        return {"value_weighted_sink_share": x.value_weighted_share()}
