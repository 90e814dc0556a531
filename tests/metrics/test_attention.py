"""Attention statistics against plain loops, hand-computed cases and published identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkscope.metrics import attention as at
from tests.metrics.cases import REACHES, Case, mean, random_case, same, tensor

cases = pytest.mark.parametrize(("causal", "window"), REACHES)
nan = float("nan")


def table(case: Case, entry) -> list:
    """[prompt head] of entry(p, h)."""
    return [[entry(p, h) for h in case.heads] for p in case]


@cases
@pytest.mark.parametrize("sinks", [1, 2, 3])
def test_attention_to_and_sink_attention(causal: bool, window: int | None, sinks: int) -> None:
    case = random_case(causal, window, sinks=sinks)
    to_sinks = at.attention_to(tensor(case.pattern), tensor(case.sinks))

    def paid(p: int, h: int, i: int) -> float:
        return sum(case.pattern[p, h, i, j] for j in range(case.length) if case.sinks[p, j])

    same(to_sinks, [[[paid(p, h, i) for i in range(11)] for h in case.heads] for p in case])
    got = at.sink_attention(to_sinks, tensor(case.sinks), tensor(case.mask), causal)
    same(got, table(case, lambda p, h: mean([paid(p, h, i) for i in case.queries_after(p)])))


@cases
def test_first_token_attention(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    first = np.zeros_like(case.mask)
    for p in case:
        first[p, np.flatnonzero(case.mask[p])[0]] = True
    got = at.first_token_attention(
        at.attention_to(tensor(case.pattern), tensor(first)), tensor(case.mask)
    )

    def expected(p: int, h: int) -> float:
        real = np.flatnonzero(case.mask[p])
        return mean([case.pattern[p, h, i, real[0]] for i in real])

    same(got, table(case, expected))


@cases
@pytest.mark.parametrize("count", [1, 3, 20])
def test_top_received(causal: bool, window: int | None, count: int) -> None:
    case = random_case(causal, window)
    alpha = np.random.default_rng(0).permutation(1.0 * np.arange(case.pattern[..., 0].size))
    alpha = alpha.reshape(case.pattern[..., 0].shape)
    score, position = at.top_received(tensor(alpha), tensor(case.mask), causal, count)
    for p in case:
        real = np.flatnonzero(case.mask[p]).tolist()
        keys = real[: len(real) - len(real) // 4] if causal else real
        for h in case.heads:
            best = sorted(keys, key=lambda k: -alpha[p, h, k])[:count]
            left = count - len(best)
            assert position[p, h].tolist()[: len(best)] == best
            same(score[p, h], [alpha[p, h, k] for k in best] + [nan] * left)
            assert position[p, h, len(best) :].isnan().all()


@cases
def test_received_mass_and_importance(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    mask = tensor(case.mask)
    mass = at.received_mass(tensor(case.pattern), mask)

    def queries(p: int, k: int) -> list[int]:
        return [i for i in range(11) if case.sees(p, i, k)]

    def received(p: int, h: int, k: int) -> list[float]:
        return [case.pattern[p, h, i, k] for i in queries(p, k)]

    shape = [[[(p, h, k) for k in range(11)] for h in case.heads] for p in case]
    same(mass, [[[sum(received(*x)) for x in row] for row in block] for block in shape])
    alpha = [[[mean(received(*x)) for x in row] for row in block] for block in shape]
    same(at.importance(mass, mask, causal, window), alpha)

    def uniform(p: int, k: int) -> float:
        return mean([1 / len(case.keys(p, i)) for i in queries(p, k)])

    ratio = [[[a / uniform(p, k) for k, a in enumerate(row)] for row in alpha[p]] for p in case]
    got = at.uniform_ratio(tensor(alpha), mask, causal, window)
    same(got, ratio, rtol=1e-6)


def test_importance_is_gus_formula() -> None:
    """α_k = 1/(T-k+1) Σ_{i=k..T} A_ik, k from 1, on a pattern given in decimals."""
    pattern = tensor([[[[1.0, 0, 0], [0.6, 0.4, 0], [0.5, 0.2, 0.3]]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    alpha = at.importance(at.received_mass(pattern, mask), mask, causal=True)
    same(alpha, [[[2.1 / 3, 0.6 / 2, 0.3]]])


def test_uniform_attention_has_ratio_one_everywhere() -> None:
    length = 33
    pattern = torch.tril(torch.ones(length, length, dtype=torch.float64))
    pattern = (pattern / pattern.sum(dim=1, keepdim=True))[None, None]
    mask = torch.ones(1, length, dtype=torch.bool)
    alpha = at.importance(at.received_mass(pattern, mask), mask, causal=True)
    same(at.uniform_ratio(alpha, mask, causal=True), np.ones((1, 1, length)), rtol=1e-6)


def test_sink_rate_thresholds_before_it_averages() -> None:
    """Two prompts at 0.5 and 0.2: a rate of one half, where the mean 0.35 would give one."""
    alpha = tensor([[[[0.5, 0.1]]], [[[0.2, 0.1]]]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    same(at.sink_rate(alpha, mask, 0.3), [0.5, 0.0])


def test_sink_rate_and_its_counts() -> None:
    rng = np.random.default_rng(3)
    alpha = rng.uniform(size=(4, 3, 5, 6))
    mask = np.ones((4, 6), dtype=bool)
    mask[1, 4:], mask[2, 2:], mask[:, 5] = False, False, False
    alpha[~np.broadcast_to(mask[:, None, None, :], alpha.shape)] = np.nan
    epsilons = [0.05, 0.3, 0.8]
    counts = np.zeros((3, 6))
    for e, epsilon in enumerate(epsilons):
        for p, layer, h, k in np.ndindex(*alpha.shape):
            counts[e, k] += mask[p, k] and alpha[p, layer, h, k] > epsilon
    same(at.count_above(tensor(alpha), tensor(epsilons)), counts)
    reach = mask.sum(axis=0) * 3 * 5
    with np.errstate(invalid="ignore"):
        same(at.sink_rate(tensor(alpha), tensor(mask), 0.3), counts[1] / reach, rtol=1e-6)
    by_layer = sum(at.count_above(tensor(alpha[:, layer]), tensor(epsilons)) for layer in range(3))
    same(by_layer, counts)


def test_epsilons_are_the_published_grid() -> None:
    same(torch.tensor(at.EPSILONS), np.arange(5, 100, 5) / 100, rtol=1e-6)


@cases
def test_entropy(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)

    def row(p: int, h: int, i: int) -> float:
        paid = [case.pattern[p, h, i, j] for j in case.keys(p, i)]
        return -sum(a * math.log(a) for a in paid) if paid else nan

    rows = at.row_entropy(tensor(case.pattern))
    same(rows, [[[row(p, h, i) for i in range(11)] for h in case.heads] for p in case])
    got = at.attention_entropy(rows, tensor(case.mask))
    same(got, table(case, lambda p, h: mean([row(p, h, i) for i in np.flatnonzero(case.mask[p])])))


def test_entropy_by_hand() -> None:
    pattern = tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]]])
    same(at.row_entropy(pattern), [[[0, math.log(2), math.log(3)]]])


@cases
@pytest.mark.parametrize("sinks", [1, 2, 3])
def test_logit_gap(causal: bool, window: int | None, sinks: int) -> None:
    case = random_case(causal, window, sinks=sinks)
    expected = np.full(case.scores.shape[:3], nan)
    where = np.zeros_like(case.mask)
    for p in case:
        for i in case.queries_after(p):
            seen = case.keys(p, i)
            to_sinks = [j for j in seen if case.sinks[p, j]]
            others = [j for j in seen if not case.sinks[p, j] and j != i]
            where[p, i] = bool(to_sinks and others)
            for h in case.heads:
                s = case.scores[p, h, i]
                expected[p, h, i] = mean([s[j] for j in to_sinks]) - mean([s[j] for j in others])
    mask, is_sink = tensor(case.mask), tensor(case.sinks)
    gap, valid = at.logit_gap_rows(tensor(case.scores), is_sink, mask, causal, window)
    same(valid, np.broadcast_to(where[:, None], valid.shape))
    same(gap, np.where(where[:, None], expected, nan))
    means = [[mean(list(expected[p, h, where[p]])) for h in case.heads] for p in case]
    same(at.sink_logit_gap(gap, valid), means)


def test_logit_gap_is_guos_formula() -> None:
    """S_i0 - mean_{1≤j<i} S_ij; defined from query 2 on. Masked scores are nonsense on purpose."""
    big = 1e9
    scores = tensor([[[[0, big, big, big], [5, 1, big, big], [4, 2, 9, -big], [7, 1, 3, 8.0]]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    sinks = tensor([[True, False, False, False]])
    gap, valid = at.logit_gap_rows(scores, sinks, mask, causal=True)
    assert valid.tolist() == [[[False, False, True, True]]]
    same(gap, [[[nan, nan, 4 - 2, 7 - (1 + 3) / 2]]])
    same(at.sink_logit_gap(gap, valid), [[3.5]])


@pytest.mark.parametrize("blank", [-math.inf, torch.finfo(torch.float32).min])
def test_logit_gap_takes_either_way_of_masking(blank: float) -> None:
    case = random_case(True, 4)
    hidden = np.array(
        [[[not case.sees(p, i, j) for j in range(11)] for i in range(11)] for p in case]
    )
    scores = tensor(np.where(hidden[:, None], blank, case.scores)).float()
    args = tensor(case.sinks), tensor(case.mask), True, 4
    expected = at.sink_logit_gap(*at.logit_gap_rows(tensor(case.scores), *args))
    same(at.sink_logit_gap(*at.logit_gap_rows(scores, *args)), expected, rtol=1e-5)


def test_logit_gap_of_keys_that_a_mask_hid_from_one_head() -> None:
    """Query 2 sees itself alone in head 0; query 3 has lost key 1 there; head 1 sees all."""
    blank = torch.finfo(torch.float16).min
    rows = [[0, 0, 0, 0], [5, 1, 0, 0], [4, 2, 9, 0], [7, 1, 3, 8.0]]
    scores = torch.tensor([[rows, rows]], dtype=torch.float16)
    scores[0, 0, 2, :2] = blank
    scores[0, 0, 3, 1] = -math.inf
    mask = torch.ones(1, 4, dtype=torch.bool)
    sinks = tensor([[True, False, False, False]])
    gap, valid = at.logit_gap_rows(scores, sinks, mask, causal=True)
    assert valid.tolist() == [[[False, False, False, True], [False, False, True, True]]]
    same(gap, [[[nan, nan, nan, 7 - 3], [nan, nan, 4 - 2, 7 - (1 + 3) / 2]]])
    same(at.sink_logit_gap(gap, valid), [[4, 3.5]])


def test_learned_sink_mass_is_what_the_hidden_column_took() -> None:
    """A softmax over [scores, sink logit] whose last column is dropped, as gpt-oss does it."""
    rng = np.random.default_rng(1)
    weights = np.exp(rng.normal(size=(2, 3, 5, 6)))
    full = weights / weights.sum(axis=-1, keepdims=True)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    expected = [
        [mean([full[p, h, i, 5] for i in np.flatnonzero(mask[p])]) for h in range(3)]
        for p in (0, 1)
    ]
    same(at.learned_sink_mass(tensor(full[..., :5]), tensor(mask)), expected)


def test_no_learned_sink_has_no_mass_even_after_rounding() -> None:
    pattern = torch.full((1, 1, 4, 3), 1 / 3) * (1 + 1e-6)
    assert at.learned_sink_mass(pattern, torch.ones(1, 4, dtype=torch.bool)).item() == 0


@cases
def test_value_weighted_share(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    size = np.linalg.norm(case.v, axis=-1)
    size[~case.mask] = np.nan  # whatever the pads hold must not matter

    def share(p: int, h: int, i: int) -> float:
        paid = {j: case.pattern[p, h, i, j] * size[p, j, case.kv(h)] for j in case.keys(p, i)}
        return sum(a for j, a in paid.items() if case.sinks[p, j]) / sum(paid.values())

    got = at.value_weighted_share(
        tensor(case.pattern),
        tensor(size.transpose(0, 2, 1)),
        tensor(case.sinks),
        tensor(case.mask),
        causal,
    )
    same(got, table(case, lambda p, h: mean([share(p, h, i) for i in case.queries_after(p)])))


def test_value_weighted_share_of_equal_values_is_sink_attention() -> None:
    case = random_case(True, None)
    mask, sinks, pattern = tensor(case.mask), tensor(case.sinks), tensor(case.pattern)
    share = at.value_weighted_share(
        pattern, torch.full((3, 2, 11), 7.0, dtype=torch.float64), sinks, mask, True
    )
    same(share, at.sink_attention(at.attention_to(pattern, sinks), sinks, mask, True))


def test_a_query_that_moves_nothing_has_no_share() -> None:
    """All it attends to has value zero: 0 / 0 is left out of the mean."""
    part, whole = tensor([[[0.0, 0.0, 0.5]]]), tensor([[[0.0, 0.0, 2.0]]])
    sinks, mask = tensor([[True, False, False]]), torch.ones(1, 3, dtype=torch.bool)
    same(at.share_paid_to_sinks(part, whole, sinks, mask, True), [[0.25]])


def test_a_drained_sink_contributes_nothing() -> None:
    pattern = tensor([[[[1.0, 0, 0], [0.9, 0.1, 0], [0.8, 0.1, 0.1]]]])
    size = tensor([[[0.0, 2.0, 3.0]]])
    sinks, mask = tensor([[True, False, False]]), torch.ones(1, 3, dtype=torch.bool)
    same(at.value_weighted_share(pattern, size, sinks, mask, True), [[0.0]])


@pytest.mark.parametrize(
    ("length", "edges"),
    [(1, [1]), (2, [1]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2, 4]), (16, [1, 2, 4, 8])],
)
def test_bucket_edges(length: int, edges: list[int]) -> None:
    assert at.bucket_edges(length) == edges


@cases
def test_by_bucket(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    to_sinks = at.attention_to(tensor(case.pattern), tensor(case.sinks))
    means, counts = at.by_bucket(
        to_sinks, tensor(case.sinks), tensor(case.mask), [1, 2, 4, 8, 16], causal
    )
    buckets = [[1], [2, 3], [4, 5, 6, 7], [8, 9, 10], []]
    inside = [[[i for i in case.queries_after(p) if i in b] for b in buckets] for p in case]
    same(counts, [[len(queries) for queries in row] for row in inside])
    paid = (np.where(case.sinks[:, None, None], case.pattern, 0)).sum(axis=-1)
    same(means, table(case, lambda p, h: [mean([paid[p, h, i] for i in b]) for b in inside[p]]))


def test_renormalised_similarity() -> None:
    similarity = tensor([[[[2.0, 9, 9], [-1, 3, 9], [0, 0, 0]]]])
    seen = tensor([[[True, False, False], [True, True, False], [True, True, True]]])
    got = at.renormalised_similarity(similarity, seen)
    same(got, [[[[1, 0, 0], [0.25, 0.75, 0], [0, 0, 0]]]])


def test_renormalised_similarity_leaves_softmax_as_it_is() -> None:
    case = random_case(True, 4)
    seen = tensor([[[case.sees(p, i, j) for j in range(11)] for i in range(11)] for p in case])
    pattern = np.nan_to_num(case.pattern)
    same(at.renormalised_similarity(tensor(pattern), seen), pattern)


# --- invariances -----------------------------------------------------------------------------


def measure(pattern, scores, value_norm, sinks, mask, causal: bool, window: int | None) -> dict:
    """Every per-head figure of this module, each [prompt head]."""
    to_sinks = at.attention_to(pattern, sinks)
    alpha = at.importance(at.received_mass(pattern, mask), mask, causal, window)
    return {
        "sink_attention": at.sink_attention(to_sinks, sinks, mask, causal),
        "first_token_attention": at.first_token_attention(to_sinks, mask),
        "importance": alpha.nan_to_num().amax(dim=-1),
        "ratio": at.uniform_ratio(alpha, mask, causal, window).nan_to_num().amax(dim=-1),
        "entropy": at.attention_entropy(at.row_entropy(pattern), mask),
        "gap": at.sink_logit_gap(*at.logit_gap_rows(scores, sinks, mask, causal, window)),
        "learned": at.learned_sink_mass(pattern * 0.75, mask),
        "share": at.value_weighted_share(pattern, value_norm, sinks, mask, causal),
    }


def measured(
    case: Case, rows=slice(None), heads=slice(None), pads: tuple[int, int] = (0, 0)
) -> dict:
    def pad(x: np.ndarray, axes: tuple[int, ...], fill) -> torch.Tensor:
        width = [pads if axis in axes else (0, 0) for axis in range(x.ndim)]
        return tensor(np.pad(x, width, constant_values=fill))

    size = np.linalg.norm(case.v, axis=-1).transpose(0, 2, 1).repeat(2, axis=1)
    return measure(
        # Rows of pad queries hold nonsense, columns of pad keys no attention.
        pad(pad(case.pattern[rows][:, heads], (3,), 0).numpy(), (2,), np.nan),
        pad(case.scores[rows][:, heads], (2, 3), 1e30),
        pad(size[rows][:, heads], (2,), np.nan),
        pad(case.sinks[rows], (1,), False),
        pad(case.mask[rows], (1,), False),
        case.causal,
        case.window,
    )


some_case = st.tuples(st.sampled_from(REACHES), st.integers(0, 99))


@settings(deadline=None, max_examples=25)
@given(some_case, st.permutations(range(4)))
def test_heads_are_independent(args, order: list[int]) -> None:
    case = random_case(*args[0], seed=args[1])
    moved = measured(case, heads=order)
    for name, value in measured(case).items():
        same(moved[name], value[:, order])


@settings(deadline=None, max_examples=25)
@given(some_case, st.integers(0, 5), st.integers(0, 5))
def test_padding_changes_nothing(args, left: int, right: int) -> None:
    case = random_case(*args[0], seed=args[1])
    padded = measured(case, pads=(left, right))
    for name, value in measured(case).items():
        same(padded[name], value, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(some_case, st.permutations(range(3)), st.integers(0, 3))
def test_prompts_are_independent(args, order: list[int], cut: int) -> None:
    case = random_case(*args[0], seed=args[1])
    parts = [measured(case, rows=part) for part in (order[:cut], order[cut:]) if part]
    for name, value in measured(case).items():
        same(torch.cat([part[name] for part in parts]), value[order])


# --- edges -----------------------------------------------------------------------------------


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_one_token_has_no_query_after_its_sink() -> None:
    pattern, one = torch.ones(1, 1, 1, 1), ones(1, 1)
    got = measure(pattern, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), one, one, True, None)
    assert {name for name, value in got.items() if value.isnan().all()} == {
        "sink_attention",
        "gap",
        "share",
    }
    assert got["first_token_attention"] == 1 and got["entropy"] == 0


def test_a_sink_at_the_end_has_no_query_after_it() -> None:
    case = random_case(True, None)
    sinks = np.zeros_like(case.sinks)
    sinks[:, 10] = True
    to_sinks = at.attention_to(tensor(case.pattern), tensor(sinks))
    assert at.sink_attention(to_sinks, tensor(sinks), tensor(case.mask), True).isnan().all()


def test_a_prompt_without_a_real_token_is_nan() -> None:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    pattern = torch.full((1, 2, 3, 3), torch.nan)
    assert at.importance(at.received_mass(pattern, mask), mask, True).isnan().all()
    assert at.attention_entropy(at.row_entropy(pattern), mask).isnan().all()
    assert at.sink_rate(pattern[:, None, :, 0], mask).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_fp32(dtype: torch.dtype) -> None:
    """4096 queries that each pay exactly 2^-9: a bf16 sum would stall long before 8."""
    pattern = torch.full((1, 1, 4096, 2), 2.0**-9, dtype=dtype)
    mask = ones(1, 4096)
    mass = at.received_mass(pattern, mask)
    assert mass.dtype == torch.float32 and mass.eq(8).all()
