"""Non-mixture dimensions against loops, planted channels and the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import ffn
from tests.metrics.cases import same, tensor

nan = float("nan")


def ffn_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 7))
    mask = np.ones((3, 8), dtype=bool)
    mask[0, 5:], mask[1, :2] = False, False
    nonmixed = np.zeros_like(mask)
    nonmixed[0, 0] = nonmixed[1, 2] = nonmixed[1, 6] = nonmixed[2, 0] = True
    x[~mask] = np.nan
    return x, nonmixed, mask


@pytest.mark.parametrize("elements", [2**24, 20])
def test_profile(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ffn.position_chunks
    monkeypatch.setattr(ffn, "position_chunks", lambda x: whole(x, elements=elements))
    x, nonmixed, mask = ffn_case()
    first, largest, median = ffn.ffn_profile(tensor(x), tensor(nonmixed), tensor(mask))
    for p, at in enumerate([0, 2, 0]):
        mixed = [j for j in range(8) if mask[p, j] and not nonmixed[p, j]]
        same(first[p], x[p, at])
        same(largest[p], [max(abs(x[p, j, d]) for j in mixed) for d in range(7)])
        same(median[p], np.median(np.abs(x[p, at])))


def test_profile_of_bf16_is_exact_fp32() -> None:
    x = torch.randn(1, 6, 9).bfloat16()
    nonmixed = tensor([[True] + [False] * 5])
    first, largest, median = ffn.ffn_profile(x, nonmixed, torch.ones(1, 6, dtype=torch.bool))
    exact = x[0].float().numpy()
    assert first.dtype == largest.dtype == median.dtype == torch.float32
    same(first[0], exact[0])
    same(largest[0], np.abs(exact[1:]).max(axis=0))
    same(median[0], np.median(np.abs(exact[0])))


def test_a_pad_is_no_nonmixed_position() -> None:
    x = tensor([[[7.0, 8.0], [1.0, -2.0], [3.0, 0.5]]])
    nonmixed, mask = tensor([[True, True, False]]), tensor([[False, True, True]])
    first, largest, median = ffn.ffn_profile(x, nonmixed, mask)
    same(first, [[1, -2]])
    same(largest, [[3, 0.5]])
    same(median, [1.5])


def test_a_text_of_one_token_has_nothing_mixed() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    profile = ffn.ffn_profile(torch.ones(1, 1, 3), one, one)
    assert profile[1].isnan().all()
    assert not ffn.nonmixture_dims(*profile).any()


def test_a_prompt_without_a_nonmixed_position_has_no_profile() -> None:
    none = torch.zeros(1, 4, dtype=torch.bool)
    profile = ffn.ffn_profile(torch.ones(1, 4, 3), none, ~none)
    assert profile[0].isnan().all() and profile[2].isnan().all()
    same(profile[1], np.ones((1, 3)))
    assert not ffn.nonmixture_dims(*profile).any()


def test_planted_dims_are_found() -> None:
    """Llama-3-8B's channels 788, 1384 and 4062 at about ±300, first token only."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 12, 4096)) * 0.1
    dims = [788, 1384, 4062]
    x[:, 0, dims] = [-300, 310, -290]
    x[:, 5, 17] = 400  # a mixed position's own channel
    x[:, 0, 99], x[:, 6, 99] = 300, 60  # stands out at 0, yet a mixed position comes near
    nonmixed = tensor([[True] + [False] * 11] * 2)
    profile = ffn.ffn_profile(tensor(x), nonmixed, torch.ones(2, 12, dtype=torch.bool))
    found = ffn.nonmixture_dims(*profile)
    assert [row.nonzero().flatten().tolist() for row in found] == [dims, dims]


def test_both_thresholds_are_strict() -> None:
    x = tensor([[100.0, -101.0, 101.0, 1e5]])
    mixed = tensor([[1.0, 1.0, 10.1, 1e4]])
    found = ffn.nonmixture_dims(x, mixed, tensor([1.0]))
    assert found.tolist() == [[False, True, False, False]]
    found = ffn.nonmixture_dims(x, mixed, tensor([1.0]), over_median=10.0, over_mixed=9.0)
    assert found.tolist() == [[True, True, True, True]]
