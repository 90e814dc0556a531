"""Simulated quantisation, bit for bit against loops in numpy and against torch's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sinkscope.errors import UnsupportedError
from sinkscope.metrics.quantisation import Scheme, limits, quantised, rounded

F = np.float32
E4M3 = sorted(
    {
        sign * (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
        for sign in (-1, 1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)  # nan
    }
)
"""Every number of fp8 e4m3, from its definition: 4 bits of exponent, 3 of mantissa, bias 7."""


def nearest_e4m3(x: np.float32) -> np.float32:
    """The nearest number of the format; of two, the one whose last bit of mantissa is 0."""
    x = min(max(float(x), -448.0), 448.0)
    gaps = [abs(x - point) for point in E4M3]
    least = min(gaps)
    tied = [point for point, gap in zip(E4M3, gaps, strict=True) if gap == least]
    if len(tied) == 1:
        return F(tied[0])
    positive = [point for point in E4M3 if point >= 0]
    return F(next(p for p in tied if positive.index(abs(p)) % 2 == 0))


def one_entry(x: F, low: F, high: F, scheme: Scheme) -> F:
    """x̂ of one number, in float32, step by step."""
    largest = max(abs(low), abs(high))
    if scheme.format == "fp8":
        if largest == 0:
            return F(0)
        step = F(largest / F(448))
        return F(nearest_e4m3(F(x * F(F(1) / step))) * step)
    if scheme.symmetric:
        n = 2 ** (scheme.bits - 1) - 1
        if largest == 0:
            return F(0)
        step = F(largest / F(n))
        return F(F(min(max(np.round(F(x * F(F(1) / step))), -n), n)) * step)
    n = 2**scheme.bits - 1
    if low == high:
        return low
    step = F(F(high - low) / F(n))
    whole = min(max(np.round(F(F(x - low) * F(F(1) / step))), 0), n)
    return F(F(F(whole) * step) + low)


def by_hand(x: np.ndarray, scheme: Scheme, keep: np.ndarray | None = None) -> np.ndarray:
    """Every entry with the range of its own place, found by going through all entries."""
    keep = np.zeros(x.shape, dtype=bool) if keep is None else np.broadcast_to(keep, x.shape)
    out = x.copy()
    for p, t, c in itertools.product(*map(range, x.shape)):
        if keep[p, t, c]:
            continue
        mine = []
        for t2, c2 in itertools.product(range(x.shape[1]), range(x.shape[2])):
            shared = {
                "tensor": True,
                "token": t2 == t,
                "channel": c2 == c,
                "group": t2 == t and c2 // scheme.group == c // scheme.group,
            }[scheme.per]
            if shared and not keep[p, t2, c2]:
                mine.append(x[p, t2, c2])
        out[p, t, c] = one_entry(x[p, t, c], min(mine), max(mine), scheme)
    return out


def case(seed: int = 0) -> np.ndarray:
    """Ordinary entries, a token and a channel that stand out, and a row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 5, 7)).astype(F)
    x[0, 0] *= 300
    x[:, :, 3] += 25
    x[1, 2] = 0
    return x


SCHEMES = [
    f"{number}-{per}{asymmetric}"
    for number in ("int8", "int4", "int2", "fp8")
    for per in ("tensor", "token", "channel", "group3", "group64")
    for asymmetric in ("", "-asym")
    if not (number == "fp8" and asymmetric)
]


@pytest.mark.parametrize("kept", ["nothing", "a token", "tokens and channels"])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_bit_equal_to_loops(name: str, kept: str) -> None:
    x, scheme = case(), Scheme.parse(name)
    keep = None if kept == "nothing" else np.zeros(x.shape, dtype=bool)
    if keep is not None:
        keep[0, 0] = True
        if kept != "a token":
            keep[1, 4] = keep[:, :, 3] = True
    want = by_hand(x, scheme, keep)
    got = quantised(torch.tensor(x), scheme, None if keep is None else torch.tensor(keep))
    assert np.array_equal(got.numpy(), want)
    if scheme.bits < 8:
        assert not np.array_equal(want, x)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_symmetric_integers_are_torchs_fake_quantisation(bits: int) -> None:
    x = torch.tensor(case(1)[:1])
    n = 2 ** (bits - 1) - 1
    want = torch.fake_quantize_per_tensor_affine(x, float(x.abs().max() / n), 0, -n, n)
    assert torch.equal(quantised(x, Scheme(f"int{bits}", "tensor")), want)
    scales, zeros = x.abs().amax((0, 1)) / n, torch.zeros(7, dtype=torch.int32)
    want = torch.fake_quantize_per_channel_affine(x, scales, zeros, 2, -n, n)
    assert torch.equal(quantised(x, Scheme(f"int{bits}", "channel")), want)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_asymmetric_integers_are_torchs_with_the_least_entry_as_zero(bits: int) -> None:
    x = torch.tensor(case(1)[:1])
    low, n = x.min(), 2**bits - 1
    step = (x.max() - low) / n
    want = torch.fake_quantize_per_tensor_affine(x - low, float(step), 0, 0, n) + low
    assert torch.equal(quantised(x, Scheme(f"int{bits}", "tensor", symmetric=False)), want)


def test_fp8_is_torchs_cast() -> None:
    x = torch.tensor(case(2)[:1])
    step = x.abs().max() / 448
    want = (x * step.reciprocal()).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(quantised(x, Scheme("fp8", "tensor")), want)


def test_a_static_range_clips() -> None:
    x, low, high = (
        torch.tensor([[[-9.0, 0.26, 5.0]]]),
        torch.tensor([[[-1.0]]]),
        torch.tensor([[[3.0]]]),
    )
    symmetric = rounded(x, low, high, Scheme("int4", "tensor", static=True))
    assert symmetric.tolist() == [[[-3.0, pytest.approx(3 / 7), 3.0]]]
    asymmetric = rounded(x, low, high, Scheme("int2", "tensor", symmetric=False, static=True))
    assert asymmetric[0, 0].tolist() == pytest.approx([-1.0, 1 / 3, 3.0])
    with pytest.raises(UnsupportedError, match="calibration texts"):
        quantised(x, Scheme("int8", "tensor", static=True))


def test_what_is_kept_does_not_stretch_the_range_of_the_rest() -> None:
    x = torch.tensor([[[1000.0, 500.0], [1.0, -0.5], [0.25, 0.75]]])
    keep = torch.tensor([[[True], [False], [False]]])
    assert quantised(x, Scheme())[0, 1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    spared = quantised(x, Scheme(), keep)
    assert torch.equal(spared[0, 0], x[0, 0])
    assert (spared - x).abs().max() <= 0.5 / 127 + 1e-7
    assert torch.equal(quantised(x, Scheme("int2"), torch.ones(1, 1, 1, dtype=torch.bool)), x)


def test_half_precision_is_rounded_in_fp32_and_handed_back_in_its_own() -> None:
    x = torch.tensor(case(3)).bfloat16()
    got = quantised(x, Scheme("int8", "token"))
    assert got.dtype == torch.bfloat16
    assert torch.equal(
        got, torch.tensor(by_hand(x.float().numpy(), Scheme("int8", "token"))).bfloat16()
    )
    low, high = limits(x, Scheme("int8", "token"))
    assert low.dtype == high.dtype == torch.float32


@pytest.mark.parametrize("name", [*SCHEMES, "int8-tensor-static", "int4-channel-asym-static"])
def test_names_read_back(name: str) -> None:
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(Scheme.parse(name)) == Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("int8", "expected FORMAT-RANGE"),
        ("int8-tensor-symmetric", "expected FORMAT-RANGE"),
        ("int8-tensor-asym-asym", "expected FORMAT-RANGE"),
        ("int3-tensor", "format is 'int3'"),
        ("int8-row", "per is 'row'"),
        ("fp8-tensor-asym", "fp8 is symmetric"),
        ("int8-token-static", "cannot be taken per token"),
        ("int8-group0", "group is 0"),
        (8, "8 is not a scheme"),
    ],
)
def test_what_is_no_scheme_is_refused(name: object, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        Scheme.parse(name)
