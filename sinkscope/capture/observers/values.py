"""Observers of values and of what the heads write."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinkscope.capture.aggregate import all_layers
from sinkscope.capture.batches import Batch, average
from sinkscope.capture.observers.base import Observer
from sinkscope.metrics import heads, values


class Values(Observer):
    """Sizes of the values, and how drained the sink's is."""

    signal = "value"
    fields = ("value_norm", "value_drain", "first_value_norm", "mean_value_norm")

    def observe(
        self, layer: int, x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
    ) -> None:
        """One norm a vector; everything else waits."""
        self.keep(layer, norm=values.norms(x))

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Drains per KV head; first and mean norm as every query head sees them (GQA)."""
        norm = layers["norm"]
        drain = all_layers(values.drain, norm, batch.sinks, batch.mask)
        mean = all_layers(values.mean_norm, norm, batch.mask)
        group = self.scope.n_heads // norm.shape[2]
        return {
            "value_norm": norm,
            "value_drain": drain,
            "first_value_norm": norm[..., 0].repeat_interleave(group, dim=-1),
            "mean_value_norm": mean.repeat_interleave(group, dim=-1),
        }


class HeadOutputs(Observer):
    """Sizes of the heads' outputs before W_O."""

    signal = "z"
    fields = ("head_output_norm", "last_output_norm", "honor")

    def observe(
        self, layer: int, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> None:
        """Mean over real positions, and the last one."""
        norm = values.norms(x)
        self.keep(layer, norm=average(norm, batch.averages("mask", "last_token")))

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """HONOR compares a head with its layer."""
        mean, last = layers["norm"].unbind(-1)
        return {"head_output_norm": mean, "last_output_norm": last, "honor": heads.honor(mean)}


class ValuesThroughOutput(Observer):
    """Sizes of the values as the residual stream would receive them: ‖v_j W_O^h‖."""

    signal = "value"
    fields = ("value_norm_out", "value_drain_out")

    def observe(
        self, layer: int, x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
    ) -> None:
        """By the Gram form, so nothing d_model wide is made."""
        group = self.scope.n_heads // x.shape[2]
        wide = x.repeat_interleave(group, dim=2)
        self.keep(layer, norm=values.norms_through(wide, self.scope.gram(layer)))

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms by position, drains by prompt."""
        drain = all_layers(values.drain, layers["norm"], batch.sinks, batch.mask)
        return {"value_norm_out": layers["norm"], "value_drain_out": drain}


class HeadOutputsThroughOutput(Observer):
    """Sizes of what the heads write to the residual stream: ‖z_i W_O^h‖."""

    signal = "z"
    fields = ("head_output_norm_out", "honor_out")

    def observe(
        self, layer: int, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> None:
        """By the Gram form, so nothing d_model wide is made."""
        norm = values.norms_through(x, self.scope.gram(layer))
        self.keep(layer, norm=average(norm, batch.averages("mask"))[..., 0])

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """HONOR compares a head with its layer."""
        return {"head_output_norm_out": layers["norm"], "honor_out": heads.honor(layers["norm"])}
