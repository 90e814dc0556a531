"""The linear-time logits and angles against every pair, one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import attention, geometry
from tests.metrics.cases import REACHES, Case, mean, random_case, same, tensor

cases = pytest.mark.parametrize(("causal", "window"), REACHES)
counts = pytest.mark.parametrize("sinks", [1, 2, 3])


def inputs(case: Case) -> tuple:
    return tensor(case.q), tensor(case.k), tensor(case.sinks), tensor(case.mask)


def split(case: Case, p: int, i: int) -> tuple[list[int], list[int]]:
    """The sinks that query i sees, and the other keys, itself left out."""
    keys = case.keys(p, i)
    sinks = [j for j in keys if case.sinks[p, j]]
    return sinks, [j for j in keys if j not in sinks and j != i]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b))


@cases
@counts
def test_sink_logit_decomposition(causal: bool, window: int | None, sinks: int) -> None:
    case = random_case(causal, window, sinks=sinks)
    q, k, is_sink, mask = inputs(case)
    got = geometry.sink_logit_decomposition(q, k, is_sink, mask, causal, window)
    for p in case:
        queries = case.queries_after(p)
        for h in case.heads:
            keys = case.k[p, :, case.kv(h)]
            to_sinks, to_others = [], []
            for i in queries:
                seen, others = split(case, p, i)
                if seen:
                    to_sinks.append(mean([cosine(case.q[p, i, h], keys[j]) for j in seen]))
                if others:
                    to_others.append(mean([cosine(case.q[p, i, h], keys[j]) for j in others]))
            same(got.query_norm[p, h], mean([np.linalg.norm(case.q[p, i, h]) for i in queries]))
            sink_keys = keys[case.sinks[p]]
            same(got.key_norm[p, h], mean([np.linalg.norm(key) for key in sink_keys]))
            same(got.cosine[p, h], mean(to_sinks), atol=1e-9)
            same(got.other_cosine[p, h], mean(to_others), atol=1e-9)


def test_a_query_that_points_nowhere_has_no_angle() -> None:
    case = random_case(True, None, sinks=1)
    q, k, is_sink, mask = inputs(case)
    last = int(case.queries_after(0)[-1])
    q[0, last] = 0
    got = geometry.sink_logit_decomposition(q, k, is_sink, mask, True)
    for h in case.heads:
        keys, queries = case.k[0, :, case.kv(h)], case.queries_after(0)[:-1]
        (sink,) = np.flatnonzero(case.sinks[0])
        same(got.cosine[0, h], mean([cosine(case.q[0, i, h], keys[sink]) for i in queries]))
        sizes = [np.linalg.norm(case.q[0, i, h]) for i in queries]
        same(got.query_norm[0, h], sum(sizes) / (len(sizes) + 1))
        others = [
            mean([cosine(case.q[0, i, h], keys[j]) for j in split(case, 0, i)[1]])
            for i in queries
            if split(case, 0, i)[1]
        ]
        same(got.other_cosine[0, h], mean(others))


@cases
@counts
def test_other_logit_mean(causal: bool, window: int | None, sinks: int) -> None:
    case = random_case(causal, window, sinks=sinks)
    q, k, is_sink, mask = inputs(case)
    got = geometry.other_logit_mean(q, k, case.scale, is_sink, mask, causal, window)
    for p in case:
        for i in np.flatnonzero(mask[p]):
            for h in case.heads:
                others = split(case, p, i)[1]
                same(got[p, h, i], mean([case.scores[p, h, i, j] for j in others]), atol=1e-9)


@cases
@counts
def test_linear_gap_is_the_quadratic_one(causal: bool, window: int | None, sinks: int) -> None:
    """The definition takes scores, which the case made pair by pair."""
    case = random_case(causal, window, sinks=sinks)
    q, k, is_sink, mask = inputs(case)
    gap, valid = geometry.logit_gap_rows(q, k, case.scale, is_sink, mask, causal, window)
    expected, where = attention.logit_gap_rows(tensor(case.scores), is_sink, mask, causal, window)
    assert torch.equal(valid.expand_as(where), where)
    same(gap, expected, atol=1e-9)


def test_pads_may_hold_anything() -> None:
    case = random_case(True, 4)
    q, k, is_sink, mask = inputs(case)
    clean = geometry.sink_logit_decomposition(q, k, is_sink, mask, True, 4)
    q[~mask], k[~mask] = torch.nan, torch.nan
    dirty = geometry.sink_logit_decomposition(q, k, is_sink, mask, True, 4)
    for a, b in zip(clean, dirty, strict=True):
        same(b, a)


def test_one_sink_multiplies_back_to_its_logit() -> None:
    """‖q‖ ‖k‖ cos(q, k) · scale of a single query is the score itself."""
    q, k = torch.randn(1, 2, 3, 8).double(), torch.randn(1, 2, 1, 8).double()
    sinks, mask = tensor([[True, False]]), tensor([[True, True]])
    parts = geometry.sink_logit_decomposition(q, k, sinks, mask, True)
    product = parts.query_norm * parts.key_norm * parts.cosine
    same(product[0], [float(q[0, 1, h] @ k[0, 0, 0]) for h in range(3)])
    assert parts.other_cosine.isnan().all()  # query 1 sees the sink and itself


def test_long_windowed_text_keeps_its_digits_in_fp32() -> None:
    """Large keys long before the window leave no trace in it."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 6000, 1, 4), torch.randn(1, 6000, 1, 4)
    k[:, 1:3000] *= 1e4
    mask = torch.ones(1, 6000, dtype=torch.bool)
    sinks = torch.zeros_like(mask)
    sinks[:, 0] = True
    got = geometry.other_logit_mean(q, k, 1.0, sinks, mask, True, 8)[0, 0]
    for i in (3100, 5000, 5999):
        pairs = [float(q[0, i, 0].double() @ k[0, j, 0].double()) for j in range(i - 7, i)]
        assert got[i].item() == pytest.approx(mean(pairs), abs=1e-5)


def test_products_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(True, None)
    q, k, _, _ = inputs(case)
    expected = [
        [[case.q[p, i, h] @ case.k[p, i, case.kv(h)] for i in range(11)] for h in case.heads]
        for p in case
    ]
    same(geometry.products(q, k), expected)
    whole = geometry.position_chunks
    monkeypatch.setattr(geometry, "position_chunks", lambda x: whole(x, elements=200))
    assert len(list(geometry.position_chunks(q))) > 3
    same(geometry.products(q, k), expected)


def test_half_precision_inputs_come_out_in_fp32() -> None:
    case = random_case(True, None)
    q, k, is_sink, mask = inputs(case)
    exact = geometry.logit_gap_rows(
        q.bfloat16().double(), k.bfloat16().double(), 1.0, is_sink, mask, True
    )
    got = geometry.logit_gap_rows(q.bfloat16(), k.bfloat16(), 1.0, is_sink, mask, True)
    assert got[0].dtype == torch.float32
    same(got[0], exact[0], rtol=1e-4, atol=1e-4)
