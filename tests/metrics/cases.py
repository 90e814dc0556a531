"""Random attention for the tests of `sinkscope.metrics`, built by plain loops over numpy arrays.

Nothing here imports sinkscope: these are the independent side of every comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# (causal, window): no window, a window shorter than every prompt, one longer than all of them.
REACHES = [(True, None), (True, 4), (True, 1), (True, 50), (False, None), (False, 3), (False, 50)]


def sees(mask: np.ndarray, i: int, j: int, causal: bool, window: int | None) -> bool:
    """Whether query i sees key j, from the words of the definition."""
    if not (mask[i] and mask[j]):
        return False
    if causal and j > i:
        return False
    return window is None or abs(i - j) < window


@dataclass
class Case:
    """One batch: 3 prompts (right-padded, left-padded, full), 4 heads, 2 KV heads, 11 positions."""

    causal: bool
    window: int | None
    mask: np.ndarray
    sinks: np.ndarray
    q: np.ndarray  # prompt position head d_head
    k: np.ndarray  # prompt position kv_head d_head
    v: np.ndarray  # prompt position kv_head d_head
    scale: float
    scores: np.ndarray  # prompt head query key; nonsense where not visible
    pattern: np.ndarray  # prompt head query key; nan in the rows of pads

    def __iter__(self):
        """Prompts."""
        return iter(range(len(self.mask)))

    @property
    def heads(self) -> range:
        return range(self.q.shape[2])

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def kv(self, head: int) -> int:
        return head // (self.q.shape[2] // self.k.shape[2])

    def keys(self, p: int, i: int) -> list[int]:
        return [j for j in range(self.length) if self.sees(p, i, j)]

    def sees(self, p: int, i: int, j: int) -> bool:
        return sees(self.mask[p], i, j, self.causal, self.window)

    def queries_after(self, p: int) -> list[int]:
        sinks = [j for j in range(self.length) if self.sinks[p, j]]
        if not sinks:
            return []
        return [
            i
            for i in range(self.length)
            if self.mask[p, i] and i not in sinks and (not self.causal or i > sinks[0])
        ]


def random_case(causal: bool, window: int | None, seed: int = 0, sinks: int = 2) -> Case:
    rng = np.random.default_rng(seed)
    prompts, length, heads, kv_heads, d_head = 3, 11, 4, 2, 5
    mask = np.ones((prompts, length), dtype=bool)
    mask[0, 8:] = False
    mask[1, :3] = False
    is_sink = np.zeros_like(mask)
    for p in range(prompts):
        real = np.flatnonzero(mask[p])
        is_sink[p, real[0]] = True
        is_sink[p, rng.choice(real[1:-2], sinks - 1, replace=False)] = True
    q = rng.normal(size=(prompts, length, heads, d_head)) * 2
    k = rng.normal(size=(prompts, length, kv_heads, d_head)) * 2
    v = rng.normal(size=(prompts, length, kv_heads, d_head))
    scale = d_head**-0.5
    scores = np.full((prompts, heads, length, length), -1e30)
    pattern = np.zeros_like(scores)
    case = Case(causal, window, mask, is_sink, q, k, v, scale, scores, pattern)
    for p in case:
        for h in case.heads:
            for i in range(length):
                if not mask[p, i]:
                    pattern[p, h, i] = np.nan
                    continue
                keys = case.keys(p, i)
                for j in keys:
                    scores[p, h, i, j] = scale * float(q[p, i, h] @ k[p, j, case.kv(h)])
                row = np.exp(scores[p, h, i, keys])
                pattern[p, h, i, keys] = row / row.sum()
    return case


def tensor(x) -> Tensor:
    """float64 stays float64: then only the formula is compared, and no rounding."""
    return torch.tensor(np.asarray(x))


def mean(numbers: list[float]) -> float:
    """The mean; nan of nothing."""
    return sum(numbers) / len(numbers) if numbers else float("nan")


def same(got: Tensor, expected, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal up to rounding, nan only where nan is due."""
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=rtol, atol=atol)
