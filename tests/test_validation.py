"""Values at the public doors: taken as plain Python ones, or refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.errors import SinkscopeError, TextError
from sinkscope.validation import one_of, probability, real_number, seed, whole_number, whole_numbers

WHOLE = [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor([5])[0]]
NOT_WHOLE = [
    True, np.True_, np.array(True), torch.tensor(True), 5.0, "5", b"5", None, [5], (5,),
    np.array([5]), torch.tensor([5]), torch.tensor(5.0), float("nan"), 1j, object(), {}, -1, 2**63,
    10**6000, torch.empty((), dtype=torch.int64, device="meta"),
]  # fmt: skip


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_every_library_are_taken(value):
    assert whole_number("n", value) == 5 and type(whole_number("n", value)) is int
    assert seed(value) == 5
    assert whole_numbers("p", value) == (5,)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number_is_refused_in_one_line(value):
    with pytest.raises(TextError, match=r"^n is .*; expected a whole number from 0") as caught:
        whole_number("n", value, error=TextError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160
    with pytest.raises(SinkscopeError, match="^seed is"):
        seed(value)


def test_bounds():
    assert whole_number("n", 3, at_least=3, at_most=3) == 3
    for outside in (2, 4):
        with pytest.raises(SinkscopeError, match=f"n is {outside}; .* from 3 to 3"):
            whole_number("n", outside, at_least=3, at_most=3)
    assert real_number("x", 0, at_least=0) == 0.0
    with pytest.raises(SinkscopeError, match=r"x is 0; expected a finite number above 0\."):
        real_number("x", 0, above=0)


@pytest.mark.parametrize(
    "value",
    [[2, 1, 2], (2, 1), range(2, 0, -1), np.array([2, 1]), torch.tensor([2, 1]), iter([2, 1])],
    ids=lambda value: type(value).__name__,
)
def test_several_numbers_keep_their_order(value):
    assert whole_numbers("p", value) == (2, 1)


@pytest.mark.parametrize(
    "value",
    [[], "12", b"12", [True], [1.0], [None], ["1"], [[1]], np.zeros((2, 2), int), {"a": 1}, None,
     np.array([1.0]), torch.tensor([True]), [-1], [10], 3.0, object()],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_several_numbers_are_all_whole_and_in_bounds(value):
    with pytest.raises(SinkscopeError, match=r"p is .*whole numbers from 0 to 9"):
        whole_numbers("p", value, at_most=9)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5)], ids=repr
)
def test_probabilities_are_taken(value):
    assert probability("epsilon", value) == 0.5


@pytest.mark.parametrize(
    "value",
    [0, 1, 2, -0.1, float("nan"), float("inf"), True, "0.5", None, [0.5], 1j, 10**400,
     np.array([0.5]), torch.tensor([0.5])],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(SinkscopeError, match="^level is .*; expected a finite number above 0"):
        probability("level", value)


def test_one_of_a_few_words():
    assert one_of("side", "left", ("left", "right")) == "left"
    for wrong in ("up", None, 3, ["left"]):
        with pytest.raises(SinkscopeError, match="side is .*; expected one of left, right"):
            one_of("side", wrong, ("left", "right"))
