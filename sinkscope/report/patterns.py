"""Attention patterns of every head on a few prompts, small enough for a page."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """Downsampled attention patterns for a report's page, see `capture.patterns.head_patterns`.

    A pattern is divided into cells of adjacent queries and keys, and a cell's value is the largest
    attention within it, so that sinks keep their strength.

    Attributes:
        prompts: indices of the prompts in the report.
        first: first position of each row and column of cells; cells beyond the end of a shorter
            prompt are empty.
        cells: 255 times the largest attention of each cell, rounded.
        received: mean attention that each key receives from the queries that see it [probability];
            nan in the padding.
    """

    prompts: tuple[int, ...]
    first: Int[Tensor, "cell"]
    cells: UInt8[Tensor, "shown layer head cell_query cell_key"]
    received: Float[Tensor, "shown layer head position"]
