"""Value and head-output norms against explicit projections and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.metrics import values
from tests.metrics.cases import mean, random_case, same, tensor


def test_norms() -> None:
    case = random_case(True, None)
    expected = [
        [[np.sqrt((x * x).sum()) for x in head] for head in p] for p in case.v.swapaxes(1, 2)
    ]
    same(values.norms(tensor(case.v)), expected)


def test_norms_accumulate_wider_than_fp16() -> None:
    x = torch.full((1, 1, 1, 4), 60000.0, dtype=torch.float16)  # its square overflows fp16
    got = values.norms(x)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(2 * x[0, 0, 0, 0].item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_through_the_output_projection(dtype: torch.dtype) -> None:
    """‖x W_O^h‖ by making the projected vector, which the Gram matrix avoids."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(3, 4, 40))
    expected = [
        [[np.linalg.norm(x[p, t, h] @ w[h]) for t in range(5)] for h in range(3)] for p in range(2)
    ]
    got = values.norms_through(tensor(x).to(dtype), values.gram(tensor(w).to(dtype)))
    assert got.dtype == dtype
    same(got, expected, rtol=1e-9 if dtype == torch.float64 else 1e-5)


def test_norms_through_a_projection_that_kills_the_vector() -> None:
    """x lies where W_O maps to nothing: rounding must not make the root's argument negative."""
    torch.manual_seed(0)
    w = torch.randn(1, 8, 64)
    x = torch.randn(1, 50, 1, 8)
    projector = torch.eye(8) - torch.outer(x[0, 0, 0], x[0, 0, 0]) / x[0, 0, 0].square().sum()
    got = values.norms_through(x, values.gram((projector @ w[0])[None]))
    assert got.isfinite().all()
    assert got[0, 0, 0] < 1e-2 * got[0, 0, 1:].min()


def test_gram_of_bf16_weights_is_fp32() -> None:
    w = torch.randn(2, 3, 500).bfloat16()
    exact = np.einsum("hdm,hem->hde", w.double().numpy(), w.double().numpy())
    got = values.gram(w)
    assert got.dtype == torch.float32
    same(got, exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("sinks", [1, 2])
def test_drain_and_means(sinks: int) -> None:
    case = random_case(True, None, sinks=sinks)
    size = np.linalg.norm(case.v, axis=-1).swapaxes(1, 2)
    size[np.broadcast_to(~case.mask[:, None], size.shape)] = np.nan
    got = values.drain(tensor(size), tensor(case.sinks), tensor(case.mask))
    everything = values.mean_norm(tensor(size), tensor(case.mask))
    for p in case:
        at = np.flatnonzero(case.sinks[p])
        others = [j for j in np.flatnonzero(case.mask[p]) if j not in at]
        for h in range(2):
            expected = mean([size[p, h, j] for j in at]) / mean([size[p, h, j] for j in others])
            same(got[p, h], expected)
            same(everything[p, h], mean([size[p, h, j] for j in np.flatnonzero(case.mask[p])]))


def test_drain_by_hand() -> None:
    size = tensor([[[0.1, 2.0, 4.0, 99.0]]])
    mask = tensor([[True, True, True, False]])
    same(values.drain(size, tensor([[True, False, False, False]]), mask), [[0.1 / 3]])
    assert values.drain(size, mask, mask).isnan().all()  # nothing but sinks: no others


def test_norm_at() -> None:
    size = tensor(np.arange(12.0).reshape(2, 2, 3))
    same(values.norm_at(size, torch.tensor([2, 0])), [[2, 5], [6, 9]])


def test_per_query_head_repeats_neighbours() -> None:
    kv = tensor([[[1.0, 2.0], [3.0, 4.0]]])
    same(values.per_query_head(kv, 4), [[[1, 2], [1, 2], [3, 4], [3, 4]]])
    same(values.per_query_head(kv[..., 0], 6), [[1, 1, 1, 3, 3, 3]])
    same(values.per_query_head(kv, 2), kv)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 4), (False, None)])
def test_output_from_the_sinks_and_its_variance(causal: bool, window: int | None) -> None:
    case = random_case(causal, window)
    v = case.v.copy()
    v[~case.mask] = np.nan
    expected = np.full((3, 11, 4, 5), np.nan)
    for p in case:
        for i in np.flatnonzero(case.mask[p]):
            for h in case.heads:
                parts = [
                    case.pattern[p, h, i, j] * v[p, j, case.kv(h)]
                    for j in range(11)
                    if case.sinks[p, j]
                ]
                expected[p, i, h] = np.sum(parts, axis=0)
    got = values.output_from(tensor(case.pattern), tensor(v), tensor(case.sinks))
    same(got, expected)
    spread = values.variance_over_queries(got, tensor(case.mask))
    for p in case:
        rows = expected[p, case.mask[p]]
        same(spread[p], rows.var(axis=0).sum(axis=-1))


def test_a_constant_output_has_no_variance() -> None:
    output = torch.ones(1, 4, 2, 3)
    output[0, 3] = torch.nan
    queries = tensor([[True, True, True, False]])
    same(values.variance_over_queries(output, queries), [[0, 0]])
