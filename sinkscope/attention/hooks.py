"""Helpers for hook points: fast checks for hooks, and the layout of tensors at hook points."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.hook_points import HookPoint


class HeadsLast(BaseTensorConversion):
    """From attention's [prompt head position d_head] to hooks' [prompt position head d_head]."""

    def handle_conversion(self, input_value: Tensor, *_: Any) -> Tensor:
        """The layout at the hook point."""
        return input_value.transpose(1, 2)

    def revert(self, input_value: Tensor, *_: Any) -> Tensor:
        """The layout in attention."""
        return input_value.transpose(1, 2)


def has_hooks(point: HookPoint) -> bool:
    """Whether a point has hooks; like `HookPoint.has_hooks` at a tenth of its cost."""
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks)


def hooks_of(point: HookPoint) -> list[dict]:
    """The dictionaries in which torch stores the hooks of a point."""
    return [point._forward_hooks, point._backward_hooks, point._forward_pre_hooks]
