"""Gates on heads' outputs against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import gates, values
from tests.metrics.cases import same, tensor

REAL = np.array([[True] * 6, [True] * 4 + [False] * 2])


def gate(wide: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(0, 0.3, size=(2, 6, 4, 3 if wide else 1))


def test_factors_are_split_into_heads_and_activated() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 12))
    found = gates.factors(tensor(x), "sigmoid", 4)
    assert found.shape == (2, 5, 4, 3)
    same(found[1, 2, 3, 1], 1 / (1 + np.exp(-x[1, 2, 10])))
    same(gates.factors(tensor(x), "softplus", 12)[0, 0, 3, 0], np.log1p(np.exp(x[0, 0, 3])))
    same(gates.factors(tensor(x), "identity", 2)[0, 4, 1, 5], x[0, 4, 11])


@pytest.mark.parametrize("wide", [True, False])
def test_means_and_shares_by_loops(wide: bool) -> None:
    g, mask = gate(wide), torch.from_numpy(REAL)
    mean, closed, passed = np.zeros((2, 4)), np.zeros((2, 4)), np.zeros((2, 4))
    attention = np.random.default_rng(1).uniform(size=(2, 4, 6))
    for p, n in enumerate([6, 4]):
        for h in range(4):
            flat = [float(x) for i in range(n) for x in g[p, i, h]]
            mean[p, h] = sum(flat) / len(flat)
            closed[p, h] = sum(x < 0.1 for x in flat) / len(flat)
            after = [attention[p, h, i] * np.mean(g[p, i, h]) for i in range(1, n)]
            passed[p, h] = sum(after) / len(after)
    assert 0 <= closed.min() < closed.max() < 1
    same(gates.mean_gate(tensor(g), mask), mean)
    same(gates.closed_share(tensor(g), mask), closed, rtol=1e-6)
    assert (gates.closed_share(tensor(g), mask, below=0.31) == 1).all()
    queries = mask.clone()
    queries[:, 0] = False
    same(gates.gated_attention(tensor(attention), tensor(g), queries), passed)


@pytest.mark.parametrize("wide", [True, False])
def test_values_through_gate_and_projection_by_making_every_vector(wide: bool) -> None:
    rng = np.random.default_rng(2)
    g, v, w = gate(wide), rng.normal(size=(2, 6, 2, 3)), rng.normal(size=(4, 3, 20))
    want = np.zeros((2, 4, 6))
    for p, n in enumerate([6, 4]):
        for h in range(4):
            for j in range(6):
                received = [(g[p, i, h] * v[p, j, h // 2]) @ w[h] for i in range(n)]
                want[p, h, j] = np.sqrt(np.mean([x @ x for x in received]))
    got = gates.norms_through(tensor(v), values.gram(tensor(w)), tensor(g), torch.from_numpy(REAL))
    same(got, want, rtol=1e-6)


def test_a_gate_of_one_changes_nothing_and_a_factor_scales() -> None:
    torch.manual_seed(0)
    v, gram = torch.randn(3, 7, 2, 4), values.gram(torch.randn(4, 4, 16))
    mask = torch.ones(3, 7, dtype=torch.bool)
    plain = values.norms_through(v, gram)
    for factor, width in ((1.0, 1), (0.25, 4)):
        got = gates.norms_through(v, gram, torch.full((3, 7, 4, width), factor), mask)
        torch.testing.assert_close(got, factor * plain, rtol=1e-5, atol=1e-6)
