"""Our Triton kernels against loops over single entries and against plain torch.

They need a GPU, or ``TRITON_INTERPRET=1`` and an installed Triton, which runs them on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sinkscope.attention import attend as attend_module
from sinkscope.attention import pattern_sums
from sinkscope.attention.attend import attend, attend_in_tiles
from sinkscope.attention.call import AttentionCall
from sinkscope.metrics import attention, geometry, positions

from .calls import KINDS, Case, case, loop_pattern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
WITHOUT_ROWS = [kind for kind in KINDS if not kind.startswith("any")]


@pytest.fixture
def kernels():
    if INTERPRETED:
        pytest.importorskip("triton")
    from sinkscope.attention.kernels import launch

    return launch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


@pytest.fixture(params=WITHOUT_ROWS)
def here(request: pytest.FixtureRequest, dtype: torch.dtype) -> tuple[Case, Tensor, Tensor]:
    """A call on the device, and its pattern and log-sum-exp by loops."""
    moved = case(request.param).to("cpu", dtype)
    pattern, lse = loop_pattern(moved)
    return moved.to(DEVICE, dtype), pattern, lse.float().to(DEVICE)


def equal(found: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, **(tolerance or TOLERANCE))


def test_forward(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, _, _ = here
    c = replace(c, call=replace(c.call, learned_sink=None))  # joins in `attend`
    pattern, expected = loop_pattern(c.to("cpu", c.query.dtype))
    z, lse = kernels.forward(*c.transposed)
    equal(lse, expected)
    value = c.value.cpu().double().repeat_interleave(2, dim=2)
    rounding = dict(rtol=1e-2, atol=1e-2) if z.dtype == torch.bfloat16 else TOLERANCE
    equal(z, torch.einsum("bhqk,bkhd->bqhd", pattern, value), **rounding)


def test_nearby(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, pattern, lse = here
    queries, keys = pattern.shape[2:]
    distance = (torch.arange(queries)[:, None] + c.call.offset - torch.arange(keys)).abs()
    widths = (1, 3, 20)
    spans = [distance < width for width in widths]
    spans += [(distance > 0) & (distance <= width) for width in widths]
    expected = torch.stack([(pattern * span).sum(-1) for span in spans], dim=-1)
    equal(kernels.nearby_attention(c.query, c.key, lse, c.call, widths), expected)


def test_received(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, pattern, lse = here
    queries = torch.arange(lse.shape[2], device=DEVICE).expand(len(lse), -1) % 3 > 0
    counted = pattern * queries.cpu()[:, None, :, None]
    equal(kernels.received_mass(c.query, c.key, lse, c.call, None), pattern.sum(2))
    equal(kernels.received_mass(c.query, c.key, lse, c.call, queries), counted.sum(2))
    sizes = c.value.float().norm(dim=-1)
    expected = torch.einsum("bhqk,bkh->bhq", counted, sizes.cpu().double().repeat_interleave(2, 2))
    for entropy, weights in ((True, None), (False, sizes), (True, sizes)):
        received, rows, weighted = kernels.row_and_column_sums(
            c.query, c.key, lse, c.call, queries, entropy, weights
        )
        equal(received, counted.sum(2))
        assert (rows is not None, weighted is None) == (entropy, weights is None)
        if rows is not None:
            equal(rows, torch.special.entr(counted).sum(-1))
        if weighted is not None:
            equal(weighted, expected)


def test_received_by_bucket(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, pattern, lse = here
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(*lse.shape[::2], 3, generator=generator).clamp(min=0.3) - 0.3
    found = kernels.received_mass_by(c.query, c.key, lse, c.call, weights.to(DEVICE))
    equal(found, torch.einsum("bqn,bhqk->bnhk", weights.double(), pattern))


def test_rows(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, pattern, lse = here
    equal(kernels.row_entropy(c.query, c.key, lse, c.call), torch.special.entr(pattern).sum(-1))
    sizes = c.value.float().norm(dim=-1)
    sizes[:, 1] = 0
    expected = torch.einsum("bhqk,bkh->bhq", pattern, sizes.cpu().double().repeat_interleave(2, 2))
    equal(kernels.weighted_mass(c.query, c.key, lse, c.call, sizes), expected)


def test_chosen_keys(kernels, here: tuple[Case, Tensor, Tensor]) -> None:
    c, pattern, lse = here
    keys = torch.zeros(pattern.shape[0], pattern.shape[3], dtype=torch.bool)
    keys[0, [0, 3]], keys[1, 2] = True, True
    expected = (pattern * keys[:, None, None, :]).sum(-1)
    for chosen in (pattern_sums.KeySet.of(keys), pattern_sums.KeySet.of(keys, most=keys.shape[1])):
        index, number = chosen.index.to(DEVICE), chosen.number.to(DEVICE)
        equal(kernels.attention_to_keys(c.query, c.key, lse, c.call, index, number), expected)


@pytest.mark.parametrize("width", [16, 64, 80, 128, 192])
@pytest.mark.parametrize("length", [1, 63, 64, 257])
def test_any_length_and_head_width(kernels, width: int, length: int, dtype: torch.dtype) -> None:
    """Blocks that the tensors do not fill, and past keys; plain torch is the oracle here."""
    if INTERPRETED and width * length > 64 * 64:
        pytest.skip("slow in the interpreter")
    generator = torch.Generator().manual_seed(0)

    def draw(positions: int, heads: int) -> Tensor:
        return torch.randn(2, positions, heads, width, generator=generator).to(DEVICE, dtype)

    query, key, value = draw(length, 4), draw(length + 30, 2), draw(length + 30, 2)
    call = AttentionCall(scale=width**-0.5, offset=30)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    z, lse = attend_in_tiles(q.float(), k.float(), v.float(), call)
    found, found_lse = kernels.forward(q, k, v, call)
    rounding = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else TOLERANCE
    torch.testing.assert_close(found.float(), z, **rounding)
    torch.testing.assert_close(found_lse, lse, **TOLERANCE)
    plain = (query.cpu().float(), key.cpu().float(), lse.cpu(), call)
    sizes = value.float().norm(dim=-1)
    received, entropy, weighted = kernels.row_and_column_sums(
        query, key, lse, call, None, True, sizes
    )
    equal(received, pattern_sums.received_mass(*plain).double(), rtol=1e-4, atol=1e-4)
    equal(entropy, pattern_sums.row_entropy(*plain).double(), rtol=1e-4, atol=1e-4)
    mass = pattern_sums.weighted_mass(*plain, sizes.cpu())
    equal(weighted, mass.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    """Whichever kernel is chosen, z and log-sum-exp are those of the loops."""
    for width, kv_heads in ((16, 4), (64, 2), (128, 1)):
        c = case(kind, width, kv_heads).to("cpu", dtype)
        pattern, expected = loop_pattern(c)
        z, lse = attend(*c.to("cuda", dtype).transposed)
        equal(lse, expected)
        value = c.value.double().repeat_interleave(4 // kv_heads, dim=2)
        rounding = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else TOLERANCE
        equal(z, torch.einsum("bhqk,bkhd->bqhd", pattern, value), **rounding)


@pytest.mark.gpu
def test_library_kernels_are_taken_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("our own kernel was asked for what a library kernel can do")

    monkeypatch.setattr(attend_module, "kernels_for", refuse)
    for kind in ("causal", "cached", "bidirectional", "window", "learned sink"):
        attend(*case(kind, 64).to("cuda", torch.bfloat16).transposed)


@pytest.mark.gpu
def test_nothing_quadratic_is_held_on_a_gpu() -> None:
    """At 32k positions scores of one head would take 4 GiB."""
    q = torch.randn(1, 32768, 4, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 32768, 2, 64, device="cuda", dtype=torch.bfloat16)
    call = AttentionCall(scale=0.125)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, lse = attend(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), call)
    both = pattern_sums.row_and_column_sums(q, k, lse, call, entropy=True)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    torch.testing.assert_close(both.received.sum(), torch.tensor(4 * 32768.0, device="cuda"))


@pytest.mark.parametrize("length", [1, 2, 33, 64, 70, 200])
@pytest.mark.parametrize("sinks", [[0], [0, 3], [5]])
def test_angles(kernels, sinks: list[int], length: int, dtype: torch.dtype) -> None:
    """Ragged prompts over several blocks; the definitions in `metrics.geometry` are the oracle."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, length, h, 20, generator=generator) for h in (4, 2))
    query[0, length // 2, 1] = 0  # one that points nowhere
    query, key = query.to(DEVICE, dtype), key.to(DEVICE, dtype)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, max(1, length - 3) :] = False
    is_sink = torch.zeros_like(mask)
    is_sink[:, [position for position in sinks if position < length]] = True
    queries = positions.queries_after(is_sink, mask, causal=True)
    role = (is_sink & mask).int() + 2 * (mask & ~is_sink) + 4 * queries
    kinds = torch.stack([is_sink & mask, mask & ~is_sink], dim=1).float()
    seen = kinds.cumsum(dim=-1)
    seen[:, 1] -= kinds[:, 1]
    found = kernels.causal_angles(query, key, role.to(DEVICE), seen.to(DEVICE), 0.3)
    plain = query.cpu().float(), key.cpu().float()
    expected = geometry.sink_logit_decomposition(*plain, is_sink, mask, causal=True)
    gap = geometry.logit_gap_rows(*plain, 0.3, is_sink, mask, causal=True)
    for one, other in zip(found, [*expected, attention.sink_logit_gap(*gap)], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5, equal_nan=True)
