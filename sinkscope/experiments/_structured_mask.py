"""The structured mask: let one element mix nothing, and see whether it becomes the sink."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from sinkscope.experiments import _observe
from sinkscope.experiments._conditions import Conditions
from sinkscope.experiments._observe import Condition
from sinkscope.interventions import SelfOnlyMask
from sinkscope.models import load_model


class Designation(Conditions):
    """What designating a position does; conditions are {start} × {unchanged, designated}."""

    QUESTION = "Does an element become the sink when it mixes nothing?"


def structured_mask(
    model: Any,
    texts: Any,
    position: int | None = None,
    *,
    starts: Iterable[str] = ("special", "random"),
    layers: Iterable[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Designation:
    """Designate a position as the waiver element by a self-only mask (Yan et al., Fig. 3).

    Every prompt runs with a special and with a random start token, as it is and with `position`
    seeing itself alone. The paper's mask is not public; a self-only row is our reading of it, and
    what Li et al. (2605.06611) found to make a sink.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length that go beyond `position`.
        position: Which element; 255 by default, or two thirds of the way in short prompts.
        starts: Of "special", "random" and "given" (the prompts as they are).
        layers: Where the mask holds; all by default.
        seed: Of the random tokens.
        progress: Whether to draw a progress bar.

    Raises:
        TextError: If prompts differ in length or end before the position.
    """
    model = load_model(model)
    prompts, position = _observe.designated(model, texts, position)
    masked = functools.partial(SelfOnlyMask, model, position, layers=layers)
    conditions = []
    for start, with_start in _observe.started(model, prompts, starts, False, seed).items():
        conditions.append(
            Condition(f"{start} start · {position} unchanged", start, "unchanged", with_start)
        )
        conditions.append(
            Condition(
                f"{start} start · {position} designated",
                start,
                "designated",
                with_start,
                masked,
            )
        )
    return Designation(**_observe.observe(model, prompts, conditions, position, progress))
