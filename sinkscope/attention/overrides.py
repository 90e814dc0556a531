"""Temporary overrides of instance attributes."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Overrides:
    """Attributes written to instances' ``__dict__``, and restored in reverse order.

    Plain assignment would be forwarded by a bridge component to the wrapped transformers module, or
    registered by nn.Module; writing to the ``__dict__`` avoids both.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Shadow ``owner.name`` by ``value``."""
        self._saved.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def undo(self) -> None:
        """Restore every attribute, the last one first."""
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
