"""Whether the massive activations of a hybrid model spike right before its attention layers.

Su et al. 2026, "Massive Activations in Hybrid Linear Attention Large Language Models: Pre-Attention
Spikes and Inter-Spike Plateaus" (arXiv 2608.12149): with few attention layers, the sink's "
"largest activation rises right before each of them and falls after it; with more, the spikes "
"merge into a plateau"Spikes and Inter-Spike Plateaus" (arXiv 2608.12149): with few attention
layers, the sink's largest activation rises right before each of them and falls after it; with more,
the spikes merge into a plateau.

1. Measure the largest |a| of every token after every layer.
2. In every attention layer, take the token that receives most attention from later queries, mean
   over these and over heads: its sink.
3. Sink–spike alignment: the share of these layers before which the sink's activation is the largest
   of its block, the layers since the last attention layer. By chance it would be one over the
   length of the block.
4. Inter-spike retention, at the token that is the sink of most layers: the share of two
   neighbouring spikes that is left in the layers between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.readout import Quantity
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.metrics import residual
from sinkscope.metrics import spikes as definitions
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.output import listed, number, table_as_text
from sinkscope.statistics import estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PEAKS = Quantity("resid_post", lambda x, batch: residual.token_peaks(x, batch.mask).float())
"""Largest |a| of each position after each layer [prompt position]."""
LATER = Quantity("pattern", lambda x, batch: definitions.later_attention(x, batch.mask))
"""Attention that each key receives from later queries [prompt position]."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Spikes(Result):
    """The largest activations of a hybrid model by layer, alignment and retention.

    Attributes:
        attending: The attention layers.
        events: Those along `event`: attention layers right after a layer without attention.
        pairs: The layers of neighbouring spikes along `interval`.
        value: Largest |a| of each position after each layer [activation].
        sinks: Sink of each layer that attends.
        sink: The position whose retention is measured: the sink of most of these layers (of two,
            the one that is the sink of an earlier layer), or the requested one.
        aligned: Whether the sink of each event spikes right before it, 0 or 1.
        retained: Retention between each pair of spikes [share].
    """

    QUESTION = "Do massive activations spike right before the attention layers?"

    attending: tuple[int, ...]
    events: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    value: Float[Tensor, "prompt layer position"]
    sinks: Int[Tensor, "prompt attends"]
    sink: Int[Tensor, "prompt"]
    aligned: Float[Tensor, "prompt event"]
    retained: Float[Tensor, "prompt interval"]

    @property
    def value_at_sink(self) -> Float[Tensor, "prompt layer"]:
        """Largest |a| after each layer at each prompt's `sink` [activation]."""
        return self.value[torch.arange(len(self.sink)), :, self.sink]

    @property
    def chance(self) -> float:
        """Expected alignment if the largest layer of each block were drawn at random [share]."""
        lengths = [len(block) for block in definitions.blocks(self.attending).values()]
        return sum(1 / length for length in lengths) / len(lengths)

    def statistics(self) -> dict[str, Any]:
        """Alignment and retention with intervals over prompts, overall and by layer."""
        value = self.value_at_sink.mean(0)
        return {
            "attending": list(self.attending),
            "alignment": estimate(self.aligned.mean(1)),
            "alignment_by_chance": self.chance,
            "alignment_by_layer": {
                str(at): estimate(self.aligned[:, i]) for i, at in enumerate(self.events)
            },
            "retention": estimate(self.retained.nanmean(1)) if self.pairs else None,
            "retention_by_pair": {
                f"{left} to {right}": estimate(self.retained[:, i])
                for i, (left, right) in enumerate(self.pairs)
            },
            "sink": self.sink.tolist(),
            "largest": float(value.max()),
            "largest_after": int(value.argmax()),
        }

    def summary(self) -> str:
        """Alignment and retention in words, and a table of the attention layers."""
        facts = self.statistics()
        where = sorted(set(self.sink.tolist()))
        lines = [
            f"Sink–spike alignment: {facts['alignment'].to_decimals(3)}, by chance "
            f"{self.chance:.3f}. "
            + (
                f"Inter-spike retention: {facts['retention'].to_decimals(3)}."
                if self.pairs
                else "No two spikes have a layer between them, so there is no retention."
            ),
            f"The largest activation at position {listed([str(at) for at in where])}, "
            f"{number(facts['largest'])}, occurs after layer {facts['largest_after']}.",
        ]
        mean = self.value_at_sink.mean(0)
        rows = [
            [
                str(at),
                f"{block.start} to {block[-1]}" if len(block) > 1 else str(block.start),
                number(float(mean[at - 1])),
                number(float(mean[at])),
                facts["alignment_by_layer"][str(at)].to_decimals(2),
            ]
            for at, block in definitions.blocks(self.attending).items()
        ]
        columns = ["attends", "its block", "|a| before it", "|a| after it", "aligned"]
        return "\n".join([*lines, table_as_text(columns, rows)])

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and layer: largest |a| at the sink, and whether the layer attends."""
        prompts, layers = self.value.shape[:2]
        axes = {"prompt": range(prompts), "layer": range(layers)}
        attends = torch.tensor([layer in self.attending for layer in range(layers)])
        return tidy(axes, value=self.value_at_sink, attends=attends).astype({"attends": bool})

    def figures(self) -> dict[str, go.Figure]:
        """The sink's largest activation by layer, with the attention layers marked."""
        from sinkscope.plot import pre_attention_spikes

        return {"spikes": pre_attention_spikes(self.to_frame(), about=self.about)}


def spikes(model: Any, texts: Any, sink: int | None = None) -> Spikes:
    """Measure the alignment of spikes with attention layers, and the retention between spikes.

    The full pattern of each attention layer is computed, one layer at a time.

    Args:
        model: A bridge, or anything that `load_model` takes: a causal model in which some layers
            have attention.
        texts: Prompts of equal length.
        sink: The position whose retention is measured; by default the sink of most layers.

    Returns:
        Activations, sinks, alignment and retention of every prompt.

    Raises:
        UnsupportedError: If the model is not causal, shows no pattern, or has no attention layer
            after a layer without attention.
        TextError: If prompts differ in length, or end before the sink.
    """
    model = load_model(model)
    caps = capabilities(model)
    if not caps.attending:
        raise UnsupportedError(
            f"Spikes are measured before attention layers: {caps.absent['pattern']}."
        )
    if not caps.causal:
        raise UnsupportedError(
            f"{caps.architecture} is bidirectional, and the sink of a layer is defined here by the "
            "attention of later queries; use a causal model."
        )
    blocks = definitions.blocks(caps.attending)
    if not blocks:
        raise UnsupportedError(
            f"In {caps.architecture} no layer without attention comes before an attention layer, so"
            f" there is no block in which a spike could be; use a hybrid model, such as Qwen3.5."
        )
    prompts = readout.even(model, texts, 0 if sink is None else sink)
    measured = readout.measure(model, prompts, {"value": PEAKS, "later": LATER})
    later = measured["later"][:, list(caps.attending)].nan_to_num(-torch.inf)
    sinks = later.argmax(dim=2)
    consensus = torch.tensor([_most(row) if sink is None else sink for row in sinks.tolist()])
    value = measured["value"]
    at_sink = value[torch.arange(len(value)), :, consensus]
    return Spikes(
        about=about(model, prompts),
        attending=caps.attending,
        events=tuple(blocks),
        pairs=tuple(definitions.intervals(caps.attending)),
        value=value,
        sinks=sinks,
        sink=consensus,
        aligned=definitions.alignment(value, sinks, caps.attending),
        retained=definitions.retention(at_sink, caps.attending),
    )


def _most(positions: list[int]) -> int:
    """Return the position that occurs most often, the first one in case of ties."""
    return max(positions, key=positions.count)
