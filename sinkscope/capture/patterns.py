"""Attention patterns of every head on the first prompts of a report, for the report's page.

A scan stores no patterns, since their size is quadratic in length. `head_patterns` runs the model
once more on one or two prompts, on the eager path, and downsamples each pattern to cells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinkscope.metrics.attention import importance, received_mass
from sinkscope.models.capabilities import capabilities
from sinkscope.models.probe import input_device
from sinkscope.report.patterns import HeadPatterns
from sinkscope.report.report import SinkReport

_LONGEST = 1024  # positions; the eager path materialises the patterns of a layer
_BYTES = 900_000  # of all cells together
_MOST, _FEWEST = 64, 16  # cells along a side


def head_patterns(model: Any, report: SinkReport, prompts: int = 2) -> HeadPatterns | None:
    """The patterns of all heads on the report's first prompts, in cells.

    Args:
        model: The model of the report, under the same interventions.
        report: The report, whose tokens are run again.
        prompts: Number of prompts.

    Returns:
        The patterns; None for prompts longer than 1,024 positions, which need much memory on the
        eager path and are too large for a page.
    """
    shown = range(min(prompts, len(report.mask)))
    length = int(report.mask[: len(shown)].sum(dim=1).max())
    if length > _LONGEST:
        return None
    settings = report.settings
    heads = settings.n_layers * settings.n_heads
    side = int(math.sqrt(_BYTES / (heads * len(shown))))
    first = _cells(length, min(max(side, _FEWEST), _MOST))
    size = len(shown), settings.n_layers, settings.n_heads
    cells = torch.zeros(*size, len(first), len(first), dtype=torch.uint8)
    received = torch.full((*size, report.mask.shape[1]), torch.nan)
    caps = capabilities(model)
    windows = settings.windows or (None,) * settings.n_layers
    device = input_device(model)

    def keep(prompt: int, layer: int, real: int) -> Any:
        def hook(pattern: Tensor, hook: Any) -> None:
            whole = pattern[:1, :, :, :real].detach().float()
            mask = torch.ones(1, real, dtype=torch.bool, device=whole.device)
            mass = received_mass(whole, mask)
            score = importance(mass, mask, settings.causal, windows[layer])
            received[prompt, layer, :, :real] = score[0].cpu()
            starts = first[first < real]
            largest = _maxima(_maxima(whole[0], starts, dim=1), starts, dim=2)
            part = (255 * largest.clamp(0, 1)).round().to(torch.uint8).cpu()
            cells[prompt, layer, :, : len(starts), : len(starts)] = part

        return hook

    with torch.inference_mode():
        for prompt in shown:
            tokens = report.tokens[prompt][report.mask[prompt]]
            hooks = [
                (caps.hook("pattern", layer), keep(prompt, layer, len(tokens)))
                for layer in range(settings.n_layers)
            ]
            model.run_with_hooks(tokens[None].to(device), return_type=None, fwd_hooks=hooks)
    return HeadPatterns(tuple(shown), first, cells, received)


def _cells(length: int, side: int) -> Tensor:
    """First positions of at most `side` cells of about equal width."""
    return torch.linspace(0, length, min(side, length) + 1)[:-1].floor().to(torch.int64)


def _maxima(x: Tensor, first: Tensor, dim: int) -> Tensor:
    """The largest value of each cell along a dimension; cells begin at `first`."""
    ends = [*first.tolist()[1:], x.shape[dim]]
    pieces = x.split([end - start for start, end in zip(first.tolist(), ends, strict=True)], dim)
    return torch.stack([piece.amax(dim) for piece in pieces], dim)
