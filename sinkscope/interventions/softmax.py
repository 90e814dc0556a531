"""Replace the softmax of attention by another operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention import operators, streaming
from sinkscope.attention.operators import Operator
from sinkscope.attention.support import kind_of
from sinkscope.errors import UnsupportedError
from sinkscope.interventions.base import HookedIntervention, Hooks, check_attending, check_mode


class ReplaceSoftmax(HookedIntervention):
    """Compute attention weights from the scores with an operator other than softmax.

    The pattern of these layers is materialised, and a scan reads it there on either attention path.
    Such rows have no log-sum-exp, so hooks on ``hook_lse`` are refused.

    Args:
        model: A bridge whose scores and pattern are those that the model uses (on the eager path
            not BERT or OPT).
        operator: "relu", "sigmoid", "off-by-one" or "softpick", as
            `sinkscope.attention.operators` defines them; or a function of the scores and the mask
            of visible keys, both [prompt head query key], that returns the weights.
        layers: The layers; None for all.

    Raises:
        UnsupportedError: If there is no such operator or layer, or the model has learned sink
            logits, which are part of its softmax; when it runs, if its attention ignores an edited
            pattern, or a log-sum-exp is read.
    """

    def __init__(
        self, model: Any, operator: str | Operator, layers: int | Iterable[int] | None = None
    ) -> None:
        super().__init__(model)
        if isinstance(operator, str):
            names = tuple(name for name in operators.OPERATORS if name != "softmax")
            operator = operators.OPERATORS[check_mode(operator.replace("_", "-"), names)]
        if self.caps.learned_sinks:
            raise UnsupportedError(
                f"{self.caps.architecture} has learned sinks, which are part of its softmax; no "
                "other operator defines how to treat them."
            )
        self.operator = operator
        self.softmax = operator is operators.off_by_one
        self.layers = check_attending(layers, self.caps)
        self._scores: dict[int, Tensor] = {}
        self._keeps = {layer: self._keep(layer) for layer in self.layers}

    def _begin(self, undo: ExitStack) -> None:
        super()._begin(undo)
        handle = self.model.blocks[0].register_forward_pre_hook(self._read_last)
        undo.callback(handle.remove)

    def _read_last(self, *_: Any) -> None:
        """Read the scores after all other hooks of this pass, whenever those were added."""
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
            visible = scores > torch.finfo(pattern.dtype).min / 2
            return self.operator(scores, visible).to(pattern.dtype)

        return replace

    def _check(self, layer: int) -> None:
        attn = self.model.blocks[layer].attn
        if self.model in streaming._streams:
            if attn.hook_lse.has_hooks():
                raise UnsupportedError(
                    "Under ReplaceSoftmax attention has no log-sum-exp; hook hook_pattern instead."
                )
        elif kind_of(attn) == "delegated" or layer not in self._scores:
            raise UnsupportedError(
                f"The eager attention of {self.caps.architecture} ignores an edited pattern; run "
                "it inside `with streaming(model):`."
            )
