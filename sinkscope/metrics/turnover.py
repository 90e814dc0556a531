"""How a population of heads changes: overlap of two sets of heads, and what chance would give.

Sets are boolean maps [layer head]. Over training the same (layer, head) is the same head. In two
runs from different seeds it is not: the heads of a layer could be renumbered, so only the layer of
a head means something, and overlap of maps is to be read beside its chance level.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def jaccard(one: Bool[Tensor, "layer head"], other: Bool[Tensor, "layer head"]) -> float:
    """|A ∩ B| / |A ∪ B|, the heads in both over those in either [share]; nan of two empty sets."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else math.nan


def jaccard_by_chance(one: Bool[Tensor, "layer head"], other: Bool[Tensor, "layer head"]) -> float:
    """Expected Jaccard index if the heads of every layer were renumbered at random [share].

    In a layer of H heads, a and b of them in the sets, the number k in both is hypergeometric:
    P(k) = C(a, k) C(H - a, b - k) / C(H, b). The sums over layers are convolved, and
    E[k / (|A| + |B| - k)] is exact. nan of two empty sets.
    """
    from scipy.stats import hypergeom

    heads = one.shape[1]
    total = int(one.sum()) + int(other.sum())
    if not total:
        return math.nan
    overlap = torch.ones(1, dtype=torch.float64)  # probability of 0, 1, 2, … heads in both
    for a, b in zip(one.sum(1).tolist(), other.sum(1).tolist(), strict=True):
        chances = hypergeom.pmf(list(range(min(a, b) + 1)), heads, a, b)
        overlap = _convolved(overlap, torch.as_tensor(chances, dtype=torch.float64))
    both = torch.arange(len(overlap), dtype=torch.float64)
    return float((overlap * both / (total - both)).sum())


def jaccard_of_layers(one: Bool[Tensor, "layer head"], other: Bool[Tensor, "layer head"]) -> float:
    """Σ_l min(a_l, b_l) / Σ_l max(a_l, b_l) of the counts by layer [share].

    The largest Jaccard index that renumbering the heads within layers can give: 1 if every layer
    has as many heads in one set as in the other. nan of two empty sets.
    """
    a, b = one.sum(1), other.sum(1)
    most = int(torch.maximum(a, b).sum())
    return int(torch.minimum(a, b).sum()) / most if most else math.nan


def formed(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """Index of the first time from which a head is in the population for good; -1 if it is not."""
    lasting = population.flip(0).long().cumprod(0).sum(0)  # times at the end without a gap
    return torch.where(lasting > 0, len(population) - lasting, -1)


def appeared(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """Index of the first time at which a head is in the population; -1 if it never is."""
    return torch.where(population.any(0), population.long().argmax(0), -1)


def disappearances(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """How many times a head leaves the population from one time to the next [count]."""
    return (population[:-1] & ~population[1:]).sum(0)


def _convolved(one: Tensor, other: Tensor) -> Tensor:
    found = torch.zeros(len(one) + len(other) - 1, dtype=torch.float64)
    for k, chance in enumerate(other.tolist()):
        found[k : k + len(one)] += chance * one
    return found
