"""Observers of the residual stream and of the FFN's output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture.accumulators import Accumulator, OverPrompts, Total
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Observer, Scope
from sinkscope.capture.reductions import all_layers
from sinkscope.devices import HostNumber
from sinkscope.errors import ModelError
from sinkscope.metrics import ffn, residual
from sinkscope.metrics.magnitude_median import magnitude_median
from sinkscope.metrics.positions import first_true
from sinkscope.metrics.reductions import at_least_fp32
from sinkscope.report.report import SinkReport

FOLDED_AT_ONCE = 2**23
"""Values of FFN outputs that are sorted and reduced at a time."""


def token_summary(
    layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch
) -> residual.TokenSummary | None:
    """Quantities of a residual state shared by three observers, computed in one pass on CUDA."""
    return batch.once(("token summary", layer), lambda: residual.token_summary(x, batch.first_sink))


def median_magnitude(
    layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch
) -> Float[Tensor, "prompt"]:
    """The median |a| of each prompt's hidden state, which two observers may ask for."""
    return batch.once(("median magnitude", layer), lambda: magnitude_median(x, batch.mask))


class ResidualNorms(Observer, metric="residual", reads="resid_post", core=True):
    """Norms after each block, residual peak of the sink, and outlier tokens."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self._suspect: _Suspect | None = None

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """One norm per token."""
        summary = token_summary(self.layer, x, batch)
        return {"norm": residual.residual_norms(x) if summary is None else summary.norm}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Peaks and medians of all layers; a token's outlier value is the maximum over layers.

        Raises:
            ModelError: If a residual state of a real token was not finite in the previous batch.
        """
        norm = layers["norm"]
        self._refuse_suspect()
        self._suspect = _Suspect.of(norm, batch)
        at_sink = all_layers(residual.mean_at_sinks, norm, batch.sinks, batch.mask)
        median = all_layers(residual.median_of_others, norm, batch.sinks, batch.mask)
        return {
            "residual_norm": norm,
            "residual_peak": at_sink / median,
            "sink_residual_norm": at_sink,
            "median_residual_norm": median,
            "residual_outlier": (norm / median[..., None]).amax(dim=0),
        }

    def conclude(self) -> None:
        """The last batch has none after it.

        Raises:
            ModelError: If a residual state of a real token was nan or infinite.
        """
        self._refuse_suspect()

    def _refuse_suspect(self) -> None:
        if self._suspect is not None:
            self._suspect.refuse()


class _Suspect(NamedTuple):
    """The first layer of a batch with non-finite states, copied to the host asynchronously.

    A nan makes all later values nan, so the error names the layer in which it first appears.
    """

    first_bad: HostNumber
    layers: int

    @classmethod
    def of(cls, norm: Float[Tensor, "layer prompt position"], batch: Batch) -> _Suspect:
        bad = (~torch.isfinite(norm) & batch.mask).flatten(1).any(dim=1)
        return cls(HostNumber(first_true(bad[None])[0]), len(norm))

    def refuse(self) -> None:
        layer = int(self.first_bad)
        if layer < self.layers:
            raise ModelError(
                f"The residual stream after layer {layer} contains nan or infinity, expected "
                "finite numbers; check the weights, or load the model in float32 or bfloat16."
            )


class Outliers(Observer, metric="outliers", reads="resid_post"):
    """How far the residual stream's largest entries and dims stand out, without a threshold."""

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """Three numbers a prompt; the median is the one that `Massive` may ask for."""
        summary = token_summary(self.layer, x, batch)
        if summary is None:
            largest = residual.largest_activation(x, batch.mask)
        else:
            largest = torch.where(batch.mask, summary.peak, 0).amax(dim=1)
        return {
            "largest_activation": largest,
            "largest_over_median": largest / median_magnitude(self.layer, x, batch),
            "residual_kurtosis": residual.kurtosis(x, batch.mask),
        }


class CosineToSink(Observer, metric="cosine", reads="resid_post"):
    """Cosine of every residual state to the sink's; near ±1 at secondary sinks."""

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """One cosine per token."""
        summary = token_summary(self.layer, x, batch)
        if summary is not None:
            return {"cosine_to_sink": summary.cosine}
        return {"cosine_to_sink": residual.cosine_to_sink(x, batch.sinks)}

    def where(self, name: str, batch: Batch) -> Bool[Tensor, "prompt position"]:
        """Prompts with a sink; with `sinks="auto"` some may have none."""
        return batch.mask & batch.sinks.any(dim=1, keepdim=True)

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The field, and the number of prompts in its means."""
        found = super().results(order)
        mean = self._accumulators["cosine_to_sink"]
        assert isinstance(mean, OverPrompts)
        return found | {"prompts_with_sink_at": mean.count}


def ffn_extremes(
    layer: int, x: Float[Tensor, "prompt position dim"], batch: Batch
) -> dict[str, Float[Tensor, "prompt dim"]]:
    """FFN output at the first sink, and largest |FFN output| elsewhere, in the model's dtype."""

    def compute() -> dict[str, Tensor]:
        if batch.sink_is_first_token and not batch.ragged:
            # A copy, so that x can be freed. All other positions are mixed.
            at_sink, mixed = x[:, 0].clone(), ffn.largest(x[:, 1:])
        else:
            at_sink = ffn.at_first(x, batch.first_sink)
            mixed = ffn.largest_where(x, batch.others)
        return {"at_sink": at_sink.to(x.dtype), "mixed": mixed.to(x.dtype)}

    return batch.once(("ffn extremes", layer), compute)


def known_extremes(
    at_sink: Float[Tensor, "layer prompt dim"],
    mixed: Float[Tensor, "layer prompt dim"],
    batch: Batch,
) -> tuple[Float[Tensor, "layer prompt dim"], Float[Tensor, "layer prompt dim"]]:
    """Both in fp32; nan where a prompt has no sink, or no mixed position."""
    has_sink, has_mixed = batch.sinks.any(dim=1), batch.others.any(dim=1)
    return (
        torch.where(has_sink[:, None], at_least_fp32(at_sink), torch.nan),
        torch.where(has_mixed[:, None], at_least_fp32(mixed), torch.nan),
    )


class FfnOutput(Observer, metric="ffn", reads="mlp_out", core=True):
    """FFN output at the sink compared with mixed positions, reduced over prompts."""

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """Two values per dim."""
        return ffn_extremes(self.layer, x, batch)

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Sums over prompts of every dim, and each prompt's largest dims, in chunks of layers.

        nan, and -1 for a dim, where a prompt has no sink or no mixed position.
        """
        together = max(1, FOLDED_AT_ONCE // max(1, layers["mixed"][0].numel()))
        pieces = zip(*(layers[name].split(together) for name in ("at_sink", "mixed")), strict=True)
        found: list[dict[str, Tensor]] = []
        for piece in pieces:
            by_prompt, sums = ffn.folded(*known_extremes(*piece, batch))
            found.append(by_prompt | sums)
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def accumulator(self, name: str) -> Accumulator:
        """Sums over prompts are added over batches, and divided in `results`."""
        return Total() if self._is_sum(name) else super().accumulator(name)

    def results(self, order: Int[Tensor, "prompt"]) -> dict[str, Any]:
        """The fields, with sums over prompts converted to means."""
        found = super().results(order)
        found["ffn_prompts"] = found["ffn_prompts"].clamp(min=0)  # a layer without FFN has none
        sums = {name: x for name, x in found.items() if self._is_sum(name)}
        return found | ffn.as_means(sums)

    @staticmethod
    def _is_sum(name: str) -> bool:
        return SinkReport.variables()[name].dims[0] != "prompt"


class FfnDims(Observer, metric="ffn_dims", reads="mlp_out", on_request=True):
    """FFN outputs for every prompt and dim, 2 × prompts × layers × dims values."""

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """The same two values per dim as `FfnOutput`."""
        return ffn_extremes(self.layer, x, batch)

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """All values, nan where a prompt has none."""
        at_sink, mixed = known_extremes(layers["at_sink"], layers["mixed"], batch)
        return {"ffn_sink": at_sink, "ffn_mixed_max": mixed}
