"""Reductions of a whole batch in a few kernel launches.

At short lengths a scan pays for launches, not for arithmetic: a layer of a billion-parameter model
takes a GPU 2 ms, in which Python launches about a hundred kernels. What the definitions in
`metrics` say a layer, a threshold or a set of positions at a time is said here all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

COMPARED_AT_ONCE = 2**26
"""Comparisons with thresholds held at once [bytes]."""


def all_layers(
    definition: Callable[..., Tensor],
    stacked: Shaped[Tensor, "layer prompt *rest"],
    *per_prompt: Shaped[Tensor, "prompt ..."],
) -> Shaped[Tensor, "layer prompt *result"]:
    """Apply a definition that takes one layer's prompts to all layers, as if they were prompts.

    Args:
        definition: A function of tensors that all begin with ``prompt``, as does its result.
        stacked: Its first argument, for every layer.
        per_prompt: Its other arguments, the same for every layer.
    """
    layers = len(stacked)
    flat = rearrange(stacked, "layer prompt ... -> (layer prompt) ...")
    others = (repeat(x, "prompt ... -> (layer prompt) ...", layer=layers) for x in per_prompt)
    found = definition(flat, *others)
    return rearrange(found, "(layer prompt) ... -> layer prompt ...", layer=layers)


class ReceivedSummary(NamedTuple):
    """Gu's importance score of every key of a layer, summed up.

    Attributes:
        importance: Sum over the prompts that reach the key [probability].
        uniform_ratio: The same of its ratio to uniform attention [ratio].
        peak: Mean over heads; nan at padding [probability].
        above: Entries (prompt, head) above each threshold.
    """

    importance: Float[Tensor, "head key"]
    uniform_ratio: Float[Tensor, "head key"]
    peak: Float[Tensor, "prompt key"]
    above: Float[Tensor, "threshold key"]


def received_summary(
    mass: Float[Tensor, "prompt head key"],
    seen_by: Float[Tensor, "prompt key"],
    uniform: Float[Tensor, "prompt key"],
    mask: Bool[Tensor, "prompt key"],
    thresholds: Float[Tensor, "threshold"],
) -> ReceivedSummary:
    """`metrics.attention.importance`, `uniform_ratio` and `count_above` of a layer, in one go.

    Args:
        mass: Attention that each key receives in all.
        seen_by: Queries that see each key, see `metrics.positions.visible_queries`.
        uniform: What uniform attention would give it, see `metrics.positions.uniform_received`.
        mask: Real positions.
        thresholds: Thresholds of the sink rate [probability].
    """
    alpha = torch.where(mask[:, None, :], mass / seen_by[:, None, :], 0.0)
    per_uniform = torch.where(mask, 1 / uniform, 0.0)
    return ReceivedSummary(
        importance=alpha.sum(dim=0),
        uniform_ratio=torch.einsum("phk,pk->hk", alpha, per_uniform),
        peak=torch.where(mask, alpha.mean(dim=1), torch.nan),
        above=_count_above(rearrange(alpha, "prompt head key -> (prompt head) key"), thresholds),
    )


def _count_above(
    x: Float[Tensor, "entry key"], thresholds: Float[Tensor, "threshold"]
) -> Float[Tensor, "threshold key"]:
    """How many entries exceed each threshold, as many thresholds at a time as memory allows."""
    together = max(1, COMPARED_AT_ONCE // max(1, x.numel()))
    parts = [(x > some[:, None, None]).sum(dim=1) for some in thresholds.split(together)]
    return torch.cat(parts).to(x.dtype)
