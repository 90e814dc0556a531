"""Weights that a checkpoint lacks are drawn the same way every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_weights(seed: int = 0) -> Iterator[None]:
    """Fixed random numbers on the CPU inside; the caller's sequence goes on untouched."""
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
