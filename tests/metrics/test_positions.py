"""Visibility, sink finding and baselines against plain loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkscope.metrics.positions import (
    find_sinks,
    first_true,
    masked_mean,
    position_embedding_norm,
    primary_and_secondary,
    queries_after,
    queries_beyond,
    uniform_nearby,
    uniform_received,
    visible,
    visible_keys,
    visible_queries,
)
from sinkscope.metrics.reductions import masked_median, sliding_sum
from tests.metrics.cases import REACHES, mean, random_case, same, sees, tensor

MASKS = [
    [True] * 7,
    [True] * 4 + [False] * 3,
    [False] * 2 + [True] * 5,
    [True, False, True, True, False, True, True],
    [False] * 7,
]


@pytest.mark.parametrize(("causal", "window"), REACHES)
def test_visibility_and_its_counts(causal: bool, window: int | None) -> None:
    table = np.array(
        [
            [[sees(np.array(m), i, j, causal, window) for j in range(7)] for i in range(7)]
            for m in MASKS
        ]
    )
    mask = tensor(MASKS)
    same(visible(mask, causal, window), table)
    same(visible_keys(mask, causal, window), table.sum(axis=2))
    same(visible_queries(mask, causal, window), table.sum(axis=1))


@pytest.mark.parametrize(("causal", "window"), REACHES)
def test_queries_beyond_near_keys(causal: bool, window: int | None) -> None:
    """Near keys, sinks and others are three disjoint sets, none of the last two empty by design."""
    sinks = np.zeros((len(MASKS), 7), dtype=bool)
    sinks[:, [0, 3]] = np.array(MASKS)[:, [0, 3]]
    for width in (1, 2):
        table = np.zeros_like(sinks)
        uniform = np.full((2, *sinks.shape), np.nan)
        for p, mask in enumerate(MASKS):
            first = min(np.flatnonzero(sinks[p]), default=9)
            for i in range(7):
                seen = [j for j in range(7) if sees(np.array(mask), i, j, causal, window)]
                near = [j for j in range(7) if abs(i - j) <= width and not (causal and j > i)]
                asked = mask[i] and not sinks[p, i] and first < 7 and (i > first or not causal)
                further = any(j not in near for j in seen)
                table[p, i] = asked and further and not sinks[p, near].any()
                if mask[i]:
                    own = [j for j in seen if abs(i - j) < width]
                    others = [j for j in seen if 0 < abs(i - j) <= width]
                    uniform[:, p, i] = len(own) / len(seen), len(others) / len(seen)
        masks = tensor(sinks.tolist()), tensor(MASKS)
        same(queries_beyond(width, *masks, causal, window), table)
        same(uniform_nearby(width, True, masks[1], causal, window), uniform[0], rtol=1e-6)
        same(uniform_nearby(width, False, masks[1], causal, window), uniform[1], rtol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_windows_are_those_of_transformers(window: int) -> None:
    """A bidirectional `sliding_window` reaches the mask less one; ModernBERT adds it again."""
    from transformers import masking_utils

    causal = masking_utils.sliding_window_causal_mask_function(window)
    both = masking_utils.sliding_window_bidirectional_mask_function(window - 1)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None]
    mask = torch.ones(1, 12, dtype=torch.bool)
    assert torch.equal(visible(mask, True, window)[0], causal(0, 0, i, j) & (i >= 0))
    assert torch.equal(visible(mask, False, window)[0], both(0, 0, i, j) & (i >= 0))


@pytest.mark.parametrize(("causal", "window"), REACHES)
def test_uniform_received(causal: bool, window: int | None) -> None:
    expected = np.full((len(MASKS), 7), np.nan)
    for row, m in enumerate(MASKS):
        for k in range(7):
            paid = [
                1 / sum(sees(m, i, j, causal, window) for j in range(7))
                for i in range(7)
                if sees(m, i, k, causal, window)
            ]
            expected[row, k] = mean(paid)
    same(uniform_received(tensor(MASKS), causal, window), expected, rtol=1e-6)


def test_uniform_received_is_the_harmonic_formula() -> None:
    length = 4096
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, length + 1))])
    k = np.arange(length)
    expected = (harmonic[length] - harmonic[k]) / (length - k)
    mask = torch.ones(1, length, dtype=torch.bool)
    same(uniform_received(mask, True), expected[None], rtol=2e-6)
    same(uniform_received(mask, False), np.full((1, length), 1 / length), rtol=2e-6)


def test_uniform_received_in_a_window_keeps_its_digits_on_long_texts() -> None:
    """In mid-text a window of w gives w · 1/w / w = 1/w, however much came before."""
    mask = torch.ones(1, 100_000, dtype=torch.bool)
    middle = uniform_received(mask, True, 128)[0, 1000:-1000]
    same(middle, np.full(98_000, 1 / 128), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 12),
    before=st.one_of(st.none(), st.integers(0, 15)),
    after=st.one_of(st.none(), st.integers(0, 15)),
    rest=st.sampled_from([(), (2,), (2, 3)]),
)
def test_sliding_sum(length: int, before: int | None, after: int | None, rest: tuple) -> None:
    x = np.random.default_rng(length).normal(size=(2, length, *rest))
    expected = np.zeros_like(x)
    for i in range(length):
        for j in range(length):
            if (before is None or i - j <= before) and (after is None or j - i <= after):
                expected[:, i] += x[:, j]
    same(sliding_sum(tensor(x), before, after), expected)


@pytest.mark.parametrize("length", [256, 257, 512, 700])
def test_long_running_sums(length: int) -> None:
    """Longer than the blocks in which they are taken."""
    x = np.random.default_rng(0).normal(size=(2, length, 3))
    same(sliding_sum(tensor(x), None, 0), np.cumsum(x, axis=1))
    same(sliding_sum(tensor(x), 0, None), np.cumsum(x[:, ::-1], axis=1)[:, ::-1])
    assert np.allclose(x, np.random.default_rng(0).normal(size=(2, length, 3)))  # untouched


def test_sliding_sum_never_adds_what_lies_outside() -> None:
    x = torch.ones(1, 50)
    x[0, :20] = 1e9
    assert sliding_sum(x, 3, 0)[0, 30:].eq(4).all()


def test_masked_mean_ignores_what_is_left_out() -> None:
    x = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, 5.0, torch.nan]])
    where = torch.tensor([[True, False, True], [False, False, False]])
    got = masked_mean(x, where, dim=1)
    assert got[0] == 2 and got[1].isnan()
    same(masked_mean(x, where, dim=(0, 1)), 2.0)


def test_masked_mean_accumulates_wider_than_bf16() -> None:
    x = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    got = masked_mean(x, torch.ones(1, 4096, dtype=torch.bool), dim=1)
    assert got.dtype == torch.float32
    same(got, [1.0078125])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_masked_median_is_numpys(where: list[list[bool]]) -> None:
    x = np.random.default_rng(0).normal(size=(len(where), 6))
    expected = [np.median(r[w]) if any(w) else np.nan for r, w in zip(x, where, strict=True)]
    same(masked_median(tensor(x), tensor(where)), expected)


def test_first_true() -> None:
    sinks = tensor([[True, False, True], [False, False, True], [False, False, False]])
    assert first_true(sinks).tolist() == [0, 2, 3]


def test_queries_after_by_hand() -> None:
    sinks = tensor([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    mask = tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    causal = [[0, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0] * 6]
    both = [[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0] * 6]
    assert queries_after(sinks, mask, True).int().tolist() == causal
    assert queries_after(sinks, mask, False).int().tolist() == both


@pytest.mark.parametrize(("causal", "window"), REACHES)
def test_queries_after(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    got = queries_after(tensor(case.sinks), tensor(case.mask), causal)
    for p in case:
        assert got[p].nonzero()[:, 0].tolist() == case.queries_after(p)


def _importance(pattern: np.ndarray, causal: bool = True) -> torch.Tensor:
    """Gu's α of [head query key] patterns as one prompt of one layer, by loops."""
    heads, length, _ = pattern.shape
    alpha = np.zeros((1, 1, heads, length))
    for h in range(heads):
        for k in range(length):
            alpha[0, 0, h, k] = mean(
                [pattern[h, i, k] for i in range(length) if i >= k or not causal]
            )
    return tensor(alpha)


def _local(length: int) -> np.ndarray:
    """Half on itself, half on the key before."""
    pattern = np.eye(length) * 0.5
    pattern[np.arange(1, length), np.arange(length - 1)] = 0.5
    pattern[0, 0] = 1
    return pattern


def _sink_at(position: int, length: int) -> np.ndarray:
    pattern = np.eye(length)
    pattern[position + 1 :] *= 0.1
    pattern[position + 1 :, position] += 0.9
    return pattern


@pytest.mark.parametrize("length", [2, 5, 9, 33, 200])
@pytest.mark.parametrize("kind", ["itself", "local", "uniform"])
def test_heads_without_a_sink_show_none(length: int, kind: str) -> None:
    """Also not at the last keys, which nearly nobody but themselves can see."""
    uniform = np.tril(np.ones((length, length)))
    pattern = {
        "itself": np.eye(length),
        "local": _local(length),
        "uniform": uniform / uniform.sum(axis=1, keepdims=True),
    }[kind]
    mask = torch.ones(1, length, dtype=torch.bool)
    assert not find_sinks(_importance(pattern[None]), mask).any()


@pytest.mark.parametrize(("length", "position"), [(9, 0), (64, 0), (64, 17), (64, 40), (300, 255)])
def test_a_planted_sink_is_found_where_it_is(length: int, position: int) -> None:
    pattern = np.stack([_sink_at(position, length), *[_local(length)] * 7])
    mask = torch.ones(1, length, dtype=torch.bool)
    received = _importance(pattern)
    assert find_sinks(received, mask)[0].nonzero().flatten().tolist() == [position]
    assert not find_sinks(received, mask, share=0.2).any()  # one head in eight
    assert not find_sinks(received, mask, epsilon=0.95).any()


def test_secondary_sinks_are_told_apart_layer_by_layer() -> None:
    """Layers × heads × keys counted one by one: 0 is a sink everywhere, 17 in two layers only."""
    length, layers, heads = 40, 6, 4
    patterns = np.stack([_local(length)] * (layers * heads)).reshape(layers, heads, length, length)
    for layer in range(layers):
        patterns[layer, :2] = _sink_at(0, length)
    patterns[2:4, 3] = _sink_at(17, length)
    patterns[3, 2] = _sink_at(17, length)
    received = torch.stack([_importance(one)[0, 0] for one in patterns])[None]
    mask = torch.ones(1, length, dtype=torch.bool)
    primary, secondary = primary_and_secondary(received, mask)
    assert primary[0].nonzero()[:, 0].tolist() == [0]
    assert secondary[0].nonzero().tolist() == [[2, 17], [3, 17]]
    assert find_sinks(received, mask)[0].nonzero()[:, 0].tolist() == [0, 17]
    # As many heads for both: the one that receives more is the primary one.
    even = torch.zeros(1, 1, 2, 40)
    even[0, 0, 0, 5], even[0, 0, 1, 9] = 0.6, 0.7
    primary, secondary = primary_and_secondary(even, mask)
    assert primary[0].nonzero()[:, 0].tolist() == [9] and secondary[0, 0, 5]
    nothing = primary_and_secondary(torch.zeros(1, 1, 2, 40), mask)
    assert not nothing[0].any() and not nothing[1].any()


def test_a_bidirectional_sink_may_be_last() -> None:
    pattern = np.full((1, 20, 20), 0.1 / 19)
    pattern[0, :, 19] = 0.9
    mask = torch.ones(1, 20, dtype=torch.bool)
    found = find_sinks(_importance(pattern, causal=False), mask, causal=False)
    assert found[0].nonzero().flatten().tolist() == [19]


def test_padding_does_not_move_a_sink() -> None:
    received = _importance(_sink_at(5, 40)[None])
    mask = torch.ones(1, 40, dtype=torch.bool)
    pads = torch.full((1, 1, 1, 30), torch.nan, dtype=received.dtype)
    longer = torch.cat([received, pads], dim=-1)
    padded = torch.cat([mask, torch.zeros(1, 30, dtype=torch.bool)], dim=1)
    assert find_sinks(received, mask)[0].nonzero().flatten().tolist() == [5]
    assert find_sinks(longer, padded)[0].nonzero().flatten().tolist() == [5]


def test_position_embedding_norm() -> None:
    same(position_embedding_norm(tensor([[3.0, 4.0], [0.0, 0.0]])), [5, 0])
