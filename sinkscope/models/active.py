"""Which interventions are in force on a model, for whoever measures it meanwhile.

A report names them, a metric may lose its meaning under one, and prompts have to reach the
positions that they change: a causal model is not told where a right-padded prompt ends, so that an
edit beyond its last token would be one of a pad, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from jaxtyping import Bool
from torch import Tensor

from sinkscope.errors import TextError

# --- Which hooks somebody has put on a model.


def hooked(model: Any) -> set[str]:
    """Names of the hook points with hooks on them, permanent ones (the model's own) left out.

    Every intervention shows here but one that edits weights (`PositionEmbeddingEdit`), which
    `provenance.model_identity` tells apart.
    """
    return {
        name
        for name, point in model.hook_dict.items()
        if any(not handle.is_permanent for handle in point.fwd_hooks)
    }


@runtime_checkable
class InForce(Protocol):
    """What has to be known of an intervention.

    Attributes:
        positions: Those that every prompt must have.
        softmax: Whether rows of attention stay a softmax's: weights that sum to one at most.
    """

    @property
    def positions(self) -> tuple[int, ...]:
        """See above."""
        ...

    @property
    def softmax(self) -> bool:
        """See above."""
        ...


_in_force: WeakKeyDictionary[Any, list[InForce]] = WeakKeyDictionary()


@contextmanager
def enforced(model: Any, intervention: InForce) -> Iterator[None]:
    """Inside, the intervention is in force on the model."""
    interventions = _in_force.setdefault(model, [])
    interventions.append(intervention)
    try:
        yield
    finally:
        interventions.remove(intervention)


def in_force(model: Any) -> tuple[InForce, ...]:
    """The interventions in force on a model, the outermost first."""
    return tuple(_in_force.get(model, ()))


def refuse_short_prompts(model: Any, mask: Bool[Tensor, "prompt position"]) -> None:
    """Refuse right-padded prompts that end before a position that an intervention changes.

    Raises:
        TextError: If one does.
    """
    needed = [position for one in in_force(model) for position in one.positions]
    farthest = max(needed, default=-1)
    if farthest >= 0 and farthest >= (shortest := int(mask.sum(dim=1).min())):
        raise TextError(
            f"An intervention changes position {farthest}, which lies outside the shortest prompt, "
            f"whose positions run from 0 to {shortest - 1}; use longer prompts or an earlier "
            "position."
        )
