"""Arguments of every kind: NumPy's and torch's whole numbers count, all else is a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions import ScaleActivation, ScaleValue, ShiftSinkLogit
from sinkscope.interventions.base import check_indices, check_layers, check_positions

from ..families.architectures import BY_NAME

THREE = [
    np.int64(3),
    torch.tensor(3),
    [3],
    (3,),
    np.array([3]),
    torch.tensor([3]),
    {3},
    range(3, 4),
]


@pytest.mark.parametrize("three", THREE, ids=lambda three: type(three).__name__)
def test_whole_numbers_of_any_kind_are_taken(three: Any) -> None:
    for found in (check_positions(three), check_layers(three, 4), check_indices(three, 4, "head")):
        assert found == (3,) and type(found[0]) is int


@pytest.mark.parametrize(
    "wrong", [True, 3.0, "3", [3.0], ["3"], [True], [None], object(), -1, [], 1j]
)
def test_what_is_no_whole_number_is_refused_in_a_sentence(wrong: Any) -> None:
    with pytest.raises(TextError, match="whole numbers from 0"):
        check_positions(wrong)
    for check in (lambda: check_layers(wrong, 4), lambda: check_indices(wrong, 4, "layer")):
        with pytest.raises(UnsupportedError, match="There is no layer"):
            check()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_refused_in_a_sentence(wrong: Any) -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    for make, name in (
        (lambda: ShiftSinkLogit(model, wrong), "shift"),
        (lambda: ScaleValue(model, wrong), "factor"),
        (lambda: ScaleActivation(model, 0, 0, wrong), "factor"),
        (lambda: ScaleActivation(model, 0, 0, norm=wrong), "norm"),
    ):
        with pytest.raises(UnsupportedError, match=f"{name} is .*; expected a finite number"):
            make()
