"""Inactivity scores, thresholds and dormancy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import heads
from tests.metrics.cases import mean, same, tensor

INPUTS = ["AWFT", "AEQD", "FTVVN", "AVVN", "LTHON", "AHON"]


def measured(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.1, 1, size=(3, 2, 4)) for name in INPUTS}


def test_the_thirteen_scores() -> None:
    raw = measured()
    scores = heads.inactivity_scores(*(tensor(raw[name]) for name in INPUTS))
    assert list(scores) == list(heads.INACTIVE_IF) and len(scores) == 14
    for name in INPUTS:
        same(scores[name], raw[name])
        # Sandoval-Segura et al. divide LTHON by the layer's mean AHON; LTHON-LL is ours.
        over = (
            {"LTHON-LN": "AHON", "LTHON-LL": "LTHON"} if name == "LTHON" else {f"{name}-LN": name}
        )
        for score, divisor in over.items():
            expected = np.zeros((3, 2, 4))
            for p, layer, h in np.ndindex(3, 2, 4):
                expected[p, layer, h] = raw[name][p, layer, h] / mean(list(raw[divisor][p, layer]))
            same(scores[score], expected)
    same(scores["LTHON-HN"], raw["LTHON"] / raw["AHON"])
    same(scores["AHON-LN"], heads.honor(tensor(raw["AHON"])))


def test_only_first_token_attention_marks_inactivity_by_being_high() -> None:
    above = {name for name, side in heads.INACTIVE_IF.items() if side == "above"}
    assert above == {"AWFT", "AWFT-LN"}


def test_honor_by_hand() -> None:
    same(heads.honor(tensor([1.0, 2.0, 3.0, 2.0])), [0.5, 1, 1.5, 1])


@pytest.mark.parametrize(("side", "expected"), [("below", 1.0), ("above", 17.0)])
def test_threshold_is_the_papers_quantile(side: heads.Direction, expected: float) -> None:
    """The published thresholds are quantiles of the score's distribution over all heads."""
    score = tensor(np.arange(0.0, 19.0).reshape(1, 1, 19))
    threshold = heads.inactivity_threshold(score, 1 / 18, side)
    assert threshold == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.15, 0.3])
@pytest.mark.parametrize("side", ["below", "above"])
def test_flagged_share(quantile: float, side: heads.Direction) -> None:
    """Of distinct scores, the most extreme ones in the asked share, and no nan."""
    score = np.random.default_rng(0).permutation(401.0 * np.arange(400)).reshape(5, 8, 10)
    flagged = heads.flag_inactive(tensor(score), quantile, side)
    order = np.sort(score.ravel())
    count = int(np.ceil(quantile * 399))
    extreme = order[:count] if side == "below" else order[400 - count :]
    assert set(score[flagged.numpy()]) == set(extreme)


def test_nan_is_neither_flagged_nor_counted() -> None:
    score = tensor([[[1.0, float("nan"), 2.0, 3.0]]])
    assert heads.inactivity_threshold(score, 0.5, "below") == 2
    assert heads.flag_inactive(score, 0.5, "below").tolist() == [[[True, False, False, False]]]


def test_scale_of_a_layer_does_not_move_honor() -> None:
    x = tensor(measured()["AHON"])
    same(heads.honor(x * tensor([1.0, 1000.0])[None, :, None]), heads.honor(x))


def test_dormancy() -> None:
    assert heads.is_dormant(tensor([0.49, 0.5, 0.51])).tolist() == [False, False, True]
    # Parks and works; parks on both; works on both; parks on one prompt and not on the other.
    here = tensor([[[0.9, 0.9, 0.1, 0.9]], [[0.7, 0.9, 0.1, float("nan")]]])
    there = tensor([[[0.2, 0.8, 0.1, 0.6]]])
    assert heads.is_active_dormant(here, there).tolist() == [[True, False, False, True]]
    assert torch.equal(heads.is_active_dormant(there, here), torch.zeros(1, 4, dtype=torch.bool))


def test_thresholds_of_more_scores_than_torch_has_a_quantile_for() -> None:
    score = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    assert heads.inactivity_threshold(score, 0.25, "below") == 2**22
    assert int(heads.flag_inactive(score, 0.25, "above").sum()) == 2**22
