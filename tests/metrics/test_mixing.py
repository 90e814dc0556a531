"""Rank collapse and matrix entropy against their textbook forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import mixing
from tests.metrics.cases import same, tensor


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (1, 1, 4)])
@pytest.mark.parametrize("normalised", [False, True])
def test_matrix_entropy_from_singular_values(shape: tuple, normalised: bool) -> None:
    rng = np.random.default_rng(0)
    x, where = rng.normal(size=shape), np.ones(shape[:2], dtype=bool)
    if shape[1] > 1:
        where[0, 2] = False
        x[0, 2] = np.nan
    expected = []
    for rows, keep in zip(x, where, strict=True):
        sigma = np.linalg.svd(rows[keep], compute_uv=False)
        p = sigma**2 / (sigma**2).sum()
        largest = np.log(min(rows[keep].shape)) if normalised else 1
        with np.errstate(invalid="ignore"):
            expected.append(-(p * np.log(p)).sum() / largest)
    if shape[1] == 1 and normalised:
        expected = [np.nan]  # one position has no spread to speak of
    same(mixing.matrix_entropy(tensor(x), tensor(where), normalised), expected, atol=1e-9)


def test_one_peak_hides_the_entropy_of_the_rest() -> None:
    x = torch.eye(8).double()[None]
    x[0, 0] *= 1e3
    everything = torch.ones(1, 8, dtype=torch.bool)
    rest = everything.clone()
    rest[0, 0] = False
    assert mixing.matrix_entropy(x, everything).item() < 2e-3
    same(mixing.matrix_entropy(x, rest), [np.log(7)])


def test_rank_collapse() -> None:
    rng = np.random.default_rng(1)
    x, where = rng.normal(size=(3, 6, 4)), np.ones((3, 6), dtype=bool)
    where[0, 4:], where[2] = False, False
    x[0, 4:] = np.nan
    n = 4
    projector = np.eye(n) - np.ones((n, n)) / n  # V - (1/n) 1 1ᵀ V
    expected = [np.linalg.norm(projector @ x[0, :4])]
    expected.append(np.linalg.norm((np.eye(6) - np.ones((6, 6)) / 6) @ x[1]))
    same(mixing.rank_collapse(tensor(x), tensor(where)), [*expected, np.nan])


def test_identical_positions_have_collapsed() -> None:
    x = torch.randn(1, 1, 5).double().expand(1, 7, 5)
    where = torch.ones(1, 7, dtype=torch.bool)
    same(mixing.rank_collapse(x, where), [0], atol=1e-12)
    same(mixing.matrix_entropy(x, where), [0], atol=1e-9)
