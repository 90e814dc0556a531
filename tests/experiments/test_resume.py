"""What is kept in a file or folder is never handed back as the figures of another model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import sinkscope as ss
from sinkscope.errors import ReportError
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.dormant import dormancy
from sinkscope.experiments.dynamics import dynamics
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.experiments.streaming_context import streaming_context
from sinkscope.interventions import (
    PositionEmbeddingEdit,
    PositionIdEdit,
    SelfOnlyMask,
    ShiftSinkLogit,
    ZeroValue,
)
from tests.families.architectures import BY_NAME

TOKENS = BY_NAME["llama"].tokens(prompts=3, length=16)
TEXTS = ss.token_ids(TOKENS)
KINDS = {"one": TEXTS, "two": ss.token_ids(TOKENS.flip(0))}

KEEPING: dict[str, Callable[[Any, Path], Any]] = {
    "removal": lambda m, at: ablate_heads(
        m, TEXTS, heads=[(1, 1)], file=at / "removal.nc", progress=False
    ),
    "sleep": lambda m, at: ablate_inactive(
        m, TEXTS, scores=["AWFT"], shares=[0.3], file=at / "sleep.nc", progress=False
    ),
    "streaming_context": lambda m, at: streaming_context(
        m,
        TEXTS,
        tokens=16,
        windows=[6],
        sinks=[1],
        designated=None,
        counted=["absolute"],
        file=at / "stream.nc",
        progress=False,
    ),
    "dormancy": lambda m, at: dormancy(m, KINDS, out=at, progress=False),
    "dynamics": lambda m, at: dynamics(None, {7: m}, TEXTS, out=at, progress=False),
}

IN_FORCE: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "a hook": lambda m: m.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: 2 * x)]),
    "SelfOnlyMask": lambda m: SelfOnlyMask(m, 5),
    "ShiftSinkLogit": lambda m: ShiftSinkLogit(m, -3.0, 0),
    "ZeroValue": lambda m: ZeroValue(m, 0),
    "PositionIdEdit": lambda m: PositionIdEdit(m, 9, 3),
}


@pytest.mark.parametrize("experiment", KEEPING)
def test_nothing_is_kept_or_taken_up_under_hooks(experiment: str, tmp_path) -> None:
    model, measure = ss.load_model(BY_NAME["llama"].build()), KEEPING[experiment]

    def refused_under_all() -> None:
        for what, enter in IN_FORCE.items():
            with enter(model), pytest.raises(ReportError, match="interventions are in force"):
                measure(model, tmp_path)
                pytest.fail(f"{what} was not noticed")

    refused_under_all()
    assert not list(tmp_path.iterdir())
    measure(model, tmp_path)
    files = set(tmp_path.iterdir())
    refused_under_all()
    measure(model, tmp_path)
    assert files and set(tmp_path.iterdir()) == files, "without hooks it goes on as before"


@pytest.mark.parametrize("experiment", KEEPING)
def test_weights_are_told_apart(experiment: str, tmp_path) -> None:
    """Another model of the same class, and a position that was given the vector of another."""
    measure = KEEPING[experiment]
    model = ss.load_model(BY_NAME["gpt2"].build())
    measure(model, tmp_path)
    with pytest.raises(ReportError, match="another model|another checkpoint"):
        measure(ss.load_model(BY_NAME["gpt2"].build(seed=1)), tmp_path)
    with PositionEmbeddingEdit(model, 0, 9):
        with pytest.raises(ReportError, match="another model|another checkpoint|in force"):
            measure(model, tmp_path)
    measure(ss.load_model(BY_NAME["gpt2"].build()), tmp_path)
