"""Run a model under conditions, and see what every position receives and holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capabilities import capabilities
from sinkscope.capture.attention import AttentionReader
from sinkscope.capture.batches import Batch
from sinkscope.errors import TextError
from sinkscope.experiments import _measure, _result
from sinkscope.interventions import ReplaceEnd, ReplaceStart
from sinkscope.metrics.positions import masked_mean
from sinkscope.texts import Texts

STARTS = ("special", "random", "given")


@dataclass(frozen=True)
class Condition:
    """One panel of the paper's figures.

    Attributes:
        name: Its title, such as "special start · 255 designated".
        start: Of `STARTS`.
        change: What was done to the position; "unchanged" for the reference.
        texts: The prompts, with that start.
        enter: The intervention.
    """

    name: str
    start: str
    change: str
    texts: Texts
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext


def observe(
    model: Any, prompts: Texts, conditions: list[Condition], position: int, progress: bool = True
) -> dict[str, Any]:
    """Measure every condition: the tensors of `Conditions`, and what names its conditions.

    Args:
        model: A bridge.
        prompts: The prompts before any start token was put in.
        conditions: In the order of the panels.
        position: The position that is acted upon.
        progress: Whether to draw a progress bar.
    """
    found: list[dict[str, Tensor]] = []
    with tqdm(conditions, unit="condition", disable=not progress, leave=False) as bar:
        for condition in bar:
            with condition.enter():
                found.append(_observe(model, condition, position))
    stacked = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    own = all(condition.start == "given" for condition in conditions)
    return {
        "about": _result.about(model, prompts, None if own else "as each condition says"),
        "position": position,
        "starts": tuple(condition.start for condition in conditions),
        "changes": tuple(condition.change for condition in conditions),
        "names": tuple(condition.name for condition in conditions),
        "causal": capabilities(model).causal,
        **stacked,
    }


def _observe(model: Any, condition: Condition, position: int) -> dict[str, Tensor]:
    quantities = {
        "received_attention": _measure.RECEIVED,
        "value_norm": _measure.VALUE_NORM,
        "residual_norm": _measure.RESIDUAL_NORM,
        "ffn_output": _measure.Quantity("mlp_out", lambda x, _: x[:, [0, position]].float()),
        "ffn_mixed_max": _measure.FFN_MIXED_MAX,
        "paid": _measure.Quantity("attention", lambda x, batch: paid(x, batch, position)),
    }
    found = _measure.measure(model, condition.texts, quantities, [0, position])
    loss = _measure.losses(model, condition.texts)
    return found if loss is None else found | {"loss": loss}


def paid(x: AttentionReader, batch: Batch, position: int) -> Float[Tensor, "prompt head target"]:
    """Attention to 0 and to the position, from the queries that are after both."""
    index = torch.arange(batch.length, device=batch.mask.device)
    queries = batch.mask & (index != 0) & (index != position)
    if batch.causal:
        queries = queries & (index > position)
    targets = [x.on_keys(_only(batch.mask, key)) for key in (0, position)]
    return torch.stack([masked_mean(paid, queries[:, None], dim=-1) for paid in targets], dim=-1)


def _only(mask: Bool[Tensor, "prompt key"], key: int) -> Bool[Tensor, "prompt key"]:
    keys = torch.zeros_like(mask)
    keys[:, key] = True
    return keys


def started(
    model: Any, texts: Texts, starts: Iterable[str], ends: bool, seed: int
) -> dict[str, Texts]:
    """The prompts with each kind of start token, and of end token as well where `ends`.

    Raises:
        UnsupportedError: If a start is unknown, or none is named.
        TextError: If the model's tokenizer has no special token.
    """
    made: dict[str, Texts] = {}
    for start in _measure.chosen(starts, STARTS, "starts"):
        made[start] = texts
        if start != "given":
            made[start] = ReplaceStart(model, start, seed=seed)(made[start])
            if ends:
                made[start] = ReplaceEnd(model, start, seed=seed + 1)(made[start])
    return made


def designated(model: Any, texts: Any, position: int | None) -> tuple[Texts, int]:
    """The prompts, and the position to act upon: one with queries after it that predict a token.

    Raises:
        TextError: If prompts differ in length or hardly go beyond the position.
    """
    prompts = _measure.even(model, texts)
    position = default_position(prompts.tokens.shape[1], position)
    return _measure.even(model, prompts, position, after=1 + _measure.has_loss(model)), position


def default_position(length: int, position: int | None) -> int:
    """The paper's 255 where prompts are long enough, else two thirds of the way.

    Raises:
        TextError: If the position is the first one.
    """
    if position is None:
        return 255 if length > 272 else max(1, min(2 * length // 3, length - 3))
    if position < 1:
        raise TextError(
            f"Position {position} cannot be made a sink beside position 0; choose one from 1."
        )
    return position
