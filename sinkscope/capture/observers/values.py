"""Observers of values and of what the heads write."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinkscope.capture.batches import Batch, average
from sinkscope.capture.observers.base import Observer
from sinkscope.capture.readers import GatedValue
from sinkscope.capture.reductions import all_layers
from sinkscope.metrics import gates, heads, values
from sinkscope.models.capabilities import Capabilities


class Values(Observer, metric="values", reads="value", core=True):
    """Sizes of the values, and how drained the sink's is."""

    def observe(
        self, x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm a vector; everything else waits."""
        return {"norm": values.norms(x)}

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


class Latent(Observer, metric="latent", reads="latent"):
    """Sizes of the latent that keys and values are projected from (DeepSeek-AI 2024, 2405.04434).

    Its RMSNorm all but hides the size, so it is measured before it, and the ratio after it too.
    """

    def observe(
        self, x: Float[Tensor, "prompt position latent_dim"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm a position."""
        return {"norm": values.norms(x[:, :, None])[:, 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms by position, ratios by prompt."""
        norm = layers["norm"]
        return {"latent_norm": norm, "latent_drain": _drain_of_one(norm, batch)}


class NormedLatent(Observer, metric="latent", reads="normed_latent"):
    """The same after the latent's own RMSNorm."""

    def observe(
        self, x: Float[Tensor, "prompt position latent_dim"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm a position."""
        return {"norm": values.norms(x[:, :, None])[:, 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Ratios by prompt."""
        return {"normed_latent_drain": _drain_of_one(layers["norm"], batch)}


def _drain_of_one(
    norm: Float[Tensor, "layer prompt position"], batch: Batch
) -> Float[Tensor, "layer prompt"]:
    """`values.drain` of a vector that all heads share."""
    return all_layers(values.drain, norm[:, :, None], batch.sinks, batch.mask)[..., 0]


class HeadOutputs(Observer, metric="head_outputs", reads="z", core=True):
    """Sizes of the heads' outputs before W_O."""

    def observe(
        self, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """Mean over real positions, and the last one."""
        return {"norm": average(values.norms(x), batch.averages("mask", "last_token"))}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """HONOR compares a head with its layer."""
        mean, last = layers["norm"].unbind(-1)
        return {"head_output_norm": mean, "last_output_norm": last, "honor": heads.honor(mean)}


class ThroughOutput(Observer):
    """What is measured through the output projection W_O."""

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """W_O has to be there head by head, and to be all that stands behind the heads."""
        if not can.attending:
            return can.absent["z"]
        if not can.split_output:
            return (
                f"the output projections of this {can.architecture} give no W_O for each head, as "
                "where layers differ in geometry, weights are offloaded, or they are not linear"
            )
        return None


class ValuesThroughOutput(ThroughOutput, metric="through_output", reads="gated_value"):
    """Sizes of the values as the residual stream would receive them: ‖v_j W_O^h‖.

    Behind a gate, the root mean square over queries of ‖(g_i ⊙ v_j) W_O^h‖.
    """

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """A gate has to be known: W_O alone does not say what passes it."""
        unknown = can.absent["gate"] if can.gated and can.gate is None else None
        return super().unavailable(can) or unknown

    def observe(self, x: GatedValue, batch: Batch) -> dict[str, Tensor]:
        """By the Gram form, so nothing d_model wide is made."""
        gram = self.scope.gram(self.layer)
        if x.gate is None:
            return {"norm": values.norms_through(x.value, gram)}
        return {"norm": gates.norms_through(x.value, gram, x.gate, batch.mask)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms by position, drains by prompt."""
        drain = all_layers(values.drain, layers["norm"], batch.sinks, batch.mask)
        return {"value_norm_out": layers["norm"], "value_drain_out": drain}


class HeadOutputsThroughOutput(ThroughOutput, metric="through_output", reads="z"):
    """Sizes of what the heads write to the residual stream: ‖z_i W_O^h‖."""

    def observe(
        self, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """By the Gram form, so nothing d_model wide is made."""
        norm = values.norms_through(x, self.scope.gram(self.layer))
        return {"norm": average(norm, batch.averages("mask"))[..., 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """HONOR compares a head with its layer."""
        return {"head_output_norm_out": layers["norm"], "honor_out": heads.honor(layers["norm"])}
