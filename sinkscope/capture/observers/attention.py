"""Observers of attention; each asks a reader, which knows how the path got its numbers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope.capture.aggregate import Fold, OverLayers, OverPrompts, Summed, received_summary
from sinkscope.capture.batches import Batch, average
from sinkscope.capture.observers.base import Folded, Observer, Scope
from sinkscope.capture.readers import AttentionReader
from sinkscope.metrics import attention


class SinkAttention(Observer):
    """Attention paid to the sinks: its mean, AWFT, Gu's importance, and by query position."""

    signal = "attention"
    fields = (
        "sink_attention",
        "first_token_attention",
        "sink_importance",
        "received_by_distance",
    )

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """One column of the pattern in the usual case, averaged over every set of queries at once.

        With several sinks, or one that is not the first token, up to three columns.
        """
        weights = batch.sink_averages(x.window, self.scope.bucket_edges)
        to_sinks = average(x.on_keys(batch.sinks, batch.most_sinks), weights)
        to_first_sink = to_first_token = to_sinks
        if not batch.one_sink_each:
            to_first_sink = average(x.on_keys(batch.first_sink_mask, most=1), weights)
        if not batch.sink_is_first_token:
            to_first_token = average(x.on_keys(batch.first_token, most=1), weights)
        self.keep(
            layer, to_sinks=to_sinks, to_first_sink=to_first_sink, to_first_token=to_first_token
        )

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Take the columns of `Batch.sink_averages` apart."""
        return {
            "sink_attention": layers["to_sinks"][..., 0],
            "first_token_attention": layers["to_first_token"][..., 1],
            "sink_importance": layers["to_first_sink"][..., 2],
            "received_by_distance": layers["to_sinks"][..., 3:],
        }

    def where(self, name: str, batch: Batch) -> Bool[Tensor, "prompt position"]:
        """A prompt counts in the buckets where it has a query after the sink."""
        if name == "received_by_distance":
            return batch.buckets(self.scope.bucket_edges).any(dim=1)
        return super().where(name, batch)

    def results(self, order: Int[Tensor, "prompt"]) -> Folded:
        """The fields, and the buckets that `received_by_distance` is over."""
        fold = self._folds["received_by_distance"]
        assert isinstance(fold, OverPrompts)
        edges = torch.tensor(self.scope.bucket_edges)
        return super().results(order) | {"bucket": edges, "prompts_in_bucket": fold.count}


class Received(Observer):
    """Attention that every key receives from every head, and how many heads make it a sink."""

    signal = "attention"
    statistics = frozenset({"received"})
    fields = (
        "received_attention",
        "uniform_ratio",
        "received_peak",
        "sink_rate",
        "sink_rate_curve",
    )

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._windows: dict[int, int | None] = {}

    def fold(self, name: str) -> Fold:
        """All but the token strip are summed over the batch's prompts in the hook already."""
        if name == "received_peak":
            return OverLayers(lambda layers: layers.mean(dim=0))
        return Summed()

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """Gu's importance of every key; only sums over prompts or heads are kept."""
        thresholds = batch.constant((self.scope.epsilon, *attention.EPSILONS))
        found = received_summary(x.received(), batch.per_query(x.window), thresholds)
        self.keep(
            layer, received_attention=found.importance, received_peak=found.peak, above=found.above
        )
        if batch.ragged:
            self.keep(layer, uniform_ratio=found.over(batch.per_uniform(x.window)))
        self._windows[layer] = x.window

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Split the counts above the thresholds into the asked-for ε and the curve."""
        above = layers.pop("above").float().mean(dim=0, keepdim=True) / self.scope.n_heads
        layers |= {"sink_rate": above[:, 0], "sink_rate_curve": above[:, 1:]}
        if not batch.ragged:  # then uniform attention is the same for every prompt
            rows = [batch.per_uniform(window)[0] for _, window in sorted(self._windows.items())]
            ratio = layers["received_attention"] * torch.stack(rows)[:, None, :]
            layers["uniform_ratio"] = ratio
        return layers

    def results(self, order: Int[Tensor, "prompt"]) -> Folded:
        """The fields, the rates without the layer axis that their fold carries."""
        found = super().results(order)
        for name in ("sink_rate", "sink_rate_curve"):
            found[name] = found[name][0]
        return found | {"epsilon": torch.tensor(attention.EPSILONS)}


class Entropy(Observer):
    """Entropy of the attention rows."""

    signal = "attention"
    statistics = frozenset({"entropy"})
    fields = ("attention_entropy",)

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """Mean over all real queries."""
        self.keep(layer, attention_entropy=average(x.entropy(), batch.averages("mask"))[..., 0])


class LogitGap(Observer):
    """How far the sink's logit stands above the others'."""

    signal = "attention"
    needs = frozenset({"scores"})
    fields = ("sink_logit_gap",)

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """Mean over the queries that see the sink and some other key."""
        self.keep(layer, sink_logit_gap=x.logit_gap())


class SinkLogitGeometry(Observer):
    """The sink logit as norms and cosines."""

    signal = "attention"
    needs = frozenset({"query", "key"})
    fields = ("sink_query_norm", "sink_key_norm", "sink_cosine", "other_cosine")

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """All four at once."""
        logit = x.sink_logit()
        self.keep(
            layer,
            sink_query_norm=logit.query_norm,
            sink_key_norm=logit.key_norm,
            sink_cosine=logit.cosine,
            other_cosine=logit.other_cosine,
        )


class LearnedSink(Observer):
    """Attention that a learned sink logit takes."""

    signal = "attention"
    fields = ("learned_sink_mass",)

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """Mean over all real queries."""
        self.keep(layer, learned_sink_mass=x.learned_sink_mass())


class ValueShare(Observer):
    """The sink's share once attention is weighted by the size of the values."""

    signal = "attention"
    needs = frozenset({"pattern", "value"})
    fields = ("value_weighted_sink_share",)

    def observe(self, layer: int, x: AttentionReader, batch: Batch) -> None:
        """Mean over the queries after the sink."""
        self.keep(layer, value_weighted_sink_share=x.value_weighted_share())
