"""Observers of values and of head outputs."""

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
    """Norms of the values, and value drain of the sink."""

    def observe(
        self, x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm per vector."""
        return {"norm": values.norms(x)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Drains per KV head; first and mean norm repeated for query heads (GQA)."""
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
    """Norms of the latent of keys and values before its RMSNorm (DeepSeek-AI 2024, 2405.04434).

    The RMSNorm removes most of the differences, so only the ratio is measured after it as well.
    """

    def observe(
        self, x: Float[Tensor, "prompt position latent_dim"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm per position."""
        return {"norm": values.norms(x[:, :, None])[:, 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms by position, ratios by prompt."""
        norm = layers["norm"]
        return {"latent_norm": norm, "latent_drain": _drain_of_one(norm, batch)}


class NormedLatent(Observer, metric="latent", reads="normed_latent"):
    """Latent drain after the latent's RMSNorm."""

    def observe(
        self, x: Float[Tensor, "prompt position latent_dim"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm per position."""
        return {"norm": values.norms(x[:, :, None])[:, 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Ratios by prompt."""
        return {"normed_latent_drain": _drain_of_one(layers["norm"], batch)}


def _drain_of_one(
    norm: Float[Tensor, "layer prompt position"], batch: Batch
) -> Float[Tensor, "layer prompt"]:
    """`values.drain` for a vector shared by all heads."""
    return all_layers(values.drain, norm[:, :, None], batch.sinks, batch.mask)[..., 0]


class HeadOutputs(Observer, metric="head_outputs", reads="z", core=True):
    """Norms of the heads' outputs before W_O."""

    def observe(
        self, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """Mean over real positions, and the last one."""
        return {"norm": average(values.norms(x), batch.averages("mask", "last_token"))}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms, and HONOR: a head's norm over its layer's mean."""
        mean, last = layers["norm"].unbind(-1)
        return {"head_output_norm": mean, "last_output_norm": last, "honor": heads.honor(mean)}


class ThroughOutput(Observer):
    """Base class of measurements after the output projection W_O."""

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """Each head needs a W_O, with nothing else between head output and residual stream."""
        if not can.attending:
            return can.absent["z"]
        if not can.split_output:
            return (
                f"the output projections of this {can.architecture} give no W_O for each head, as "
                "where layers differ in geometry, weights are offloaded, or they are not linear"
            )
        return None


class ValuesThroughOutput(ThroughOutput, metric="through_output", reads="gated_value"):
    """Norms of the values after W_O: ‖v_j W_O^h‖.

    With a gate, the root mean square over queries of ‖(g_i ⊙ v_j) W_O^h‖.
    """

    @classmethod
    def unavailable(cls, can: Capabilities) -> str | None:
        """The factors of a gate must be known."""
        unknown = can.absent["gate"] if can.gated and can.gate is None else None
        return super().unavailable(can) or unknown

    def observe(self, x: GatedValue, batch: Batch) -> dict[str, Tensor]:
        """Computed with Gram matrices, without tensors of width d_model."""
        gram = self.scope.gram(self.layer)
        if x.gate is None:
            return {"norm": values.norms_through(x.value, gram)}
        return {"norm": gates.norms_through(x.value, gram, x.gate, batch.mask)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms by position, drains by prompt."""
        drain = all_layers(values.drain, layers["norm"], batch.sinks, batch.mask)
        return {"value_norm_out": layers["norm"], "value_drain_out": drain}


class HeadOutputsThroughOutput(ThroughOutput, metric="through_output", reads="z"):
    """Norms of the heads' contributions to the residual stream: ‖z_i W_O^h‖."""

    def observe(
        self, x: Float[Tensor, "prompt position head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """Computed with Gram matrices, without tensors of width d_model."""
        norm = values.norms_through(x, self.scope.gram(self.layer))
        return {"norm": average(norm, batch.averages("mask"))[..., 0]}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Norms, and HONOR: a head's norm over its layer's mean."""
        return {"head_output_norm_out": layers["norm"], "honor_out": heads.honor(layers["norm"])}
