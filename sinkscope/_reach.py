"""Which positions the interventions in force need every prompt to have.

A causal model is not told where a right-padded prompt ends, so that an edit beyond its last token
would be one of a pad, and nobody would notice. Whoever knows the prompts asks here before they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Bool
from torch import Tensor

from sinkscope.errors import TextError

_needed: WeakKeyDictionary[Any, list[tuple[int, ...]]] = WeakKeyDictionary()


@contextmanager
def needing(model: Any, positions: tuple[int, ...]) -> Iterator[None]:
    """Inside, every prompt that this model measures must have these positions."""
    needs = _needed.setdefault(model, [])
    needs.append(positions)
    try:
        yield
    finally:
        needs.remove(positions)


def refuse_short_prompts(model: Any, mask: Bool[Tensor, "prompt position"]) -> None:
    """Refuse right-padded prompts that end before a position that an intervention changes.

    Raises:
        TextError: If one does.
    """
    farthest = max(chain.from_iterable(_needed.get(model, ())), default=-1)
    if farthest >= 0 and farthest >= (shortest := int(mask.sum(dim=1).min())):
        raise TextError(
            f"An intervention changes position {farthest}, which lies outside the shortest prompt, "
            f"whose positions run from 0 to {shortest - 1}; use longer prompts or an earlier "
            "position."
        )
