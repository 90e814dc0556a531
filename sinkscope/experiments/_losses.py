"""Losses of prompts when some heads of each put out nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capture import batches
from sinkscope.experiments._partway import Hooks, Partway
from sinkscope.texts import Texts

_TOKENS = {"cuda": 2**16, "cpu": 2**12}
"""Tokens of one forward pass."""

Flags = Bool[Tensor, "prompt layer head"]


class PromptLosses:
    """The next-token loss of each prompt, again and again with other heads asleep.

    Args:
        partway: The model, opened.
        prompts: Right-padded.
        batch: Prompts at once; by default what fills the device.
    """

    def __init__(self, partway: Partway, prompts: Texts, batch: int | None = None) -> None:
        self._partway = partway
        self._tokens, self._mask = prompts.tokens, prompts.mask
        room = _TOKENS.get(partway.device.type, _TOKENS["cpu"]) // self._tokens.shape[1]
        self._batches = batches.by_length(self._mask).split(batch or max(1, room))

    def __call__(self, asleep: Flags | None = None) -> Float[Tensor, "prompt"]:
        """The loss of each prompt when these heads put out nothing, at any position."""
        found = torch.full((len(self._tokens),), torch.nan)
        partway = self._partway
        for rows in self._batches:
            length = int(self._mask[rows].sum(dim=1).max())
            tokens, mask = (x[rows, :length].to(partway.device) for x in (self._tokens, self._mask))
            hooks = [] if asleep is None else self._hooks(asleep[rows])
            final = partway.final(tokens, mask, hooks=hooks)
            found[rows] = partway.losses(tokens, mask, final).cpu()
        return found

    def _hooks(self, asleep: Flags) -> Hooks:
        def silence(layer: int) -> Callable[..., Tensor]:
            here = rearrange(asleep[:, layer], "prompt head -> prompt 1 head 1")
            return lambda z, hook: z.masked_fill(here.to(z.device), 0)

        layers = asleep.any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
        return [(self._partway.can.hook("z", layer), silence(layer)) for layer in layers]
