"""Sums over the pattern from q, k and the log-sum-exp, against loops over single entries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sinkscope.attention import pattern_sums, scores
from sinkscope.attention.attend import attend, attend_in_tiles
from sinkscope.errors import SinkscopeError

from .calls import KINDS, Case, case, loop_pattern

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["one tile", "tiny tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, or two or three queries at a time."""
    if request.param == "tiny tiles":
        monkeypatch.setattr(scores, "TILE_ELEMENTS", 300)


def measured(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern and log-sum-exp by loops, and the latter in the dtype that statistics take."""
    pattern, lse = loop_pattern(case)
    return pattern, lse, lse.float()


@pytest.mark.parametrize("function", [attend, attend_in_tiles])
def test_attention_and_its_log_sum_exp(kind: str, tiles: None, function) -> None:
    c = case(kind)
    if function is attend_in_tiles:  # the sink joins in `attend`
        c = replace(c, call=replace(c.call, learned_sink=None))
    pattern, lse = loop_pattern(c)
    z, found = function(*c.transposed)
    value = c.value.double().repeat_interleave(2, dim=2)
    torch.testing.assert_close(found.double(), lse, **TOLERANCE)
    expected = torch.einsum("bhqk,bkhd->bqhd", pattern, value)
    torch.testing.assert_close(z.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_keeps_the_dtype_and_a_wide_log_sum_exp(dtype: torch.dtype) -> None:
    c = case("window").to("cpu", dtype)
    z, lse = attend(*c.transposed)
    assert z.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _, expected = loop_pattern(c)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-2, atol=1e-2)


def test_values_may_be_narrower_than_keys() -> None:
    c = case("causal")
    pattern, _ = loop_pattern(c)
    value = c.value[..., :3]
    z, _ = attend(c.query.transpose(1, 2), c.key.transpose(1, 2), value.transpose(1, 2), c.call)
    expected = torch.einsum("bhqk,bkhd->bqhd", pattern.float(), value.repeat_interleave(2, 2))
    torch.testing.assert_close(z, expected, **TOLERANCE)


def test_received_mass(kind: str, tiles: None) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    found = pattern_sums.received_mass(c.query, c.key, lse, c.call)
    torch.testing.assert_close(found.double(), pattern.sum(2), **TOLERANCE)


def test_received_mass_of_some_queries(kind: str, tiles: None) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    queries = torch.rand(lse.shape[0], lse.shape[2]) > 0.4
    found = pattern_sums.received_mass(c.query, c.key, lse, c.call, queries)
    expected = (pattern * queries[:, None, :, None]).sum(2)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def test_received_mass_by_bucket(kind: str, tiles: None) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    near = (torch.arange(lse.shape[2]) < 4).float()
    weights = torch.stack([near, 1 - near], dim=-1).expand(len(lse), -1, -1)
    found = pattern_sums.received_mass_by(c.query, c.key, lse, c.call, weights)
    torch.testing.assert_close(found[:, 0].double(), pattern[:, :, :4].sum(2), **TOLERANCE)
    torch.testing.assert_close(found[:, 1].double(), pattern[:, :, 4:].sum(2), **TOLERANCE)


def test_row_entropy(kind: str, tiles: None) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    expected = torch.zeros_like(lse, dtype=torch.float64)
    for place in (pattern > 0).nonzero().tolist():
        a = float(pattern[tuple(place)])
        expected[tuple(place[:3])] -= a * math.log(a)
    found = pattern_sums.row_entropy(c.query, c.key, lse, c.call)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)
    both = pattern_sums.row_and_column_sums(c.query, c.key, lse, c.call, entropy=True)
    torch.testing.assert_close(both.entropy.double(), expected, **TOLERANCE)
    torch.testing.assert_close(both.received.double(), pattern.sum(2), **TOLERANCE)


def test_both_sums_leave_out_the_same_queries() -> None:
    c = case("causal")
    pattern, _, lse = measured(c)
    queries = torch.arange(lse.shape[2]).expand(len(lse), -1) % 2 == 0
    both = pattern_sums.row_and_column_sums(c.query, c.key, lse, c.call, queries, entropy=True)
    torch.testing.assert_close(both.received.double(), pattern[:, :, ::2].sum(2), **TOLERANCE)
    assert both.entropy[:, :, 1::2].abs().max() == 0


def test_nearby_attention(kind: str, tiles: None) -> None:
    """Widths 1 and 3, with the query's own key and without: span by span, one entry at a time."""
    c = case(kind)
    pattern, _, lse = measured(c)
    expected = torch.zeros(*lse.shape, 4, dtype=torch.float64)
    for b, h, i, j in (pattern > 0).nonzero().tolist():
        far = abs(c.call.offset + i - j)
        for at, inside in enumerate([far < 1, far < 3, far == 1, 0 < far <= 3]):
            expected[b, h, i, at] += float(pattern[b, h, i, j]) if inside else 0.0
    found = pattern_sums.nearby_attention(c.query, c.key, lse, c.call, (1, 3))
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("as_set", [False, True])
def test_attention_to_keys(kind: str, tiles: None, as_set: bool) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    keys = torch.zeros(pattern.shape[0], pattern.shape[3], dtype=torch.bool)
    keys[0, 0], keys[1, [0, 4, 5]] = True, True  # a different number in each prompt
    chosen = pattern_sums.KeySet.of(keys) if as_set else keys
    found = pattern_sums.attention_to_keys(c.query, c.key, lse, c.call, chosen)
    expected = (pattern * keys[:, None, None, :]).sum(-1)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def test_attention_to_no_key_is_zero() -> None:
    c = case("causal")
    _, _, lse = measured(c)
    none = torch.zeros(c.key.shape[:2], dtype=torch.bool)
    assert pattern_sums.attention_to_keys(c.query, c.key, lse, c.call, none).abs().max() == 0


def test_a_set_without_waiting_says_the_same() -> None:
    keys = torch.tensor([[True, False, True, False], [False, False, False, True]])
    tight, loose = pattern_sums.KeySet.of(keys), pattern_sums.KeySet.of(keys, most=4)
    assert tight.number.tolist() == loose.number.tolist() == [2, 1]
    assert tight.index.tolist() == loose.index[:, :2].tolist()
    assert sorted(loose.index[0, :2].tolist()) == [0, 2] and loose.index[1, 0] == 3


def test_weighted_mass(kind: str, tiles: None) -> None:
    c = case(kind)
    pattern, _, lse = measured(c)
    sizes = c.value.norm(dim=-1)
    found = pattern_sums.weighted_mass(c.query, c.key, lse, c.call, sizes)
    expected = torch.einsum("bhqk,bkh->bhq", pattern, sizes.double().repeat_interleave(2, dim=2))
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def test_learned_sink_share(kind: str) -> None:
    c = case(kind)
    pattern, lse, narrow = measured(c)
    expected = torch.where(lse > -math.inf, 1 - pattern.sum(-1), 0)
    found = pattern_sums.learned_sink_share(narrow, c.call)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def test_statistics_of_narrow_inputs_are_wide(kind: str) -> None:
    """bfloat16 queries and keys: the sums are those of the rounded numbers, in float32."""
    c = case(kind).to("cpu", torch.bfloat16)
    pattern, _, lse = measured(c)
    found = pattern_sums.received_mass(c.query, c.key, lse, c.call)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pattern.sum(2), **TOLERANCE)


def test_keys_of_a_call_are_not_kept() -> None:
    with pytest.raises(SinkscopeError, match="inside a hook"):
        _ = case("causal").call.keys


def test_key_range_is_tight() -> None:
    for kind in ("causal", "cached", "window", "window of a cache", "window both ways"):
        c = case(kind)
        pattern, _ = loop_pattern(c)
        for queries in (slice(0, 2), slice(3, 7), slice(9, 11)):
            seen = (pattern[:, :, queries] > 0).flatten(0, 2).any(0).nonzero().flatten()
            found = c.call.key_range(queries, c.key.shape[1])
            assert (found.start, found.stop) == (int(seen[0]), int(seen[-1]) + 1), (kind, queries)
