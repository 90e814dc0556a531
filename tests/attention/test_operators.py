"""Every attention operator against plain Python, and what all of them must share."""

from __future__ import annotations

import math

import pytest
import torch

from sinkscope.attention import operators as op
from sinkscope.bb.model import MASKED

ROW = [1.5, -0.7, 0.0, 3.2, -2.0]
HIDDEN = [False, True, False, False, True]


def scores() -> torch.Tensor:
    return torch.tensor([MASKED if hidden else s for s, hidden in zip(ROW, HIDDEN, strict=True)])


def seen() -> list[float]:
    return [s for s, hidden in zip(ROW, HIDDEN, strict=True) if not hidden]


def softmax(s: float) -> float:
    return math.exp(s) / sum(math.exp(t) for t in seen())


def with_extra(logit: float):
    return lambda s: math.exp(s) / (math.exp(logit) + sum(math.exp(t) for t in seen()))


def softpick(s: float) -> float:
    return max(math.exp(s) - 1, 0) / (sum(abs(math.exp(t) - 1) for t in seen()) + 1e-8)


CASES = {
    "softmax": (op.softmax, softmax),
    "relu": (op.relu, lambda s: max(s, 0) / 3),
    "sigmoid": (op.sigmoid, lambda s: 1 / (1 + math.exp(-(s - math.log(3))))),
    "softpick": (op.softpick, softpick),
    "off-by-one": (op.off_by_one, with_extra(0.0)),
    "extra": (
        lambda s, seen=None: op.softmax_with_extra_logit(s, torch.tensor([2.5]), seen),
        with_extra(2.5),
    ),
    "zero": (op.zero, lambda s: 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_its_formula(name):
    fast, slow = CASES[name]
    expected = [0.0 if hidden else slow(s) for s, hidden in zip(ROW, HIDDEN, strict=True)]
    torch.testing.assert_close(fast(scores()), torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "zero"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores_stay_finite_and_so_do_their_gradients(name, size):
    row = torch.tensor([size, size / 2, 0.0, MASKED], requires_grad=True)
    pattern = CASES[name][0](row)
    (gradient,) = torch.autograd.grad((pattern * torch.tensor([1.0, 2, 3, 4])).sum(), row)
    assert pattern.isfinite().all() and gradient.isfinite().all()
    assert pattern[3] == 0 and gradient[3] == 0


@pytest.mark.parametrize("name", CASES)
def test_hiding_a_key_equals_not_having_it(name):
    fast = CASES[name][0]
    whole, short = fast(scores()), fast(torch.tensor(seen()))
    torch.testing.assert_close(whole[[0, 2, 3]], short)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "softpick", "off-by-one", "extra"])
def test_a_row_without_a_visible_key_pays_nobody(name):
    """Rows of left pads; a plain softmax alone has to put its 1 somewhere."""
    assert CASES[name][0](torch.full((2, 5), MASKED)).tolist() == [[0.0] * 5] * 2


def test_the_extra_logit_takes_what_the_row_lacks():
    pattern = op.softmax_with_extra_logit(scores(), torch.tensor([2.5]))
    extra = math.exp(2.5) / (math.exp(2.5) + sum(math.exp(t) for t in seen()))
    assert 1 - pattern.sum().item() == pytest.approx(extra, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("hidden", [-torch.inf, MASKED, 7.0, torch.nan])
def test_a_mask_of_visible_keys_equals_masked_scores(name, hidden):
    """Whatever a hidden score holds; a row of left pads is zero, but for softmax."""
    visible = torch.tensor([[not h for h in HIDDEN], [False] * 5])
    given = torch.tensor([ROW, ROW]).masked_fill(~visible, hidden)
    pattern = CASES[name][0](given, visible)
    assert torch.equal(pattern[0], CASES[name][0](scores()))
    if name != "softmax":
        assert pattern[1].tolist() == [0.0] * 5


def test_named_operators_are_their_functions():
    assert set(op.OPERATORS) == {"softmax", "relu", "sigmoid", "off-by-one", "softpick"}
    for name, operator in op.OPERATORS.items():
        assert operator is CASES[name][0]
