"""The run-time checks of shapes and types are there, on every kind of function."""

from __future__ import annotations

import ast
import dataclasses

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from sinkscope.metrics import values
from sinkscope.output import counted
from tests import checked
from tests.report.factory import synthetic_report

NORMS, REAL = torch.rand(2, 4, 5), torch.ones(2, 5, dtype=torch.bool)


def test_shapes_of_arguments_agree_with_each_other() -> None:
    assert values.drain(NORMS, REAL, REAL).shape == (2, 4)
    for norms, sinks in ((NORMS[0], REAL), (NORMS, REAL[:1]), (NORMS, REAL.float())):
        with pytest.raises(TypeCheckError, match="values.drain"):
            values.drain(norms, sinks, REAL)


def test_fields_of_a_dataclass_have_their_shapes() -> None:
    massive = synthetic_report().massive
    with pytest.raises(TypeCheckError, match="__init__"):
        dataclasses.replace(massive, value=massive.value[:, None])


def test_types_are_checked_where_there_are_no_shapes() -> None:
    assert counted(2, "head") == "2 heads"
    with pytest.raises(BeartypeCallHintViolation):
        counted("2", "head")


def test_a_function_inside_another_is_compiled_once_and_checked_each_time() -> None:
    def made(n: int):
        def inner(x: Float[Tensor, "row column"], n: int = n) -> Float[Tensor, "row"]:
            return x[0] if n else x[:, 0]

        return checked.checked_inside(inner)

    right, wrong = made(0), made(1)
    before = len(checked._compiled)
    assert right(torch.zeros(2, 3)).shape == (2,)
    assert made(0)(torch.zeros(4, 3)).shape == (4,)
    assert len(checked._compiled) == before
    with pytest.raises(TypeCheckError, match="return value"):
        wrong(torch.zeros(2, 3))
    with pytest.raises(TypeCheckError, match="parameters"):
        right(torch.zeros(2))


def test_what_is_compiled_from_its_source_is_left_as_it_is() -> None:
    module = ast.parse("@jit\n@no_type_check\ndef kernel(x, D: constexpr): ...\ndef f(x: int): ...")
    kernel, function = checked._Decorated().visit(module).body
    assert [ast.unparse(one) for one in kernel.decorator_list] == ["jit", "no_type_check"]
    assert [ast.unparse(one) for one in function.decorator_list] == ["_test_outer"]


def test_names_that_only_a_type_checker_knows_pass() -> None:
    hidden = tuple[int, "SinkReport"]

    def both(x: hidden, n: int) -> hidden:
        return x

    both.__annotations__["x"] = both.__annotations__["return"] = hidden
    function = checked.checked(both)
    assert function((1, 2), n=3) == (1, 2)
    with pytest.raises(BeartypeCallHintViolation):
        function((1, 2), n="3")
