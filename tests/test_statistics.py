"""Corrected tests and rank correlations, against plain loops and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sinkscope.errors import TextError
from sinkscope.output import plain
from sinkscope.statistics import Interval, bootstrap, estimate, max_t, rank_correlation, spearman


def welch(one: np.ndarray, other: np.ndarray) -> float:
    """|t| of two samples of one figure, by its definition."""
    difference = abs(one.mean() - other.mean())
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return difference / error


def every_split(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Exact p-values: over all ways to deal the prompts to two sides."""
    both, n = np.concatenate([one, other]), len(one)
    seen = [welch(one[:, head], other[:, head]) for head in range(both.shape[1])]
    reached, splits = np.zeros(both.shape[1]), 0
    for side in itertools.combinations(range(len(both)), n):
        rest = [i for i in range(len(both)) if i not in side]
        largest = max(
            welch(both[list(side), head], both[rest, head]) for head in range(both.shape[1])
        )
        reached += [largest >= t * (1 - 1e-9) for t in seen]
        splits += 1
    return reached / splits


def test_max_t_approaches_the_exact_permutation_test() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(5, 4)), rng.normal(size=(4, 4))
    one[:, 1] += 4
    one[:, 2] += 1.5
    exact = every_split(one, other)
    got = max_t(torch.tensor(one), torch.tensor(other), permutations=40_000).numpy()
    # 126 splits; four standard errors of 40,000 draws.
    np.testing.assert_allclose(got, exact, atol=4 * 0.5 / 200)
    assert exact[1] < 0.05 < exact[0], "the case has to have both kinds of head"


def test_max_t_keeps_layers_and_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 6, 3, 4, generator=generator)
    got = max_t(one, other, permutations=500, seed=3)
    assert got.shape == (3, 4)
    assert torch.equal(got, max_t(one, other, permutations=500, seed=3))
    flat = max_t(one.flatten(1), other.flatten(1), permutations=500, seed=3)
    assert torch.equal(got.flatten(), flat)
    assert got.min() >= 1 / 501


def test_max_t_names_a_wrong_head_no_oftener_than_it_says() -> None:
    """Twenty heads that do not differ, half of them copies of one another; 300 experiments."""
    wrong = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        one, other = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
        one, other = torch.cat([one, one], 1), torch.cat([other, other], 1)
        wrong += bool((max_t(one, other, permutations=199, seed=seed) < 0.05).any())
    assert 1 <= wrong <= 0.05 * 300 + 3 * np.sqrt(300 * 0.05 * 0.95)


def test_max_t_leaves_out_a_head_that_a_prompt_leaves_undefined() -> None:
    """As in a hybrid model: a layer without attention is no head among the others."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(6, 3, 4, generator=draw) for _ in range(2))
    one[:, 1], other[2, 2, 3] = torch.nan, torch.nan
    got = max_t(one, other, permutations=300)
    undefined = torch.zeros(3, 4, dtype=torch.bool)
    undefined[1], undefined[2, 3] = True, True
    assert torch.equal(got.isnan(), undefined)
    rest = max_t(one[:, ~undefined], other[:, ~undefined], permutations=300)
    assert torch.equal(got[~undefined], rest) and (rest > 0.01).all()
    assert max_t(one[:, 1], other[:, 1]).isnan().all()


def test_max_t_of_constant_heads() -> None:
    """The same on every prompt: no difference; two constants: the surest difference there is."""
    one, other = torch.full((5, 2), 0.5), torch.full((5, 2), 0.5)
    other[:, 1] = 0.7
    p = max_t(one, other, permutations=2000)
    assert p[0] == 1
    assert p[1] < 0.02  # 2 of 252 splits leave the two constants apart


def test_max_t_needs_two_prompts_a_side() -> None:
    with pytest.raises(TextError, match="two prompts of each, not 1 and 4"):
        max_t(torch.zeros(1, 3), torch.zeros(4, 3))


def test_spearman_is_the_correlation_of_ranks() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 8, size=(2, 5, 30)).astype(float)
    got = spearman(torch.tensor(x), torch.tensor(y))
    for row in range(5):
        a, b = (
            [
                np.mean([i + 1 for i, v in enumerate(sorted(z[row])) if v == value])
                for value in z[row]
            ]
            for z in (x, y)
        )
        assert float(got[row]) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])).isnan()


def test_rank_correlation_resamples_prompts() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=40)
    x = truth + rng.normal(size=(8, 40))
    y = -truth + rng.normal(size=(8, 40))
    got = rank_correlation(torch.tensor(x), torch.tensor(y))

    def rho(rows: np.ndarray) -> float:
        a, b = (z[rows].mean(0).argsort().argsort() for z in (x, y))
        return np.corrcoef(a, b)[0, 1]

    again = [rho(rng.integers(0, 8, size=8)) for _ in range(4000)]
    assert got.mean == pytest.approx(rho(np.arange(8)))
    # Other draws: ends agree to a few hundredths.
    assert got.low == pytest.approx(np.quantile(again, 0.025), abs=0.03)
    assert got.high == pytest.approx(np.quantile(again, 0.975), abs=0.03)
    one = rank_correlation(torch.tensor(x[:1]), torch.tensor(y[:1]))
    assert np.isnan(one.low) and np.isnan(one.high)


def test_an_interval_is_written_as_its_numbers() -> None:
    share = Interval(0.5, 0.25, 0.755)
    assert str(share) == "0.5 [0.25, 0.755]"
    assert share.to_decimals(2) == "0.50 [0.25, 0.76]"
    assert share.signed(1) == "+0.5 [+0.2, +0.8]"
    assert share.in_percent() == "50 % [25, 76]"
    assert share.negated() == Interval(-0.5, -0.755, -0.25)
    alone = Interval(0.5, float("nan"), float("nan"))
    assert (str(alone), alone.in_percent(1)) == ("0.5", "50.0 %")
    assert plain([share, alone]) == [
        {"mean": 0.5, "low": 0.25, "high": 0.755},
        {"mean": 0.5, "low": None, "high": None},
    ]


def test_an_estimate_is_the_bootstrap_of_one_value() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert estimate(x) == tuple(float(end) for end in bootstrap(x))


def test_an_interval_is_readable_at_a_glance() -> None:
    assert repr(Interval(0.5, 0.25, 0.75)) == "Interval(mean=0.5, low=0.25, high=0.75)"
    many = torch.tensor([[0.25, torch.nan], [0.5, 0.75]])
    assert repr(Interval(many, many, many)) == (
        "Interval(mean, low, high of shape (2, 2); means from 0.25 to 0.75)"
    )
