"""Reductions in few launches, against the definitions one layer and one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from sinkscope.capture import reductions
from sinkscope.metrics import values


def test_all_layers_at_once() -> None:
    norm = torch.rand(3, 2, 4, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    sinks = torch.zeros_like(mask)
    sinks[0, 0], sinks[1, 2] = True, True
    found = reductions.all_layers(values.drain, norm, sinks, mask)
    assert found.shape == (3, 2, 4)
    for layer in range(3):
        for prompt, (sink, length) in enumerate([(0, 9), (2, 6)]):
            for head in range(4):
                row = norm[layer, prompt, head, :length].tolist()
                at_sink = row.pop(sink)
                expected = at_sink / (math.fsum(row) / len(row))
                assert float(found[layer, prompt, head]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("at_once", [2**26, 1])
def test_received_summary(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reductions, "COMPARED_AT_ONCE", at_once)
    mass = torch.rand(2, 3, 5) * 4
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    seen_by = torch.tensor([[5.0, 4, 3, 2, 1], [3, 2, 1, 0, 0]])
    uniform = torch.tensor([[0.5, 0.4, 0.3, 0.25, 0.2], [0.6, 0.4, 1 / 3, 0, 0]])
    per_query, per_uniform = (torch.where(mask, 1 / x, 0) for x in (seen_by, uniform))
    thresholds = torch.tensor([0.1, 0.5, 0.9])
    found = reductions.received_summary(mass, per_query, thresholds)
    for key in range(5):
        real = [p for p in range(2) if mask[p, key]]
        alpha = {(p, h): float(mass[p, h, key] / seen_by[p, key]) for p in real for h in range(3)}
        for h in range(3):
            total = math.fsum(alpha[p, h] for p in real)
            ratio = math.fsum(alpha[p, h] / float(uniform[p, key]) for p in real)
            assert float(found.importance[h, key]) == pytest.approx(total, rel=1e-5)
            assert float(found.over(per_uniform)[h, key]) == pytest.approx(ratio, rel=1e-5)
        for p in range(2):
            peak = math.fsum(alpha.get((p, h), 0) for h in range(3)) / 3
            assert float(found.peak[p, key]) == pytest.approx(peak, rel=1e-5)
        for t, threshold in enumerate(thresholds.tolist()):
            above = sum(a > threshold for a in alpha.values())
            assert float(found.above[t, key]) == above
