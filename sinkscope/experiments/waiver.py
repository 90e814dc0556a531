"""Measure the waiver phenomenon on any model.

Yan et al. 2024, "Unveiling and Controlling Anomalous Attention Distribution in Transformers" (arXiv
2407.01601): an element can waive its own contribution (small values) and absorb the attention that
heads do not need. Which token does so depends on what distinguishes it: that it attends only to
itself, or its position vector. One function for each of the paper's questions:

========================= ============================================================= =======
`nonmixture`              which FFN-output dims mark a token that attends only to itself  Fig. 1
`position_norms`          whether the first position's vector stands out                 Fig. 2
`structured_mask`         whether a token that attends only to itself becomes a sink     Fig. 3
`position_embeddings`     whether another position's vector makes a sink                 Fig. 4
`which_part`              which layers, dims or norms are needed for that                ours
========================= ============================================================= =======

This module has the experiments on position vectors and the mask; `nonmixture` and `which_part` have
their own modules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.experiments import conditions
from sinkscope.experiments.conditions import Condition, Conditions
from sinkscope.experiments.nonmixture import NonMixture, nonmixture
from sinkscope.experiments.result import Result, tidy
from sinkscope.experiments.which_part import WhichPart, which_part
from sinkscope.interventions import PositionEmbeddingEdit, PositionIdEdit, SelfOnlyMask
from sinkscope.interventions.base import check_mode
from sinkscope.interventions.positions import position_table
from sinkscope.metrics.positions import position_embedding_norm
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source
from sinkscope.output import number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "Designation",
    "NonMixture",
    "PositionEdit",
    "PositionNorms",
    "WhichPart",
    "nonmixture",
    "position_embeddings",
    "position_norms",
    "structured_mask",
    "which_part",
]


CHANGES = ("first replaced", "last replaced", "first swapped", "last swapped")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PositionNorms(Result):
    """Norms of a model's learned position vectors.

    Attributes:
        norm: ‖p_t‖ of every position [activation].
    """

    QUESTION = "Does the first position's vector stand out?"

    norm: Float[Tensor, "position"]

    def statistics(self) -> dict[str, Any]:
        """The first norm, the last, the largest, and the distribution of all but the first."""
        others = self.norm[1:]
        median = float(others.quantile(0.5))
        return {
            "first": float(self.norm[0]),
            "last": float(self.norm[-1]),
            "largest": float(self.norm.max()),
            "largest_at": int(self.norm.argmax()),
            "median_of_others": median,
            "largest_of_others": float(others.max()),
            "largest_of_others_at": int(others.argmax()) + 1,
            "first_over_median": float(self.norm[0]) / median,
            "deviations": float((self.norm[0] - others.mean()) / others.std()),
        }

    def summary(self) -> str:
        """Whether the first vector stands out."""
        facts = self.statistics()
        first = (
            f"position 0, {number(facts['first'])}: {number(facts['first_over_median'])} times "
            f"the median of the others, {number(facts['deviations'])} of their standard "
            "deviations from their mean"
        )
        second = f"position {facts['largest_of_others_at']}, {number(facts['largest_of_others'])}"
        if facts["largest_of_others_at"] == len(self.norm) - 1:
            second += ", the last one"
        if facts["largest_at"] == 0:
            return (
                f"The longest of {len(self.norm)} position vectors is that of {first}. The longest "
                f"of the others is that of {second}."
            )
        return (
            f"The longest of {len(self.norm)} position vectors is not the first but that of "
            f"{second}. That of {first}."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per position: position, metric ("norm") and value."""
        return tidy({"position": range(len(self.norm))}, metric="norm", value=self.norm)

    def figures(self) -> dict[str, go.Figure]:
        """Norm by position, in the shape of the paper's figure 2."""
        from sinkscope.plot import position_embedding_norms

        return {"norms": position_embedding_norms(self.norm, about=self.about)}


def position_norms(model: Any) -> PositionNorms:
    """L2 norm ‖p_t‖ of every learned position vector (Yan et al. 2024, 2407.01601, Fig. 2).

    Args:
        model: A bridge, or anything that `load_model` takes.

    Returns:
        The norms by position.

    Raises:
        UnsupportedError: If the model has no learned position vectors.
    """
    model = load_model(model)
    caps = capabilities(model)
    if caps.positions != "learned":
        raise UnsupportedError(
            f"{caps.architecture} has no learned position vectors; its positions are "
            f"{caps.positions}."
        )
    table, first = position_table(model)
    norm = position_embedding_norm(table.detach()[first:]).cpu()
    return PositionNorms(about=model_source(model).name, norm=norm)


class PositionEdit(Conditions):
    """The effect of another position's vector; conditions are {start and end} × {changes}."""

    QUESTION = "Does another position's vector make a sink?"


def position_embeddings(
    model: Any,
    texts: Any,
    position: int | None = None,
    *,
    starts: Iterable[str] = ("special", "random"),
    changes: Iterable[str] = CHANGES,
    seed: int = 0,
    progress: bool = True,
) -> PositionEdit:
    """Give a position the first or the last position's vector (Yan et al. 2024, Fig. 4).

    Whether the paper replaced or swapped is not public; both are offered. On rotary models the
    position id is changed instead: "first" rotates the token as at position 0, "last" as at the
    last position of the prompt.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length that go beyond `position`.
        position: The position; 255 by default, or two thirds of the way along short prompts.
        starts: Of "special", "random" (start and end tokens both) and "given".
        changes: Of `CHANGES`; the unchanged model always comes first.
        seed: Seed of the random tokens.
        progress: Whether to draw a progress bar.

    Returns:
        Attention, norms and FFN outputs of every position, condition by condition.

    Raises:
        UnsupportedError: If positions are neither learned nor rotary.
        TextError: If prompts differ in length or end before the position.
    """
    model = load_model(model)
    prompts, position = conditions.designated(model, texts, position)
    length = prompts.tokens.shape[1]
    edits = {
        change: _edit(model, check_mode(change, CHANGES), position, length) for change in changes
    }
    cases = []
    for start, with_start in conditions.started(model, prompts, starts, True, seed).items():
        title = f"{start} start and end · {position}"
        cases.append(Condition(f"{title} unchanged", start, "unchanged", with_start))
        for change, enter in edits.items():
            cases.append(Condition(f"{title}: {change}", start, change, with_start, enter))
    return PositionEdit(**conditions.observe(model, prompts, cases, position, progress))


def check_positions(caps: Capabilities) -> None:
    """Refuse a model whose positions `position_embeddings` cannot exchange.

    Args:
        caps: Its capabilities.

    Raises:
        UnsupportedError: If positions are neither learned nor rotary.
    """
    if caps.positions not in ("learned", "rotary"):
        raise UnsupportedError(
            f"{caps.architecture} has {caps.positions} positions; only learned and rotary ones can "
            "be exchanged."
        )


def _edit(model: Any, change: str, position: int, length: int) -> Any:
    """Return a function that makes the intervention of a change."""
    which, how = change.split()
    mode = {"replaced": "replace", "swapped": "swap"}[how]
    if capabilities(model).positions == "learned":
        source = {"first": 0, "last": -1}[which]
        make = functools.partial(PositionEmbeddingEdit, model, source, position, mode)
    else:
        source = {"first": 0, "last": length - 1}[which]
        make = functools.partial(PositionIdEdit, model, source, position, mode)
    make()  # raise errors before the long computation
    return make


class Designation(Conditions):
    """The effect of designating a position; conditions are {start} × {unchanged, designated}."""

    QUESTION = "Does a token become the sink when it attends only to itself?"


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
    """Designate a position as the waiver element by a self-only mask (Yan et al. 2024, Fig. 3).

    Every prompt runs with a special and with a random start token, unchanged and with `position`
    attending only to itself. The paper's mask is not public; a self-only row is our reading of it,
    and what Li et al. (2605.06611) find to make a sink.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length that go beyond `position`.
        position: The position; 255 by default, or two thirds of the way along short prompts.
        starts: Of "special", "random" and "given" (the prompts as they are).
        layers: Layers in which the mask applies; all by default.
        seed: Seed of the random tokens.
        progress: Whether to draw a progress bar.

    Returns:
        Attention, norms and FFN outputs of every position, condition by condition.

    Returns:
        Attention, norms and FFN outputs of every position, condition by condition.

    Raises:
        TextError: If prompts differ in length or end before the position.
    """
    model = load_model(model)
    prompts, position = conditions.designated(model, texts, position)
    masked = functools.partial(SelfOnlyMask, model, position, layers=layers)
    cases = []
    for start, with_start in conditions.started(model, prompts, starts, False, seed).items():
        cases.append(
            Condition(f"{start} start · {position} unchanged", start, "unchanged", with_start)
        )
        cases.append(
            Condition(
                f"{start} start · {position} designated",
                start,
                "designated",
                with_start,
                masked,
            )
        )
    return Designation(**conditions.observe(model, prompts, cases, position, progress))
