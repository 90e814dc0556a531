"""Means and intervals over prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sinkscope.errors import ReportError
from sinkscope.statistics import bootstrap
from tests.report.factory import only, synthetic_report


def numpy_interval(x: np.ndarray, level: float, resamples: int, seed: int) -> np.ndarray:
    """The percentile bootstrap in a plain loop."""
    rng = np.random.default_rng(seed)
    means = [np.nanmean(x[rng.integers(len(x), size=len(x))], axis=0) for _ in range(resamples)]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_it_agrees_with_a_plain_bootstrap(level: float):
    x = np.random.default_rng(0).gamma(2, size=(24, 3, 2))
    mean, low, high = bootstrap(torch.tensor(x), level, resamples=8000)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    expected = numpy_interval(x, level, 8000, seed=1)
    # Two independent draws of 8000: their quantiles differ by a few per cent of the width.
    width = (expected[1] - expected[0]).min()
    np.testing.assert_allclose(low, expected[0], atol=0.06 * width)
    np.testing.assert_allclose(high, expected[1], atol=0.06 * width)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """1000 experiments of 30 prompts at level 0.9; the percentile bootstrap covers a bit less."""
    x = torch.randn(30, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, low, high = bootstrap(x, level=0.9, resamples=1000)
    covered = ((low < 0) & (0 < high)).double().mean().item()
    assert 0.84 < covered < 0.92


def test_every_prompt_counts_the_same_in_each_figure():
    """One draw serves all figures: shifting a figure shifts its interval and nothing else."""
    x = torch.rand(10, 1, dtype=torch.float64)
    both = bootstrap(torch.cat([x, x + 5], dim=1))
    torch.testing.assert_close(both.low[1] - 5, both.low[0])
    torch.testing.assert_close(both.high[1] - 5, both.high[0])


def test_large_fields_are_cut_in_chunks_without_a_trace(monkeypatch: pytest.MonkeyPatch):
    import sinkscope.statistics as module

    x = torch.rand(6, 50)
    whole = bootstrap(x, resamples=300)
    monkeypatch.setattr(module, "_CHUNK", 300 * 7)
    for one, other in zip(whole, bootstrap(x, resamples=300), strict=True):
        assert torch.equal(one, other)


def test_prompts_without_a_figure_are_left_out():
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1, nan, nan, 1.0], [3, 2, nan, inf], [5, 4, 7, 1]])
    mean, low, high = bootstrap(x)
    np.testing.assert_array_equal(mean, [3, 3, 7, inf])
    assert 1 <= low[0] < 3 < high[0] <= 5
    assert low[1] == 2 and high[1] == 4
    assert low[2].isnan() and high[2].isnan()  # one prompt says nothing about the spread
    assert low[3] == 1 and high[3] == inf


def test_same_seed_same_interval():
    report = synthetic_report(prompts=8)
    one, same = report.interval("honor"), report.interval("honor")
    other = report.interval("honor", seed=1)
    assert torch.equal(one.low, same.low) and not torch.equal(one.low, other.low)
    assert one.mean.dtype == one.low.dtype == torch.float32
    assert one.low.shape == (4, 6)


def test_one_prompt_has_no_interval():
    _, low, high = synthetic_report(prompts=1).interval("sink_attention")
    assert low.isnan().all() and high.isnan().all()


def test_fields_without_prompts_have_no_interval():
    with pytest.raises(ReportError, match="residual_norm is stored as a mean over prompts"):
        synthetic_report().interval("residual_norm")
    with pytest.raises(ReportError, match="was not measured"):
        only(synthetic_report()).interval("sink_attention")


@pytest.mark.parametrize("wrong", [{"level": 0.0}, {"level": 1.0}, {"resamples": 0}, {"seed": -5}])
def test_impossible_intervals_are_refused(wrong: dict):
    with pytest.raises(ReportError, match=r"(level|resamples|seed) is .*; expected a \w+ number"):
        synthetic_report().interval("honor", **wrong)


def test_means():
    report = synthetic_report(lengths=[16, 9, 4])
    np.testing.assert_allclose(
        report.mean("honor"), report.honor.numpy().astype(float).mean(0), rtol=1e-6
    )
    assert report.mean("residual_norm") is report.residual_norm
    # 12 of 16 positions lack the shortest prompt.
    expected = np.nanmean(report.received_peak.numpy().astype(float), axis=0)
    np.testing.assert_allclose(report.mean("received_peak"), expected, rtol=1e-6)
    np.testing.assert_allclose(report.mean("mask")[[0, 8, 15]], [1, 2 / 3, 1 / 3], rtol=1e-6)
