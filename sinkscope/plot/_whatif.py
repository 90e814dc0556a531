"""The interventions that the explorer offers, each with what it needs to know."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple


class Where(NamedTuple):
    """What is chosen in the explorer when an intervention is asked for."""

    position: int
    layer: int
    head: int


Make = Callable[[Any, Where], AbstractContextManager[Any]]


def _self_only(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import SelfOnlyMask

    return SelfOnlyMask(model, at.position)


def _zero_value(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import ZeroValue

    return ZeroValue(model, at.position)


def _weaker_sink(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import ShiftSinkLogit

    return ShiftSinkLogit(model, -5.0, at.position)


def _first_embedding(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import PositionEmbeddingEdit

    return PositionEmbeddingEdit(model, 0, at.position)


def _without_head(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import AblateHeads

    return AblateHeads(model, [(at.layer, at.head)])


def _without_ffn(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import RemoveOutput

    return RemoveOutput(model, at.layer, "mlp", at.position)


INTERVENTIONS: dict[str, Make] = {
    "Self-only mask at the position": _self_only,
    "Zero the value at the position": _zero_value,
    "Sink logit at the position, less 5": _weaker_sink,
    "First position's embedding at the position": _first_embedding,
    "Remove the chosen head": _without_head,
    "Remove the chosen layer's FFN output at the position": _without_ffn,
}
"""By the name in the explorer's list; each raises a sentence where the model does not allow it."""
