"""Massive activations of hybrid models: spikes right before the layers with attention.

In a model in which only some layers have attention, an *event* is a layer with attention directly
preceded by at least one layer without. Its block consists of the layers since the previous layer
with attention; a spike is expected in the last of them, right before the event.

Source: Su et al. (2026), Massive Activations in Hybrid Linear Attention Large Language Models:
Pre-Attention Spikes and Inter-Spike Plateaus, arXiv 2608.12149, and their published code. Layers
are counted from 0 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics.reductions import at_least_fp32


def later_attention(
    pattern: Float[Tensor, "prompt head query key"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt key"]:
    """Attention that each key receives from later queries, mean over them and heads [probability].

    1/H Σ_h 1/(T − 1 − k) Σ_{q > k} A_qk over real queries q; nan if no real query is later. The
    sink of a layer is the key with the largest value.

    Args:
        pattern: Attention of one layer.
        mask: True at real positions.
    """
    real = mask[:, None, :, None]
    below = torch.where(real, at_least_fp32(pattern), 0).tril(-1).sum(dim=2).mean(dim=1)
    later = mask.sum(dim=1, keepdim=True) - mask.cumsum(dim=1)
    return torch.where(mask & (later > 0), below / later, torch.nan)


def blocks(attending: Sequence[int]) -> dict[int, range]:
    """The events, each with its block: the layers since the previous layer with attention."""
    before = [-1, *attending]
    result = {at: range(last + 1, at) for last, at in zip(before, attending, strict=False)}
    return {at: block for at, block in result.items() if block}


def intervals(attending: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Pairs of consecutive spikes, each with the layers without attention between them.

    Pairs without such layers are left out.
    """
    spikes = [at - 1 for at in attending if at > 0]
    between = {
        (left, right): [layer for layer in range(left + 1, right) if layer not in attending]
        for left, right in pairwise(spikes)
    }
    return {pair: layers for pair, layers in between.items() if layers}


def alignment(
    values: Float[Tensor, "prompt layer position"],
    sinks: Int[Tensor, "prompt attending"],
    attending: Sequence[int],
) -> Float[Tensor, "prompt event"]:
    """Sink–spike alignment: 1 if the sink's activation within the block is largest at the spike.

    For an event f with block B, the sink s of layer f hits if v_{f−1,s} = max_{l∈B} v_{l,s}. The
    mean over events is the alignment rate of a prompt.

    Args:
        values: v: the largest |a| of each position after each layer [activation].
        sinks: The sink of each layer with attention.
        attending: Indices of these layers.
    """
    hits = []
    for at, block in blocks(attending).items():
        sink = sinks[:, attending.index(at)]
        own = values[torch.arange(len(values)), :, sink][:, list(block)]
        hits.append((own[:, -1] == own.amax(dim=1)).float())
    return torch.stack(hits, dim=1) if hits else values.new_zeros(len(values), 0)


def retention(
    values: Float[Tensor, "prompt layer"], attending: Sequence[int]
) -> Float[Tensor, "prompt interval"]:
    """Inter-spike retention: share of two consecutive spikes that remains between them [share].

    For spikes at layers a < b, the mean of min(1, v_l / min(v_a, v_b)) over the layers l without
    attention between them: 0 for a pair of isolated spikes, 1 for a plateau. The mean over pairs is
    the retention of a prompt. nan if the smaller spike is 0.

    Args:
        values: v: the largest |a| after each layer at one position [activation].
        attending: Indices of the layers with attention.
    """
    parts = []
    for (left, right), layers in intervals(attending).items():
        least = torch.minimum(values[:, left], values[:, right])
        share = (values[:, layers] / least[:, None]).clamp(max=1).mean(dim=1)
        parts.append(torch.where(least > 0, share, torch.nan))
    return torch.stack(parts, dim=1) if parts else values.new_zeros(len(values), 0)
