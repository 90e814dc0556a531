"""Bins for long axes, so that a figure of 32,768 positions opens without freezing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LONGEST = 1024
"""Number of bins of a line or of bars: about as many as fit on a screen."""
_KEPT = 50  # a kept position is one fiftieth of a map wide


class Bins(NamedTuple):
    """Runs of neighbouring positions, each drawn as one.

    Attributes:
        first: where each bin begins [bin].
        last: where it ends, that position included [bin].
    """

    first: np.ndarray
    last: np.ndarray

    @property
    def size(self) -> int:
        """Number of positions."""
        return int(self.last[-1]) + 1

    @property
    def binned(self) -> bool:
        """Whether any bin holds more than one position."""
        return len(self.first) < self.size

    def width(self) -> np.ndarray:
        """Positions in each bin [bin]."""
        return self.last - self.first + 1

    def maximum(self, values: np.ndarray, axis: int = -1) -> np.ndarray:
        """The largest value of each bin along an axis; nan only where there is nothing else."""
        return np.fmax.reduceat(values, self.first, axis=axis)

    def argmax(self, values: np.ndarray) -> np.ndarray:
        """Position of each bin's largest value, ignoring nan [... bin]."""
        filled = np.where(np.isnan(values), -np.inf, values)
        ends = zip(self.first, self.last + 1, strict=True)
        positions = [start + filled[..., start:end].argmax(axis=-1) for start, end in ends]
        return np.stack(positions, axis=-1)

    def edges(self) -> np.ndarray:
        """Edges of the bins on an axis of positions [bin + 1]."""
        return np.append(self.first, self.size) - 0.5

    def columns(self, keep: Sequence[int] = ()) -> np.ndarray:
        """Edges of the bins on a map that draws all of them equally wide [bin + 1].

        Drawn to scale, one position of hundreds would be thinner than a few pixels. The positions
        in `keep` take a fiftieth of the map each, so that a sink is visible on a phone too.
        """
        width = np.where(np.isin(self.first, keep), -(-len(self.first) // _KEPT), 1)
        return np.append(0, np.cumsum(width)) - 0.5

    def ticks(self, columns: np.ndarray) -> dict[str, Any]:
        """Ticks at round positions for an axis whose bins are at `columns`."""
        if np.array_equal(columns, self.edges()):
            return dict(dtick=1) if self.size <= 10 else {}
        round_numbers = (n * 10**power for power in itertools.count() for n in (1, 2, 5))
        step = next(number for number in round_numbers if self.size <= 10 * number)
        at = np.arange(0, self.size, step)
        middles = np.interp(at, self.edges(), columns)
        return dict(
            tickvals=middles.tolist(), ticktext=[f"{position:,}" for position in at.tolist()]
        )

    def names(self) -> list[str]:
        """Each bin in words: "position 3", "positions 64 to 71"."""
        return [
            f"position {first}" if first == last else f"positions {first} to {last}"
            for first, last in zip(self.first.tolist(), self.last.tolist(), strict=True)
        ]


def bins(size: int, longest: int = LONGEST, keep: Sequence[int] = ()) -> Bins:
    """Make about `longest` bins of equal width over `size` positions; single positions if they fit.

    The first sixteen positions and those in `keep` have bins of their own, so that a sink's
    position and height are exact.
    """
    if size <= longest:
        return Bins(np.arange(size), np.arange(size))
    single = np.unique([*range(16), *(k for k in keep if 0 <= k < size)])[: longest // 2]
    regular = np.linspace(0, size, max(2, longest - 2 * len(single)), endpoint=False).astype(int)
    first = np.unique(np.concatenate([regular, single, single + 1]))
    first = first[first < size]
    return Bins(first, np.append(first[1:], size) - 1)
