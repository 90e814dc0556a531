"""Another operator in the place of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.attention import streaming
from sinkscope.attention.support import kind_of
from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import HookedIntervention, Hooks, check_layers, check_mode

Operator = Callable[
    [Float[Tensor, "prompt head query key"], Bool[Tensor, "prompt head query key"]],
    Float[Tensor, "prompt head query key"],
]
"""From scores, and which of them count, to attention weights."""


def sigmoid(
    scores: Float[Tensor, "prompt head query key"], seen: Bool[Tensor, "prompt head query key"]
) -> Float[Tensor, "prompt head query key"]:
    """σ(s_ij − ln n_i), with n_i the keys that query i sees: near 1/n_i each where s is 0."""
    return torch.sigmoid(scores.masked_fill(~seen, 0) - _number(seen).log()) * seen


def relu(
    scores: Float[Tensor, "prompt head query key"], seen: Bool[Tensor, "prompt head query key"]
) -> Float[Tensor, "prompt head query key"]:
    """ReLU(s_ij) / n_i, with n_i the keys that query i sees (Guo et al. 2410.13835)."""
    return torch.relu(scores.masked_fill(~seen, 0)) / _number(seen)


def off_by_one(
    scores: Float[Tensor, "prompt head query key"], seen: Bool[Tensor, "prompt head query key"]
) -> Float[Tensor, "prompt head query key"]:
    """e^{s_ij} / (1 + Σ_j e^{s_ij}): a query may pay nobody (Xiao et al. 2309.17453, §3.3)."""
    scores = scores.masked_fill(~seen, -math.inf)
    zero = scores.new_zeros(*scores.shape[:-1], 1)
    return torch.cat([scores, zero], dim=-1).softmax(-1)[..., :-1]


def _number(
    seen: Bool[Tensor, "prompt head query key"],
) -> Int[Tensor, "prompt head query 1"]:
    """Keys that each query sees, or 1 where a pad sees none: nothing over nothing is nothing."""
    return seen.sum(-1, keepdim=True).clamp(min=1)


OPERATORS: dict[str, Operator] = {"sigmoid": sigmoid, "relu": relu, "off_by_one": off_by_one}


class ReplaceSoftmax(HookedIntervention):
    """Turns scores into attention weights by another operator.

    The pattern is materialised in the layers concerned, and a scan inside reads it there, on either
    path. No log-sum-exp says what they attend to: whoever hooks ``hook_lse`` is refused.

    Args:
        model: A bridge whose scores and pattern are really used (not stock BERT or OPT).
        operator: "sigmoid", "relu", "off_by_one", or a function of scores and visibility, both
            [prompt head query key].
        layers: Where; None for all.

    Raises:
        UnsupportedError: If the model has learned sinks (which only a softmax shares with); when
            it runs, if its attention ignores an edited pattern, or a log-sum-exp is read.
    """

    def __init__(
        self, model: Any, operator: str | Operator, layers: int | Iterable[int] | None = None
    ) -> None:
        super().__init__(model)
        if isinstance(operator, str):
            operator = OPERATORS[check_mode(operator, tuple(OPERATORS))]
        if self.can.learned_sinks:
            raise UnsupportedError(
                f"{self.can.architecture} has learned sinks, which share a softmax with the keys; "
                "no other operator says how."
            )
        self.operator = operator
        self.softmax = operator is off_by_one
        self.layers = check_layers(layers, self.can.n_layers)
        self._scores: dict[int, Tensor] = {}
        self._keeps = {layer: self._keep(layer) for layer in self.layers}

    def _begin(self, undo: ExitStack) -> None:
        super()._begin(undo)
        handle = self.model.blocks[0].register_forward_pre_hook(self._look_last)
        undo.callback(handle.remove)

    def _look_last(self, *_: Any) -> None:
        """Keep the scores after all edits of this pass, whenever those were hooked."""
        for layer, keep in self._keeps.items():
            point = self.model.hook_dict[f"blocks.{layer}.attn.hook_attn_scores"]
            for handle in point.fwd_hooks:
                if handle.user_hook is keep:
                    point._forward_hooks.move_to_end(handle.hook.id)

    def _hooks(self) -> Hooks:
        hooks: Hooks = []
        for layer in self.layers:
            hooks.append((f"blocks.{layer}.attn.hook_attn_scores", self._keeps[layer]))
            hooks.append((f"blocks.{layer}.attn.hook_pattern", self._replace(layer)))
        return hooks

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(scores: Float[Tensor, "prompt head query key"], hook: Any) -> None:
            self._scores[layer] = scores

        return keep

    def _replace(self, layer: int) -> Callable[..., Tensor]:
        def replace(pattern: Float[Tensor, "prompt head query key"], hook: Any) -> Tensor:
            self._check(layer)
            scores = self._scores.pop(layer).float()
            seen = scores > torch.finfo(pattern.dtype).min / 2
            return self.operator(scores, seen).to(pattern.dtype)

        return replace

    def _check(self, layer: int) -> None:
        attn = self.model.blocks[layer].attn
        if self.model in streaming._streams:
            if attn.hook_lse.has_hooks():
                raise UnsupportedError(
                    "Under ReplaceSoftmax attention has no log-sum-exp to measure it by; hook "
                    "hook_pattern instead."
                )
        elif kind_of(attn) == "delegated" or layer not in self._scores:
            raise UnsupportedError(
                f"The stock bridge of {self.can.architecture} ignores an edited pattern; run it "
                "inside `with streaming(model):`."
            )
