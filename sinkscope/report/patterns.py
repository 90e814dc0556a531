"""Attention patterns of every head on a few prompts, small enough for a page."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """What `sinkscope.capture.patterns.head_patterns` keeps beside a report for its page.

    A pattern is cut into cells of neighbouring queries and keys, and a cell holds the largest
    attention within it, so that a sink stays as strong as it is.

    Attributes:
        prompts: which prompts of the report.
        first: position at which each row and column of cells begins; beyond a shorter prompt's end
            cells are empty.
        cells: 255 times the largest attention of each cell, rounded.
        received: mean attention that each key receives from the queries that see it [probability];
            nan in the padding.
    """

    prompts: tuple[int, ...]
    first: Int[Tensor, "cell"]
    cells: UInt8[Tensor, "shown layer head cell_query cell_key"]
    received: Float[Tensor, "shown layer head position"]
