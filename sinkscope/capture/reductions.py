"""Reductions of a whole batch in a few kernel launches.

At short lengths the cost of a scan is dominated by kernel launches: a layer of a billion-parameter
model takes 2 ms on a GPU, in which Python launches about a hundred kernels. The definitions in
`metrics` are for one layer, one threshold or one set of positions; here they are computed for all
of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int, Shaped
from torch import Tensor

COMPARED_AT_ONCE = 2**26
"""Memory for comparisons with thresholds at a time [bytes]."""


def all_layers(
    definition: Callable[..., Tensor],
    stacked: Shaped[Tensor, "layer prompt *rest"],
    *per_prompt: Shaped[Tensor, "prompt ..."],
) -> Shaped[Tensor, "layer prompt *result"]:
    """Apply a definition for one layer to all layers, by treating layers as further prompts.

    Args:
        definition: A function of tensors with first dimension ``prompt``, like its result.
        stacked: Its first argument, for every layer.
        per_prompt: Its other arguments, the same for every layer.
    """
    layers = len(stacked)
    flat = rearrange(stacked, "layer prompt ... -> (layer prompt) ...")
    others = (repeat(x, "prompt ... -> (layer prompt) ...", layer=layers) for x in per_prompt)
    result = definition(flat, *others)
    return rearrange(result, "(layer prompt) ... -> layer prompt ...", layer=layers)


class ReceivedSummary(NamedTuple):
    """Gu's importance score of every key of a layer, with its sums.

    Attributes:
        alpha: The scores; 0 at padding [probability].
        importance: Their sum over the prompts that reach the key [probability].
        peak: Their mean over heads [probability].
        above: Number of (prompt, head) above each threshold.
    """

    alpha: Float[Tensor, "prompt head key"]
    importance: Float[Tensor, "head key"]
    peak: Float[Tensor, "prompt key"]
    above: Int[Tensor, "threshold key"]

    def over(self, per_uniform: Float[Tensor, "prompt key"]) -> Float[Tensor, "head key"]:
        """The sum over prompts of `metrics.attention.uniform_ratio` [ratio]."""
        return torch.einsum("phk,pk->hk", self.alpha, per_uniform)


def received_summary(
    mass: Float[Tensor, "prompt head key"],
    per_query: Float[Tensor, "prompt key"],
    thresholds: Float[Tensor, "threshold"],
) -> ReceivedSummary:
    """`metrics.attention.importance` and `count_above` of a layer in one pass.

    Args:
        mass: Total attention that each key receives.
        per_query: See `Batch.per_query`.
        thresholds: Thresholds of the sink rate [probability].
    """
    alpha = mass.float() * per_query[:, None, :]
    entries = rearrange(alpha, "prompt head key -> (prompt head) key")
    return ReceivedSummary(
        alpha=alpha,
        importance=alpha.sum(dim=0),
        peak=alpha.mean(dim=1),
        above=_count_above(entries, thresholds),
    )


def _count_above(
    x: Float[Tensor, "entry key"], thresholds: Float[Tensor, "threshold"]
) -> Int[Tensor, "threshold key"]:
    """Number of entries above each threshold, in chunks of thresholds to limit memory."""
    together = max(1, COMPARED_AT_ONCE // max(1, x.numel()))
    parts = [(x > some[:, None, None]).sum(dim=1) for some in thresholds.split(together)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
