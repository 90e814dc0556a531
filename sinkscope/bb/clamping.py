"""Clamp one of two coupled quantities while the other trains: tests of mutual reinforcement.

Guo et al. (2024, arXiv 2410.13835) explain the sink by two processes that reinforce each other:
attention to BOS rewards a small value at BOS, and a small value at BOS makes attention there
harmless. Clamping one of the two at its initial state tests whether the other still develops.

`values`: the value vector of BOS stays that of the starting model, in every layer. It cannot drain:
does the logit gap still grow? `logits`: all attention scores stay those that the starting model
computes. No sink can form: does
    the value still shrink?
`sink`: non-trigger queries attend to BOS alone. Does the value shrink at once?
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.bb.model import BackcopyTransformer, Tap, recorder
from sinkscope.bb.task import BigramBackcopy


class Clamp:
    """Builds, for each batch, the tap that replaces the clamped quantities.

    Args:
        names: Some of `sinkscope.bb.config.CLAMPS`.
        start: The model whose values and logits are kept; it is copied.
        task: Defines which queries are triggers.
    """

    def __init__(
        self, names: tuple[str, ...], start: BackcopyTransformer, task: BigramBackcopy
    ) -> None:
        self.names = names
        self.task = task
        self.start = copy.deepcopy(start).requires_grad_(False)

    def tap(self, tokens: Int[Tensor, "prompt position"]) -> Tap:
        """Return the tap for one batch of inputs."""
        with torch.no_grad():
            kept, record = recorder("hook_attn_scores", "hook_v")
            if "values" in self.names or "logits" in self.names:
                self.start(tokens, tap=record)
        others = ~self.task.is_trigger.to(tokens.device)[tokens][:, None, :, None]

        def clamp(name: str, value: Tensor) -> Tensor:
            if name.endswith("hook_v") and "values" in self.names:
                return torch.cat([kept[name][:, :1].to(value.dtype), value[:, 1:]], dim=1)
            if name.endswith("hook_attn_scores") and "logits" in self.names:
                return kept[name]
            if name.endswith("hook_pattern") and "sink" in self.names:
                on_sink = torch.zeros_like(value)
                on_sink[..., 0] = 1.0
                return torch.where(others, on_sink, value)
            return value

        return clamp
