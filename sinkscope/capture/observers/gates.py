"""Observer of the gates on the heads' outputs."""

from __future__ import annotations

from torch import Tensor

from sinkscope.capture.batches import Batch, average
from sinkscope.capture.observers.base import Observer
from sinkscope.capture.readers import GatedAttention
from sinkscope.metrics import gates


class Gates(Observer, metric="gates", reads="gated_attention"):
    """Openness of each head's gate, and the attention to the sinks that passes it."""

    def observe(self, x: GatedAttention, batch: Batch) -> dict[str, Tensor]:
        """Means over channels, averaged over all queries by one product; see `metrics.gates`."""
        paid = x.attention.on_keys(batch.sinks, batch.most_sinks)
        opened, closed = gates.openness(x.gate), gates.closed(x.gate)
        everywhere, after = batch.averages("mask"), batch.averages("queries")
        return {
            "gate_mean": average(opened, everywhere)[..., 0],
            "gate_closed": average(closed, everywhere)[..., 0],
            "gated_sink_attention": average(paid * opened, after)[..., 0],
        }
