"""Attributes of instances that are overridden for a while, and restored."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Overrides:
    """Attributes put straight into instances' ``__dict__``, and taken out again in reverse.

    A bridge component forwards plain attribute assignment to the transformers module that it wraps,
    and nn.Module registers what is assigned; neither sees the ``__dict__``.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Shadow ``owner.name`` by ``value``."""
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def undo(self) -> None:
        """Put every attribute back as it was, the last one first."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
