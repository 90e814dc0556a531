"""Overlaps of sets of heads, against plain sets and every way of renumbering."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sinkscope.metrics import turnover


def random_map(seed: int, share: float = 0.5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((3, 3)) < share)


def pairs(heads: torch.Tensor) -> set[tuple[int, int]]:
    return {(layer, head) for layer in range(3) for head in range(3) if heads[layer, head]}


@pytest.mark.parametrize("seed", range(6))
def test_overlap_is_that_of_sets(seed: int) -> None:
    one, other = random_map(seed), random_map(100 + seed, 0.4)
    a, b = pairs(one), pairs(other)
    assert turnover.jaccard(one, other) == pytest.approx(len(a & b) / len(a | b))


@pytest.mark.parametrize("seed", range(4))
def test_chance_is_the_mean_over_every_renumbering(seed: int) -> None:
    one, other = random_map(seed), random_map(50 + seed, 0.6)
    found = []
    for orders in itertools.product(itertools.permutations(range(3)), repeat=3):
        moved = torch.stack([row[list(order)] for row, order in zip(other, orders, strict=True)])
        found.append(len(pairs(one) & pairs(moved)) / len(pairs(one) | pairs(moved)))
    assert turnover.jaccard_by_chance(one, other) == pytest.approx(np.mean(found))
    assert turnover.jaccard_of_layers(one, other) == pytest.approx(max(found))


def test_two_empty_sets_have_no_overlap() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    for overlap in (turnover.jaccard, turnover.jaccard_by_chance, turnover.jaccard_of_layers):
        assert math.isnan(overlap(empty, empty))
        assert overlap(empty, ~empty) == 0


def test_when_a_head_joins_for_good() -> None:
    over_time = torch.tensor(
        [[0, 1, 0, 0, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool
    )[:, None, :]
    assert turnover.appeared(over_time)[0].tolist() == [2, 0, 1, -1, 0]
    assert turnover.formed(over_time)[0].tolist() == [2, 0, 3, -1, -1]
    assert turnover.disappearances(over_time)[0].tolist() == [0, 0, 1, 0, 1]
