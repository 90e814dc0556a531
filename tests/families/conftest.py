"""Fixtures that run a test once for each architecture family."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from .architectures import BY_NAME, FAMILIES, Family, bridge_of
from .reference import reference


@pytest.fixture(params=[family.name for family in FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    """Every architecture family in turn."""
    return BY_NAME[request.param]


@cache
def _reference_of(name: str) -> dict[str, Tensor]:
    chosen = BY_NAME[name]
    return reference(chosen.build(), chosen.tokens(), parts=chosen.parts)


@pytest.fixture
def family_reference(family: Family) -> dict[str, Tensor]:
    """What transformers' eager forward computes on ``family.tokens()``; treat as read-only."""
    return _reference_of(family.name)


@pytest.fixture
def family_bridge(family: Family):
    """The family's tiny model as a bridge, shared by all tests: leave it as it was."""
    return bridge_of(family)
