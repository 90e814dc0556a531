"""Deprecated names of the previous release, which keep working and warn with the new name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a name is deprecated.

    Args:
        old: The deprecated name.
        new: Its replacement.
        stacklevel: Stack level to which the warning is attributed.
    """
    warnings.warn(
        f"{old} is now {new}; the old name will go in the release after this one.",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def attribute(old: str, new: str) -> Any:
    """Return a property that serves as the old name of an attribute."""

    def get(self: Any) -> Any:
        warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    return property(get, doc=f"The old name of `{new}`.")


def argument(old: str, new: str) -> Callable[[F], F]:
    """Return a decorator that lets a function accept an argument by its old name."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if old in options:
                warn(f"{function.__name__}({old}=)", f"{new}=")
                options[new] = options.pop(old)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


def names(module: str, moved: dict[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` for names that have moved.

    Args:
        module: The module in which they were defined.
        moved: Maps an old name to its current module and name.
    """
    import importlib

    def get(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, new = moved[name]
        warn(f"{module}.{name}", f"{where}.{new}")
        return getattr(importlib.import_module(where), new)

    return get
