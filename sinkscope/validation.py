"""Checks of the arguments of public functions.

Each function returns the value as a plain Python type (scalars of numpy and torch are accepted), or
raises an error that names the argument, what was given and what was expected. The checks rely on
duck typing, so that torch is not imported here.
"""

from __future__ import annotations

import math
import operator
import os
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sinkscope.errors import SinkscopeError

_LARGEST = 2**63 - 1  # the range of torch's seeds and int64 tensors


def whole_number(
    name: str,
    value: Any,
    *,
    at_least: int = 0,
    at_most: int = _LARGEST,
    error: type[SinkscopeError] = SinkscopeError,
) -> int:
    """Check that a value is a whole number within bounds; True, 1.0 and "1" are refused.

    Args:
        name: Name of the argument.
        value: Its value.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        error: Class of the error to raise.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    number = _whole(value)
    if number is None or not at_least <= number <= at_most:
        above = f" to {at_most}" if at_most < _LARGEST else ""
        raise error(
            f"{name} is {shown(value)}; expected a whole number from {at_least}{above}"
            f"{' (it is beyond 64 bits)' if number is not None and number > _LARGEST else ''}."
        )
    return number


def whole_numbers(
    name: str,
    value: Any,
    *,
    at_least: int = 0,
    at_most: int = _LARGEST,
    error: type[SinkscopeError] = SinkscopeError,
) -> tuple[int, ...]:
    """Check one or several whole numbers; return a tuple without duplicates, in the given order.

    Args:
        name: Name of the argument.
        value: A number, or any iterable of numbers: a list, a range, an array or a tensor.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        error: Class of the error to raise.

    Raises:
        SinkscopeError: If there are none, or one is not a whole number within the bounds.
    """
    alone = _whole(value) if getattr(value, "ndim", 0) == 0 else None
    many = isinstance(value, Iterable) and not isinstance(value, str | bytes) and _is_flat(value)
    numbers = (alone,) if alone is not None else tuple(map(_whole, value)) if many else ()
    if not numbers or any(one is None or not at_least <= one <= at_most for one in numbers):
        above = f" to {at_most}" if at_most < _LARGEST else ""
        raise error(
            f"{name} is {shown(value)}; expected whole numbers from {at_least}{above}, such as "
            f"{at_least} or [{at_least}, {min(at_least + 1, at_most)}]."
        )
    return tuple(dict.fromkeys(one for one in numbers if one is not None))


def real_number(
    name: str,
    value: Any,
    *,
    above: int | float = -math.inf,
    below: int | float = math.inf,
    at_least: int | float = -math.inf,
    at_most: int | float = math.inf,
    error: type[SinkscopeError] = SinkscopeError,
) -> float:
    """Check that a value is a finite number within bounds; nan, inf, True and "1" are refused.

    Args:
        name: Name of the argument.
        value: Its value.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        at_least: Smallest allowed value.
        at_most: Largest allowed value.
        error: Class of the error to raise.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    number = _real(value)
    if number is None or not (above < number < below and at_least <= number <= at_most):
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (
                ("above", above), ("from", at_least), ("to", at_most), ("below", below)
            )
            if math.isfinite(bound)
        ]  # fmt: skip
        expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise error(f"{name} is {shown(value)}; expected {expected}.")
    return number


def probability(name: str, value: Any, error: type[SinkscopeError] = SinkscopeError) -> float:
    """Check that a value is above 0 and below 1, such as an attention threshold or a level.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    return real_number(name, value, above=0, below=1, error=error)


def seed(value: Any, error: type[SinkscopeError] = SinkscopeError) -> int:
    """Check a seed: a whole number from 0, since −5 would give the same draws as 5.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    return whole_number("seed", value, error=error)


def one_of(
    name: str,
    value: Any,
    choices: Sequence[str],
    error: type[SinkscopeError] = SinkscopeError,
) -> str:
    """Check that a value is one of a few strings.

    Raises:
        SinkscopeError: If it is none of them; of class `error`.
    """
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} is {shown(value)}; expected one of {', '.join(choices)}.")
    return value


def text(name: str, value: Any, error: type[SinkscopeError] = SinkscopeError) -> str:
    """Check that a value is a string.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    if not isinstance(value, str):
        raise error(f"{name} is {shown(value)}; expected a string.")
    return value


def strings(
    name: str,
    value: Any,
    error: type[SinkscopeError] = SinkscopeError,
    expected: str = "a string or a list of strings",
) -> tuple[str, ...]:
    """Check one string or several; return a tuple without duplicates, in the given order.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    if isinstance(value, str):
        return (value,)
    try:
        several = tuple(value)
    except (TypeError, RuntimeError):  # RuntimeError: a 0-d tensor
        several = (value,)
    if not all(isinstance(one, str) for one in several):
        raise error(f"{name} is {shown(value)}; expected {expected}.")
    return tuple(dict.fromkeys(several))


def path(name: str, value: Any, error: type[SinkscopeError] = SinkscopeError) -> Path:
    """Check that a value is a path, given as a string or a path object.

    Raises:
        SinkscopeError: If it is anything else; of class `error`.
    """
    if isinstance(value, os.PathLike):
        value = value.__fspath__()
    if not isinstance(value, str) or not value or "\0" in value:
        raise error(f"{name} is {shown(value)}; expected the path of a file.")
    return Path(value)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON is what an annotation says.

    Lists stand for tuples, whole numbers for floats, and null for nan. What is annotated otherwise
    than with plain types, their containers and unions of these is taken as it is.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin is dict:
        whole = isinstance(value, dict)
        return whole and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        of_each = inner[:1] if origin is list or inner[1:] == (...,) else inner
        if not isinstance(value, list | tuple) or len(of_each) not in (1, len(value)):
            return False
        every = of_each * len(value) if len(of_each) == 1 else of_each
        return all(map(fits, value, every))
    if kind is float:
        return value is None or type(value) in (int, float)
    if kind in (str, int, bool, type(None)):
        return type(value) is kind
    return True


def shown(value: Any, longest: int = 60) -> str:
    """A value as text for a message: on one line, and truncated if it is long."""
    if getattr(value, "ndim", 0) or _too_long(value):
        return f"of the type {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _too_long(value: Any) -> bool:
    """Whether an integer has more digits than Python converts to text."""
    return isinstance(value, int) and value.bit_length() > 4096


def _is_flat(value: Any) -> bool:
    return getattr(value, "ndim", 1) == 1


def _whole(value: Any) -> int | None:
    """The value as an int, or None if it is not a whole number."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a meta tensor
        return None


def _real(value: Any) -> float | None:
    """The value as a finite float, or None if it is not a real number."""
    if isinstance(value, bool | str | bytes) or "bool" in str(getattr(value, "dtype", "")):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
