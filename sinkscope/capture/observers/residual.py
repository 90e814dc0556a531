"""Observers of the residual stream and of the FFN's output."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture._reduce import all_layers
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
        at_sink = all_layers(residual.mean_at_sinks, norm, batch.sinks, batch.mask)
        median = all_layers(residual.median_of_others, norm, batch.sinks, batch.mask)
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
        self._running: dict[int, residual.MassiveEntries] = {}
        self._entries: list[dict[str, Tensor]] = []
        self._counts: list[Int[Tensor, "prompt layer"]] = []

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """The rule of Sun et al., applied to one hidden state."""
        self._running[layer] = residual.massive_activations(x, batch.mask)

    def close(self, batch: Batch) -> tuple[dict[str, Tensor], Int[Tensor, "prompt layer"]]:
        """Number the prompts as the text does and keep the largest entries."""
        layers, device = sorted(self._running), batch.tokens.device
        parts = zip(*(self._running[layer] for layer in layers), strict=True)
        # One transfer for all layers, not one a layer: each waits for the device.
        found = residual.MassiveEntries(
            *(torch.cat([one.to(device) for one in part]).cpu() for part in parts)
        )
        sizes = torch.tensor([len(self._running[layer].prompt) for layer in layers])
        column = torch.arange(len(layers)).repeat_interleave(sizes)
        counts = torch.zeros(len(batch.rows), len(layers), dtype=torch.long)
        counts.index_put_((found.prompt, column), torch.ones_like(column), accumulate=True)
        entries = _largest(found, torch.tensor(layers)[column], batch.rows)
        self.drop()
        return entries, counts

    def add(
        self, finished: tuple[dict[str, Tensor], Int[Tensor, "prompt layer"]], batch: Batch
    ) -> None:
        """Append one batch's entries."""
        entries, counts = finished
        self._entries.append(entries)
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
        by = _sorted(merged["prompt"], merged["layer"], merged["value"])
        counts = torch.cat(self._counts)[torch.argsort(order)]
        merged = {name: value[by] for name, value in merged.items()}
        return {"massive": MassiveActivations(**merged, count=counts)}


def _largest(
    found: residual.MassiveEntries, layer: Int[Tensor, "entry"], rows: Int[Tensor, "prompt"]
) -> dict[str, Tensor]:
    """At most `ENTRIES_KEPT` entries of each prompt in each layer."""
    by = _sorted(found.prompt, layer, found.value)
    group = found.prompt[by] * (int(layer.max()) + 1 if len(layer) else 1) + layer[by]
    rank = torch.arange(len(by)) - torch.searchsorted(group, group)
    by = by[rank < ENTRIES_KEPT]
    return {
        "prompt": rows[found.prompt[by]],
        "layer": layer[by],
        "position": found.position[by],
        "dim": found.dim[by],
        "value": found.value[by],
        "ratio": found.ratio[by],
    }


def _sorted(
    prompt: Int[Tensor, "entry"], layer: Int[Tensor, "entry"], value: Float[Tensor, "entry"]
) -> Int[Tensor, "entry"]:
    """Order by prompt, then layer, then falling size."""
    by = torch.argsort(value.abs(), descending=True, stable=True)
    for key in (layer, prompt):
        by = by[torch.argsort(key[by], stable=True)]
    return by


class FfnOutput(Observer):
    """The FFN's output at the sink against all positions that mix."""

    signal = "mlp_out"
    fields = ("ffn_sink", "ffn_mixed_max", "ffn_sink_median")

    def observe(self, layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch) -> None:
        """Two numbers a dim, from which any threshold can be applied later."""
        at_sink = ffn.at_first(x, batch.first_sink)
        if batch.sink_is_first_token and not batch.ragged:
            mixed = ffn.largest(x[:, 1:])  # in place: nothing to leave out, so nothing to copy
        else:
            mixed = ffn.largest_where(x, batch.others)
        self.keep(layer, at_sink=at_sink, mixed=mixed)

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Medians of all layers at once; nan where a prompt has no sink or nothing that mixes."""
        has_sink, has_mixed = batch.sinks.any(dim=1), batch.others.any(dim=1)
        at_sink = torch.where(has_sink[:, None], layers["at_sink"], torch.nan)
        return {
            "ffn_sink": at_sink,
            "ffn_mixed_max": torch.where(has_mixed[:, None], layers["mixed"], torch.nan),
            "ffn_sink_median": ffn.median_over_dims(at_sink),
        }
