"""Kernels that read vectors once, against the definitions they stand for.

They need a GPU, or ``TRITON_INTERPRET=1`` and an installed Triton, which runs them on the CPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture
def kernels():
    if INTERPRETED:
        pytest.importorskip("triton")
    from sinkscope.metrics.kernels import tokens

    return tokens


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


@pytest.mark.parametrize("width", [16, 20, 64, 128])
@pytest.mark.parametrize("length", [1, 65])
def test_norms_through_the_output_projection(kernels, width, length, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 2, width, generator=generator).to(DEVICE, dtype)
    w_o = torch.randn(4, width, 3 * width, generator=generator)
    gram = (w_o.double() @ w_o.double().mT).float().to(DEVICE)
    wide = x.cpu().double().numpy().repeat(2, axis=2)
    expected = np.linalg.norm(np.einsum("pthd,hdm->phtm", wide, w_o.double().numpy()), axis=-1)
    found = kernels.norms_through(x, gram).cpu().double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("width", [24, 1500])
@pytest.mark.parametrize("length", [1, 7])
def test_token_summary(kernels, width, length, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, length, width, generator=generator).to(DEVICE, dtype)
    first = torch.tensor([0, min(4, length - 1), length], device=DEVICE)
    norm, peak, cosine = (x.cpu().double().numpy() for x in kernels.token_summary(hidden, first))
    x = hidden.cpu().double().numpy()
    sizes = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm, sizes, rtol=1e-5)
    np.testing.assert_array_equal(peak, np.abs(x).max(axis=-1))
    for prompt, sink in enumerate(first.tolist()[:2]):
        along = x[prompt] @ x[prompt, sink] / sizes[prompt] / sizes[prompt, sink]
        np.testing.assert_allclose(cosine[prompt], along, rtol=1e-4, atol=1e-5)
    assert np.isnan(cosine[2]).all()


def test_a_state_that_is_not_finite_shows(kernels) -> None:
    hidden = torch.ones(1, 3, 40, device=DEVICE)
    hidden[0, 1, 5], hidden[0, 2, 7] = torch.nan, torch.inf
    norm, _, _ = kernels.token_summary(hidden, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert torch.isfinite(norm[0]).tolist() == [True, False, False]
