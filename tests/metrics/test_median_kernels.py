"""The median of |x| by Triton kernels, against numpy.

They need a GPU, or ``TRITON_INTERPRET=1`` and an installed Triton, which runs them on the CPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.metrics.cases import same
from tests.metrics.test_residual import numpy_median

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


def median(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    kernels = pytest.importorskip("sinkscope.metrics.kernels.median")
    return kernels.magnitude_median(x.to(DEVICE), mask.to(DEVICE)).cpu()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 4), (2, 30, 576), (4, 7, 5000)])
def test_median_is_numpys(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Ragged, every other dim of a wider tensor, ties and zeros; one prompt has no token at all."""
    torch.manual_seed(0)
    wide = torch.randn(*shape[:2], 2 * shape[2]) * torch.rand(shape[0], 1, 1)
    x = torch.where(torch.rand(wide.shape) < 0.1, 0, wide).to(dtype)[..., ::2]
    mask = torch.rand(shape[:2]) > 0.3
    mask[-1] = shape[0] == 1
    same(median(x, mask), numpy_median(x, mask), rtol=1e-6)


def test_middle_entries_that_differ_in_every_digit(dtype: torch.dtype) -> None:
    """Two ranks are followed apart from the first digit on, and from the last one on."""
    apart = [0.0, 1e-4, 3e4, 6e4]
    close = [1.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 2.0]
    x = torch.tensor([[apart], [close]]).to(dtype)
    mask = torch.ones(2, 1, dtype=torch.bool)
    same(median(x, mask), numpy_median(x, mask), rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 1024, 4096), (1, 32768, 4096), (100, 64, 2048)])
def test_large_hidden_states(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x[:, 0] *= 1000
    mask = torch.ones(shape[:2], dtype=torch.bool)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = median(x, mask)
    assert torch.cuda.max_memory_allocated() - before < 2**24
    expected = [np.median(row.abs().float().cpu().numpy()) for row in x]
    same(got, expected, rtol=1e-6)
