"""Weights of a batch against plain averages."""

from __future__ import annotations

import math

import pytest
import torch

from sinkscope.capture import batches


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_sink_averages(causal: bool, window: int | None) -> None:
    """Ragged; the sink of one prompt is not its first token, and one prompt has no sink at all."""
    lengths, sinks_at, length = [7, 5, 6], [0, 2, None], 7
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    sinks = torch.zeros_like(mask)
    for prompt, sink in enumerate(sinks_at):
        if sink is not None:
            sinks[prompt, sink] = True
    batch = batches.cut(
        torch.zeros(3, length, dtype=torch.long), mask, sinks, torch.arange(3),
        causal=causal, device=torch.device("cpu"),
    )  # fmt: skip
    paid = torch.rand(3, 1, length)
    found = batches.average(paid, batch.sink_averages(window, (1, 4)))[:, 0]
    for prompt, (n, sink) in enumerate(zip(lengths, sinks_at, strict=True)):
        if sink is None:
            assert found[prompt, [0, 2, 3, 4]].isnan().all()
            continue
        after = [i for i in range(n) if i != sink and (i > sink or not causal)]
        near = [i for i in range(n) if (i >= sink or not causal)]
        near = [i for i in near if window is None or abs(i - sink) < window]
        sets = [after, list(range(n)), near, [i for i in after if 1 <= i < 4]]
        sets.append([i for i in after if i >= 4])
        for column, queries in enumerate(sets):
            values = [float(paid[prompt, 0, i]) for i in queries]
            expected = math.fsum(values) / len(values) if values else math.nan
            got = float(found[prompt, column])
            assert got == pytest.approx(expected, rel=1e-5, nan_ok=True), (prompt, column)
