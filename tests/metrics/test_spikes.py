"""Alignment and retention on spikes whose answers are known, and against loops."""

from __future__ import annotations

import numpy as np
import torch

from sinkscope.metrics import spikes
from tests.metrics.cases import random_case, same, tensor


def values(*layers: float) -> torch.Tensor:
    """One prompt, and two positions of which the second is silent."""
    return torch.tensor([[[x, 0.5] for x in layers]])


def test_blocks_and_intervals_leave_out_neighbours_that_attend() -> None:
    assert spikes.blocks((3, 7)) == {3: range(0, 3), 7: range(4, 7)}
    assert spikes.blocks((0, 1, 4, 5)) == {4: range(2, 4)}
    assert spikes.blocks((0, 1, 2)) == {}
    assert spikes.intervals((3, 7)) == {(2, 6): [4, 5]}
    assert spikes.intervals((0, 1, 2, 5)) == {(1, 4): [3]}


def test_alignment_of_constructed_spikes() -> None:
    """Spikes at layers 2 and 6, before the attending layers 3 and 7."""
    sinks = torch.tensor([[0, 0]])
    spiked = values(1, 2, 90, 3, 1, 2, 80, 2)
    assert spikes.alignment(spiked, sinks, (3, 7)).tolist() == [[1, 1]]
    early = values(1, 90, 2, 3, 1, 2, 80, 2)
    assert spikes.alignment(early, sinks, (3, 7)).tolist() == [[0, 1]]
    # The second layer's sink is the other position, which is flat: a tie is the largest.
    assert spikes.alignment(early, torch.tensor([[0, 1]]), (3, 7)).tolist() == [[0, 1]]
    # The attending layer itself, 3, belongs to no block.
    assert spikes.alignment(values(1, 2, 5, 99, 1, 2, 80, 2), sinks, (3, 7)).tolist() == [[1, 1]]


def test_retention_of_constructed_spikes() -> None:
    """Between spikes of 80 and 40: layers of 10 and 30 keep a quarter and three quarters."""
    found = spikes.retention(values(1, 2, 80, 7, 10, 30, 40, 2)[..., 0], (3, 7))
    assert found.tolist() == [[0.5]]
    plateau = spikes.retention(values(1, 2, 80, 7, 95, 80, 40, 2)[..., 0], (3, 7))
    assert plateau.tolist() == [[1.0]]
    isolated = spikes.retention(values(1, 2, 80, 7, 0, 0, 40, 2)[..., 0], (3, 7))
    assert isolated.tolist() == [[0.0]]
    assert spikes.retention(values(1, 2, 0, 7, 1, 1, 40, 2)[..., 0], (3, 7)).isnan().all()
    assert spikes.retention(values(1, 2, 3)[..., 0], (2,)).shape == (1, 0)


def test_later_attention_by_loops() -> None:
    case = random_case(True, None)
    right = [p for p in case if case.mask[p, 0]]  # right-padded, as batches are
    pattern = np.nan_to_num(case.pattern, nan=7.0)  # rows of pads may hold anything
    want = np.full((len(right), case.length), np.nan)
    for row, p in enumerate(right):
        real = [i for i in range(case.length) if case.mask[p, i]]
        for k in real[:-1]:
            paid = [pattern[p, h, q, k] for h in case.heads for q in real if q > k]
            want[row, k] = np.mean(paid)
    got = spikes.later_attention(tensor(pattern[right]), torch.from_numpy(case.mask[right]))
    same(got, want, rtol=1e-9)
