"""Observers of the residual stream and of the FFN's output."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.batches import Batch
from sinkscope.capture.folds import Fold, OverLayers
from sinkscope.capture.observers.base import Folded, Observer, Scope
from sinkscope.errors import ModelError
from sinkscope.metrics import ffn, residual
from sinkscope.report import MassiveActivations

ENTRIES_KEPT = 64
"""Massive activations kept of one prompt and layer, largest first; `count` counts them all."""


class ResidualNorms(Observer):
    """Norms after each block, the sink's peak over the others, and outlier tokens."""

    signal = "resid_post"
    fields = (
        "residual_norm",
        "residual_peak",
        "sink_residual_norm",
        "median_residual_norm",
        "residual_outlier",
    )

    def fold(self, name: str) -> Fold:
        """An outlier in any layer is an outlier."""
        if name == "residual_outlier":
            return OverLayers(lambda layers: layers.amax(dim=0))
        return super().fold(name)

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """One norm a token; everything else waits."""
        self.keep(layer, norm=residual.residual_norms(x))

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Peaks and medians of all layers at once.

        Raises:
            ModelError: If a residual state of a real token is nan or infinite.
        """
        norm = layers["norm"]
        _refuse_non_finite(norm, batch)
        at_sink = torch.stack(
            [residual.mean_at_sinks(one, batch.sinks, batch.mask) for one in norm]
        )
        median = torch.stack(
            [residual.median_of_others(one, batch.sinks, batch.mask) for one in norm]
        )
        return {
            "residual_norm": norm,
            "residual_peak": at_sink / median,
            "sink_residual_norm": at_sink,
            "median_residual_norm": median,
            "residual_outlier": norm / median[..., None],
        }


def _refuse_non_finite(norm: Float[Tensor, "layer prompt position"], batch: Batch) -> None:
    """One nan makes every later figure nan: better to say which layer made it."""
    bad = (~torch.isfinite(norm) & batch.mask).flatten(1).any(dim=1)
    if bad.any():
        layer = int(bad.nonzero()[0, 0])
        raise ModelError(
            f"The residual stream after layer {layer} holds nan or infinity, expected finite "
            "numbers; check the weights, or load the model in float32 or bfloat16."
        )


class CosineToSink(Observer):
    """Direction of every residual state relative to the sink's: secondary sinks show as ±1."""

    signal = "resid_post"
    fields = ("cosine_to_sink",)

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """One cosine a token."""
        self.keep(layer, cosine_to_sink=residual.cosine_to_sink(x, batch.sinks))


class Massive(Observer):
    """Massive activations: a list of entries, not a fixed shape."""

    signal = "resid_post"
    fields = ()

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._running: list[tuple[int, residual.MassiveEntries]] = []
        self._entries: list[dict[str, Tensor]] = []
        self._counts: list[Int[Tensor, "prompt layer"]] = []

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """The rule of Sun et al., applied to one hidden state."""
        self._running.append((layer, residual.massive_activations(x, batch.mask)))

    def close(self, batch: Batch) -> tuple[list[dict[str, Tensor]], Int[Tensor, "prompt layer"]]:
        """Number the prompts as the text does and keep the largest entries."""
        counts = torch.zeros(len(batch.rows), len(self._running), dtype=torch.long)
        entries = []
        for column, (layer, found) in enumerate(sorted(self._running, key=lambda pair: pair[0])):
            found = residual.MassiveEntries(*(part.cpu() for part in found))
            counts[:, column] = torch.bincount(found.prompt, minlength=len(batch.rows))
            entries.append(_largest(found, layer, batch.rows))
        self.drop()
        return entries, counts

    def add(
        self,
        finished: tuple[list[dict[str, Tensor]], Int[Tensor, "prompt layer"]],
        batch: Batch,
    ) -> None:
        """Append one batch's entries."""
        entries, counts = finished
        self._entries += entries
        self._counts.append(counts)

    def drop(self) -> None:
        """Forget the batch that is running."""
        self._running.clear()

    def results(self, order: Int[Tensor, "prompt"]) -> Folded:
        """Entries by prompt, layer and size."""
        merged = {
            name: torch.cat([entries[name] for entries in self._entries])
            for name in self._entries[0]
        }
        by = torch.argsort(merged["value"].abs(), descending=True, stable=True)
        for name in ("layer", "prompt"):
            by = by[torch.argsort(merged[name][by], stable=True)]
        counts = torch.cat(self._counts)[torch.argsort(order)]
        merged = {name: value[by] for name, value in merged.items()}
        return {"massive": MassiveActivations(**merged, count=counts)}


def _largest(
    found: residual.MassiveEntries, layer: int, rows: Int[Tensor, "prompt"]
) -> dict[str, Tensor]:
    """At most `ENTRIES_KEPT` entries of each prompt in one layer."""
    by = torch.argsort(found.value.abs(), descending=True, stable=True)
    by = by[torch.argsort(found.prompt[by], stable=True)]
    prompt = found.prompt[by]
    rank = torch.arange(len(prompt)) - torch.searchsorted(prompt, prompt)
    by = by[rank < ENTRIES_KEPT]
    return {
        "prompt": rows[found.prompt[by]],
        "layer": torch.full_like(by, layer),
        "position": found.position[by],
        "dim": found.dim[by],
        "value": found.value[by],
        "ratio": found.ratio[by],
    }


class FfnOutput(Observer):
    """The FFN's output at the sink against all positions that mix."""

    signal = "mlp_out"
    fields = ("ffn_sink", "ffn_mixed_max", "ffn_sink_median")

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """Two numbers a dim and one a prompt, from which any threshold can be applied later."""
        at_sink, mixed_max, median = ffn.ffn_profile(x, batch.sinks, batch.mask)
        self.keep(layer, ffn_sink=at_sink, ffn_mixed_max=mixed_max, ffn_sink_median=median)
