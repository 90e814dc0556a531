"""FFN dims that mark a token which attends only to itself, and the neurons that write them.

Yan et al. 2024, "Unveiling and Controlling Anomalous Attention Distribution in Transformers" (arXiv
2407.01601), Fig. 1.

1. Scan the FFN outputs of every layer at the position (which a self-only mask keeps from attending
   to others, if it is not position 0) and at all others.
2. A dim stands out where |x| exceeds a multiple of the median over dims and a multiple of the
   largest |x| at any mixed position (`metrics.ffn.nonmixture_dims`; our rule, since the paper's is
   not public).
3. Split the value of each such dim into the contributions a_n · W_out[n, dim] of the neurons.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.scan import scan
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.interventions import SelfOnlyMask
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.output import listed, number, table_as_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from sinkscope.report.report import SinkReport

NEURONS = 5
"""Number of contributing neurons kept for each dim."""
_SHOWN = 0.05
"""Smallest share of a value for which the summary lists a neuron."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NonMixture(Result):
    """The FFN output of one position, usually one that attends only to itself, against all others.

    Attributes:
        report: The scan's FFN and residual fields, for figures and other thresholds.
        position: The position.
        masked: Whether a self-only mask kept it from attending to others.
        causal: Whether attention is causal, so that position 0 attends only to itself without a
            mask.
        over_median: |x| over the median |x| over dims has to exceed this.
        over_mixed: |x| over the largest |x| of any mixed position has to exceed this.
        contributor: The neurons that add most to each dim that stands out; None for mixtures of
            experts.
        contribution: The contribution of each of them, mean over prompts, before any norm that
            follows the down-projection [activation].
        contribution_of_all: The sum over all neurons.
    """

    QUESTION = "Which FFN dims mark a token that attends only to itself?"

    report: SinkReport
    position: int
    masked: bool
    causal: bool
    over_median: float
    over_mixed: float
    contributor: Int[Tensor, "found rank"] | None = None
    contribution: Float[Tensor, "found rank"] | None = None
    contribution_of_all: Float[Tensor, "found"] | None = None

    @property
    def found(self) -> list[dict[str, Any]]:
        """The dims that stand out in most prompts, by layer and size."""
        records = self.report.nonmixture_dims(self.over_median, self.over_mixed)
        return sorted(records, key=lambda record: (record["layer"], -abs(record["value"])))

    def first_writers(self) -> dict[int, int]:
        """For each dim that stands out anywhere, the first layer in which it does."""
        return {
            record["dim"]: record["layer"]
            for record in sorted(self.found, key=lambda record: -record["layer"])
        }

    def neurons(self) -> list[dict[str, Any]]:
        """The neurons that contribute most to each dim that stands out, and their shares of it."""
        if self.contributor is None or self.contribution is None:
            return []
        assert self.contribution_of_all is not None
        shares = self.contribution / self.contribution_of_all[:, None]
        return [
            {
                "layer": record["layer"],
                "dim": record["dim"],
                "neuron": int(self.contributor[row, rank]),
                "contribution": float(self.contribution[row, rank]),
                "share": float(shares[row, rank]),
            }
            for row, record in enumerate(self.found)
            for rank in range(shares.shape[1])
        ]

    def strongest(self) -> list[dict[str, Any]]:
        """For each layer the dim that stands out most over the mixed positions, by rule or not."""
        x, mixed = self.report["ffn_sink"].abs(), self.report["ffn_mixed_max"]
        median = self.report["ffn_sink_median"]
        over_mixed, over_median = (x / mixed).mean(0), (x / median[..., None]).mean(0)
        value = self.report["ffn_sink"].mean(0)
        dims = value.abs().argmax(-1)
        return [
            {
                "layer": layer,
                "dim": dim,
                "value": float(value[layer, dim]),
                "over_median": float(over_median[layer, dim]),
                "over_mixed": float(over_mixed[layer, dim]),
            }
            for layer, dim in enumerate(dims.tolist())
        ]

    def statistics(self) -> dict[str, Any]:
        """Dims, the layers that first write them, and the neurons that do."""
        return {
            "position": self.position,
            "masked": self.masked,
            "over_median": self.over_median,
            "over_mixed": self.over_mixed,
            "dims": self.found,
            "first_written": self.first_writers(),
            "neurons": self.neurons(),
            "largest_by_layer": self.strongest(),
        }

    def summary(self) -> str:
        """The dims that stand out, where they are first written, and by which neurons."""
        where = f"position {self.position}, which {self._why()}"
        rule = (
            f"By our operational rule, |x| > {self.over_median:g} × the median over dims and > "
            f"{self.over_mixed:g} × any mixed position,"
        )
        if not self.found:
            top = max(self.strongest(), key=lambda record: record["over_mixed"])
            return (
                f"{rule} no dim of the FFN output stands out at {where}. The largest is dim "
                f"{top['dim']} of layer {top['layer']}: {number(top['value'])}, "
                f"{number(top['over_median'])} × the median and "
                f"{number(top['over_mixed'])} × the mixed positions."
            )
        rows = [
            [
                str(record["layer"]),
                str(record["dim"]),
                number(record["value"]),
                f"{number(record['over_median'])} ×",
                f"{number(record['over_mixed'])} ×",
                self._written_by(record),
            ]
            for record in self.found
        ]
        columns = ["layer", "dim", "value", "over the median", "over the mixed", "neurons"]
        first = [f"{dim} in layer {layer}" for dim, layer in self.first_writers().items()]
        return "\n".join(
            [
                f"{rule} these dims of the FFN output stand out at {where}:",
                table_as_text(columns, rows),
                f"First written: {listed(first)}. Neurons: those that add at least "
                f"{100 * _SHOWN:.0f} % of the value.",
            ]
        )

    def _why(self) -> str:
        if self.masked:
            return "attends only to itself by a mask"
        if self.causal and self.position == 0:
            return "attends only to itself"
        return "attends to others like all positions"

    def _written_by(self, record: dict[str, Any]) -> str:
        own = [
            f"{neuron['neuron']} ({100 * neuron['share']:.0f} %)"
            for neuron in self.neurons()
            if (neuron["layer"], neuron["dim"]) == (record["layer"], record["dim"])
            and abs(neuron["share"]) >= _SHOWN
        ]
        return ", ".join(own[:3])

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and dim: value at the position (nonmixed), largest of the others."""
        value = self.report.mean("ffn_sink")
        axes = {"layer": range(value.shape[0]), "dim": range(value.shape[1])}
        return tidy(axes, nonmixed=value, mixed_max=self.report.mean("ffn_mixed_max"))

    def figures(self) -> dict[str, go.Figure]:
        """FFN outputs of each layer where a dim stands out, as in the paper's figure 1."""
        from sinkscope.plot import nonmixture_dims

        layers = sorted({record["layer"] for record in self.found}) or [None]
        rule = {"over_median": self.over_median, "over_mixed": self.over_mixed}
        return {
            "ffn" if layer is None else f"ffn-layer-{layer}": nonmixture_dims(
                self.report, layer, **rule
            )
            for layer in layers
        }


def nonmixture(
    model: Any,
    texts: Any,
    position: int = 0,
    *,
    mask: bool | None = None,
    over_median: float = 100.0,
    over_mixed: float = 10.0,
    progress: bool = True,
) -> NonMixture:
    """Find the FFN-output dims in which a non-mixed position stands out (Yan et al., Fig. 1).

    The paper's separation of mixture from non-mixture distributions is not public; the rule is
    operational and ours (`metrics.ffn.nonmixture_dims`).

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length.
        position: The position. Under a causal mask position 0 attends only to itself; in a
            bidirectional model it attends to all others, and is distinguished by its position
            vector or its token.
        mask: Whether a self-only mask keeps the position from attending to others; by default
            everywhere but at position 0.
        over_median: Threshold on |x| over its median over dims.
        over_mixed: Threshold on |x| over the largest |x| of any mixed position.
        progress: Whether to draw a progress bar.

    Returns:
        The FFN outputs, the dims that stand out, and the neurons that write them.

    Raises:
        TextError: If prompts differ in length or end before the position.
        UnsupportedError: If the model shows no FFN output.
    """
    model = load_model(model)
    caps = capabilities(model)
    prompts = readout.even(model, texts, position)
    masked = position != 0 if mask is None else mask
    with SelfOnlyMask(model, position) if masked else nullcontext():
        report = scan(
            model,
            prompts,
            metrics=["ffn", "ffn_dims", "residual"],
            sinks=[position],
            progress=progress,
        )
        hidden = None
        if "neurons" in caps.signals:
            neurons = readout.at("neurons", position)
            hidden = readout.measure(model, prompts, {"neurons": neurons}, [position])["neurons"]
    result = NonMixture(
        about=about(model, prompts),
        report=report,
        position=position,
        masked=masked,
        causal=caps.causal,
        over_median=over_median,
        over_mixed=over_mixed,
    )
    return result if hidden is None else _with_neurons(result, model, hidden)


def _with_neurons(
    result: NonMixture, model: Any, hidden: Float[Tensor, "prompt layer neuron"]
) -> NonMixture:
    """Split each dim that stands out into the neurons' contributions a_n · W_out[n, dim]."""
    added = [
        hidden[:, record["layer"]].float().mean(0)
        * model.blocks[record["layer"]].mlp.W_out.detach()[:, record["dim"]].float().cpu()
        for record in result.found
    ]
    if not added:
        return result
    parts = torch.stack(added)
    largest = parts.abs().argsort(dim=1, descending=True)[:, :NEURONS]
    return dataclasses.replace(
        result,
        contributor=largest,
        contribution=parts.gather(1, largest),
        contribution_of_all=parts.sum(1),
    )
