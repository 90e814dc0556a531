"""Results of the waiver laboratory as experiments hand them over; synthetic, not measured."""

from __future__ import annotations

import torch

P = 3
CHANGES = ("unchanged", "first replaced", "last replaced")


def conditions(kind: type, changes: tuple[str, ...], title: str = "{}"):
    """Two starts and some changes; position p of condition c has the norm 10 c + p."""
    starts = tuple(start for start in ("special", "random") for _ in changes)
    changes = changes * 2
    shape = len(starts), 2, 4, 6  # condition, prompt, layer, position
    norm = 10 * torch.arange(shape[0])[:, None, None, None] + torch.arange(6.0) + 1
    return kind(
        about="synthetic",
        position=P,
        starts=starts,
        changes=changes,
        names=tuple(title.format(f"{s}: {c}") for s, c in zip(starts, changes, strict=True)),
        causal=True,
        received_attention=torch.full(shape, 0.1),
        value_norm=torch.ones(shape),
        residual_norm=norm.expand(shape).clone(),
        paid=torch.full((*shape[:3], 2, 2), 0.1),
        ffn_output=torch.ones(*shape[:3], 2, 5),
        ffn_mixed_max=torch.ones(*shape[:3], 5),
    )
