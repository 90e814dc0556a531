"""Residual norms, peaks and massive activations against numpy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sinkscope.metrics import magnitude_median as selection
from sinkscope.metrics import residual
from sinkscope.metrics.magnitude_median import magnitude_median
from tests.metrics.cases import mean, same, tensor

nan = float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def hidden_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden state, mask, sinks: 3 prompts of 9 positions and 6 dims; pads hold nonsense."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(3, 9, 6))
    mask = np.ones((3, 9), dtype=bool)
    mask[0, 6:], mask[1, :2] = False, False
    sinks = np.zeros_like(mask)
    sinks[0, 0] = sinks[1, 2] = sinks[1, 5] = sinks[2, 4] = True
    hidden[sinks] *= 50
    hidden[~mask] = 1e4
    return hidden, mask, sinks


def test_norms_and_peaks() -> None:
    hidden, mask, sinks = hidden_case()
    norms = np.sqrt((hidden**2).sum(axis=-1))
    same(residual.residual_norms(tensor(hidden)), norms)
    args = tensor(norms), tensor(sinks), tensor(mask)
    for p in range(3):
        at = [norms[p, j] for j in range(9) if sinks[p, j]]
        others = [norms[p, j] for j in range(9) if mask[p, j] and not sinks[p, j]]
        same(residual.mean_at_sinks(*args)[p], mean(at))
        same(residual.median_of_others(*args)[p], np.median(others))
        same(residual.residual_peak(*args)[p], mean(at) / np.median(others))
        same(residual.excess_norm(*args)[p], mean(at) - mean(others))


def test_published_peak() -> None:
    """Llama-3.1-8B, layer 24: 496 at the first token; the paper's sentence has 8 others near 20."""
    norms = tensor([[496.0, 37, 20, 21, 19, 20, 22, 18, 20]])
    sinks, mask = tensor([[True] + [False] * 8]), torch.ones(1, 9, dtype=torch.bool)
    same(residual.residual_peak(norms, sinks, mask), [496 / 20])


def test_only_sinks_have_no_others() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    assert residual.residual_peak(torch.ones(1, 1), one, one).isnan().all()


def test_cosine_to_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, _, sinks = hidden_case()
    sinks[2] = False  # a prompt without a sink
    got = residual.cosine_to_sink(tensor(hidden), tensor(sinks))
    for p, first in ((0, 0), (1, 2)):
        for j in range(9):
            a, b = hidden[p, j], hidden[p, first]
            same(got[p, j], sum(a * b) / np.sqrt(sum(a * a) * sum(b * b)))
    assert got[2].isnan().all()
    whole = residual.position_chunks
    monkeypatch.setattr(residual, "position_chunks", lambda x: whole(x, elements=40))
    same(residual.cosine_to_sink(tensor(hidden), tensor(sinks)), got)


def test_sink_lifetime() -> None:
    cosine = tensor([[[1.0, 0.95, -0.95], [1.0, 0.2, -0.95], [1.0, 0.91, 0.89], [1.0, nan, 0]]])
    assert residual.sink_lifetime(cosine).tolist() == [[4, 2, 2]]


def test_perturbation_spread() -> None:
    a, b = hidden_case(0)[0], hidden_case(1)[0]
    expected = [
        [np.linalg.norm(x - y) for x, y in zip(p, q, strict=True)]
        for p, q in zip(a, b, strict=True)
    ]
    same(residual.perturbation_spread(tensor(a), tensor(b)), expected)


# --- the median of |x| -----------------------------------------------------------------------


def numpy_median(x: torch.Tensor, mask: torch.Tensor) -> list[float]:
    size = x.abs().double().numpy()
    return [np.median(size[p][mask[p].numpy()]) if mask[p].any() else nan for p in range(len(x))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (1, 7, 5), (2, 300, 513), (2, 1500, 300)])
def test_median_is_numpys(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(sum(shape))
    x = (torch.randn(shape) * torch.rand(shape[0], 1, 1) * 5).to(dtype)
    mask = torch.rand(shape[:2]) > 0.3
    mask[:, 0] = True
    same(magnitude_median(x, mask), numpy_median(x, mask), rtol=1e-7)


@settings(deadline=None, max_examples=80)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 4)),
        elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-42, -1e-42, 3e38, -7.0, 7.0]),
    ),
    st.integers(0, 31),
)
def test_median_with_ties_zeros_and_subnormals(x: np.ndarray, bits: int) -> None:
    mask = torch.tensor([[bool(bits >> j & 1) for j in range(x.shape[1])]] * len(x))
    same(magnitude_median(tensor(x), mask), numpy_median(tensor(x), mask), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_median_by_selection(dtype: torch.dtype) -> None:
    """What is left for devices other than a CPU and CUDA."""
    torch.manual_seed(0)
    for shape in [(1, 1, 1), (3, 2, 3), (2, 41, 10), (3, 40, 50)]:
        x, mask = torch.randn(shape).to(dtype), torch.rand(shape[:2]) > 0.4
        found = selection._by_selection(x, mask)
        same(found, numpy_median(x, mask), rtol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 4), (2, 300, 576), (4, 70, 5000)])
def test_median_on_the_gpu_is_numpys(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Ragged, every other dim of a wider tensor, ties and zeros among the entries."""
    torch.manual_seed(0)
    wide = torch.randn(*shape[:2], 2 * shape[2]) * torch.rand(shape[0], 1, 1)
    x = torch.where(torch.rand(wide.shape) < 0.1, 0, wide).to("cuda", dtype)[..., ::2]
    mask = torch.rand(shape[:2]) > 0.3
    same(magnitude_median(x, mask.cuda()).cpu(), numpy_median(x.cpu(), mask), rtol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_median_of_a_long_hidden_state_needs_little_memory(dtype: torch.dtype) -> None:
    x = torch.randn(1, 32768, 4096, device="cuda", dtype=dtype)
    mask = torch.ones(1, 32768, dtype=torch.bool, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = magnitude_median(x, mask)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < x.numel() * x.element_size() / 2
    same(got.cpu(), [np.median(x.abs().float().cpu().numpy())], rtol=1e-7)


# --- massive activations ---------------------------------------------------------------------


def massive_by_loops(hidden: np.ndarray, mask: np.ndarray, minimum: float, ratio: float) -> list:
    found = []
    for p in range(len(hidden)):
        median = np.median(np.abs(hidden[p][mask[p]]))
        for j in np.flatnonzero(mask[p]):
            for d in range(hidden.shape[2]):
                a = hidden[p, j, d]
                if abs(a) > minimum and abs(a) > ratio * median:
                    found.append((p, j, d, a, abs(a) / median))
    return found


@pytest.mark.parametrize(
    ("minimum", "ratio"), [(100.0, 1000.0), (100.0, 100.0), (10.0, 20.0), (1.0, 0.0), (60.0, 1.0)]
)
def test_massive_activations(minimum: float, ratio: float) -> None:
    hidden, mask, _ = hidden_case(4)
    hidden[0, 0, 3], hidden[2, 4, 1], hidden[2, 7, 5] = -5000, 640, 150
    got = residual.massive_activations(tensor(hidden), tensor(mask), minimum, ratio)
    expected = massive_by_loops(hidden, mask, minimum, ratio)
    assert expected
    columns = [got.prompt, got.position, got.dim, got.value, got.ratio]
    same(torch.stack([c.double() for c in columns], dim=1), expected)


def test_massive_rule_is_strict_and_needs_both_halves() -> None:
    """Median 0.1: 100 is not > 100; 101 is; with a median of 0.2 101 is not > 1000 × 0.2."""
    mask = torch.ones(1, 50, dtype=torch.bool)

    def found(size: float, value: float) -> int:
        hidden = torch.full((1, 50, 4), size, dtype=torch.float64)
        hidden[0, 0, 2] = value
        return len(residual.massive_activations(hidden, mask).prompt)

    assert [found(0.05, 100.0), found(0.05, -101.0), found(0.2, 101.0)] == [0, 1, 0]


def test_massive_rule_is_strict_next_to_a_larger_entry() -> None:
    hidden = torch.full((1, 50, 4), 0.05, dtype=torch.float64)
    hidden[0, 0, :3] = tensor([100.0, 200.0, -100.0])
    got = residual.massive_activations(hidden, torch.ones(1, 50, dtype=torch.bool))
    assert got.dim.tolist() == [1]


def test_every_prompt_has_its_own_median() -> None:
    """The same entry is massive in a quiet prompt and not in a loud one, in either order."""
    for quiet in (0, 1):
        hidden = torch.ones(2, 30, 5, dtype=torch.float64)
        hidden[quiet] *= 0.01
        hidden[:, 3, 2] = 150
        got = residual.massive_activations(hidden, torch.ones(2, 30, dtype=torch.bool))
        assert got.prompt.tolist() == [quiet]


@pytest.mark.parametrize("dtype", DTYPES)
def test_massive_activations_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(2, 40, 30) * 0.1).to(dtype)
    hidden[1, 0, 7] = -3000
    mask = torch.ones(2, 40, dtype=torch.bool)
    got = residual.massive_activations(hidden, mask)
    assert (got.prompt.item(), got.position.item(), got.dim.item()) == (1, 0, 7)
    assert got.value.item() == hidden[1, 0, 7].item()
    same(got.ratio, [abs(got.value.item()) / numpy_median(hidden, mask)[1]], rtol=1e-6)


def test_no_massive_activation_is_an_empty_list_of_the_right_kind() -> None:
    got = residual.massive_activations(torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    assert [len(column) for column in got] == [0] * 5
    assert got.value.dtype == got.ratio.dtype == torch.float32
    assert got.dim.dtype == torch.int64


def test_a_pad_is_never_massive() -> None:
    hidden, mask, _ = hidden_case()
    got = residual.massive_activations(tensor(hidden), tensor(mask), minimum=9e3, ratio=1.0)
    assert len(got.prompt) == 0


# --- tokens by their largest entries ---------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_topk_tokens(k: int) -> None:
    hidden, mask, _ = hidden_case(2)
    got = residual.topk_tokens(tensor(hidden), tensor(mask), k)
    for p in range(3):
        entries = [(abs(a), j) for j in np.flatnonzero(mask[p]) for a in hidden[p, j]]
        top = {int(j) for _, j in sorted(entries, reverse=True)[:k]}
        assert set(got[p].nonzero().flatten().tolist()) == top


def test_pivot_tokens_hold_the_largest_entries_of_a_state():
    from sinkscope.metrics.residual import pivot_tokens

    hidden = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    hidden[0, 4, :5] = torch.tensor([90.0, -80, 70, -60, 50])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    hidden[1, 7] = 1000  # padding
    for entries in (5, 20):
        found = pivot_tokens(hidden, mask, entries)
        for row in range(2):
            real = [(abs(float(x)), t) for t in range(9) if mask[row, t] for x in hidden[row, t]]
            want = {t for _, t in sorted(real, reverse=True)[:entries]}
            assert set(found[row].nonzero().flatten().tolist()) == want
    assert pivot_tokens(hidden, mask, 5)[0].nonzero().flatten().tolist() == [4]
    few = pivot_tokens(hidden[1:, :3], torch.tensor([[True, False, False]]))
    assert few.tolist() == [[True, False, False]]


def test_the_largest_activation_is_that_of_real_positions():
    hidden = torch.tensor([[[1.0, -3], [2, 0], [9, 9]], [[1, 1], [-7, 1], [0, 2]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert residual.largest_activation(hidden, mask).tolist() == [3, 7]


def test_kurtosis_goes_from_one_to_the_number_of_dims():
    mask = torch.ones(2, 5, dtype=torch.bool)
    even = torch.tensor([1.0, -1, 1, -1]).expand(1, 5, 4) * torch.arange(1, 6)[None, :, None]
    one = torch.tensor([0.0, 0, 3, 0]).expand(1, 5, 4)
    assert residual.kurtosis(torch.cat([even, one]), mask).tolist() == pytest.approx([1, 4])


def test_kurtosis_is_no_excess_and_leaves_pads_out():
    rand = torch.Generator().manual_seed(1)
    dims = torch.randn(1, 1, 200_000, generator=rand).double()
    alone = torch.ones(1, 1, dtype=torch.bool)
    assert float(residual.kurtosis(dims, alone)) == pytest.approx(3, abs=0.05), "a Gaussian has 3"
    padded = torch.cat([dims, 1e4 * torch.randn(1, 1, 200_000, generator=rand).double()], dim=1)
    shown = torch.tensor([[True, False]])
    torch.testing.assert_close(residual.kurtosis(padded, shown), residual.kurtosis(dims, alone))
