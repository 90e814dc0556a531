"""Small attention calls of every kind, and what they compute, by loops over single numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkscope.attention.call import AttentionCall


@dataclass(frozen=True)
class Case:
    """Inputs of one attention call, in the layout of hooks [prompt position head d_head]."""

    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall

    @property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
        """In the layout of attention functions [prompt head position d_head]."""
        q, k, v = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        return q, k, v, self.call

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Case:
        """The same numbers elsewhere."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        call = self.call
        moved = AttentionCall(
            scale=call.scale,
            softcap=call.softcap,
            window=call.window,
            causal=call.causal,
            learned_sink=move(call.learned_sink),
            mask=move(call.mask),
            offset=call.offset,
        )
        q, k, v = (x.to(device, dtype) for x in (self.query, self.key, self.value))
        return Case(q, k, v, moved)


PROMPTS, QUERIES, HEADS, KV_HEADS, WIDTH = 2, 11, 4, 2, 6


def padding(keys: int) -> Tensor:
    """One prompt padded on the left, one on the right."""
    mask = torch.ones(PROMPTS, keys, dtype=torch.bool)
    mask[0, :3], mask[1, -2:] = False, False
    return mask


def scattered(keys: int) -> Tensor:
    """A mask of its own for every query; each sees at least one key."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(PROMPTS, 1, QUERIES, keys, generator=generator) > 0.4
    mask[..., 0] = True
    return mask


KINDS: dict[str, dict] = {
    "causal": {},
    "cached": dict(past=5),
    "bidirectional": dict(causal=False),
    "window": dict(window=4),
    "window of a cache": dict(window=4, past=5),
    "window both ways": dict(window=3, causal=False),
    "softcap": dict(softcap=2.0),
    "softcap and window": dict(softcap=1.5, window=5),
    "learned sink": dict(learned_sink=True),
    "padding": dict(mask=padding),
    "bidirectional padding": dict(mask=padding, causal=False),
    "padding, window and sink": dict(mask=padding, window=6, learned_sink=True),
    "any mask": dict(mask=scattered, causal=False),
    "any bias": dict(mask=lambda keys: torch.where(scattered(keys), 0.7, -torch.inf), causal=False),
}


def case(kind: str, width: int = WIDTH, kv_heads: int = KV_HEADS, seed: int = 0) -> Case:
    """The inputs of one kind of call."""
    settings = dict(KINDS[kind])
    past = settings.pop("past", 0)
    keys = QUERIES + past
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "mask" in settings:
        settings["mask"] = settings["mask"](keys)
    if "learned_sink" in settings:
        settings["learned_sink"] = draw(HEADS)
    return Case(
        query=2 * draw(PROMPTS, QUERIES, HEADS, width),
        key=draw(PROMPTS, keys, kv_heads, width),
        value=draw(PROMPTS, keys, kv_heads, width),
        call=AttentionCall(scale=width**-0.5, offset=past, **settings),
    )


def loop_scores(case: Case) -> Tensor:
    """s_ij [prompt head query key] in float64, entry by entry; -inf where j is not visible to i."""
    q, k, call = case.query.double(), case.key.double(), case.call
    prompts, queries, heads, _ = q.shape
    scores = torch.full((prompts, heads, queries, k.shape[1]), -math.inf, dtype=torch.float64)
    for b in range(prompts):
        for h in range(heads):
            for i in range(queries):
                for j in range(k.shape[1]):
                    seen, bias = _allowed(call, b, h, i, j)
                    if not seen:
                        continue
                    group = heads // k.shape[2]
                    s = float(q[b, i, h] @ k[b, j, h // group]) * call.scale
                    if call.softcap is not None:
                        s = call.softcap * math.tanh(s / call.softcap)
                    scores[b, h, i, j] = s + bias
    return scores


def _allowed(call: AttentionCall, b: int, h: int, i: int, j: int) -> tuple[bool, float]:
    place = call.offset + i
    if call.causal and j > place:
        return False, 0.0
    if call.window is not None and abs(place - j) >= call.window:
        return False, 0.0
    if call.mask is None:
        return True, 0.0
    if call.mask.ndim == 2:
        return bool(call.mask[b, j]), 0.0
    entry = call.mask[b % call.mask.shape[0], h % call.mask.shape[1], i, j]
    if call.mask.dtype == torch.bool:
        return bool(entry), 0.0
    return float(entry) > -math.inf, float(entry)


def loop_pattern(case: Case) -> tuple[Tensor, Tensor]:
    """A_ij [prompt head query key] and lse_i [prompt head query] in float64, row by row."""
    scores = loop_scores(case)
    pattern, lse = torch.zeros_like(scores), scores.new_full(scores.shape[:3], -math.inf)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        row = [s for s in scores[b, h, i].tolist() if s > -math.inf]
        if case.call.learned_sink is not None:
            row.append(float(case.call.learned_sink[h]))
        if not row:
            continue
        lse[b, h, i] = math.log(math.fsum(math.exp(s) for s in row))
        pattern[b, h, i] = (scores[b, h, i] - lse[b, h, i]).exp()
    return pattern, lse
