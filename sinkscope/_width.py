"""How wide text is: 100 columns in files and notebooks, what there is of them on a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_NARROWEST, _WIDEST = 80, 100  # a table of figures on fewer columns would lose digits
_width = ContextVar("width", default=_WIDEST)


def line_width() -> int:
    """Characters that a line of text may have."""
    return _width.get()


@contextmanager
def as_wide_as_the_terminal() -> Iterator[None]:
    """Inside, lines are as long as the terminal shows, 80 to 100 columns; 100 without one."""
    columns = shutil.get_terminal_size((_WIDEST, 24)).columns
    outside = _width.set(min(max(columns, _NARROWEST), _WIDEST))
    try:
        yield
    finally:
        _width.reset(outside)
