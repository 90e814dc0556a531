"""Changes in a population of heads: overlap of two sets of heads, and its chance level.

Sets are boolean maps [layer head]. During training the same (layer, head) is the same head. In two
runs with different seeds it is not: heads can be permuted within a layer, so only the layer of a
head is meaningful, and overlap must be compared with its chance level.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def jaccard(one: Bool[Tensor, "layer head"], other: Bool[Tensor, "layer head"]) -> float:
    """Jaccard index |A ∩ B| / |A ∪ B| of two sets of heads [share]; nan for two empty sets."""
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else math.nan


def jaccard_by_chance(one: Bool[Tensor, "layer head"], other: Bool[Tensor, "layer head"]) -> float:
    """Expected Jaccard index under random permutations of the heads within layers [share].

    In a layer of H heads, a and b of them in the sets, the number k in both is hypergeometric:
    P(k) = C(a, k) C(H - a, b - k) / C(H, b). The sums over layers are convolved, and
    E[k / (|A| + |B| - k)] is exact. nan for two empty sets.
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

    The largest Jaccard index over permutations of the heads within layers: 1 if every layer has
    equally many heads in both sets. nan for two empty sets.
    """
    a, b = one.sum(1), other.sum(1)
    most = int(torch.maximum(a, b).sum())
    return int(torch.minimum(a, b).sum()) / most if most else math.nan


def formed(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """Index of the time from which a head stays in the population to the end; -1 if it does not."""
    lasting = population.flip(0).long().cumprod(0).sum(0)  # length of the final run
    return torch.where(lasting > 0, len(population) - lasting, -1)


def appeared(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """Index of the first time at which a head is in the population; -1 if it never is."""
    return torch.where(population.any(0), population.long().argmax(0), -1)


def disappearances(population: Bool[Tensor, "time layer head"]) -> Int[Tensor, "layer head"]:
    """Number of times a head leaves the population between consecutive times [count]."""
    return (population[:-1] & ~population[1:]).sum(0)


def _convolved(one: Tensor, other: Tensor) -> Tensor:
    result = torch.zeros(len(one) + len(other) - 1, dtype=torch.float64)
    for k, chance in enumerate(other.tolist()):
        result[k : k + len(one)] += chance * one
    return result
