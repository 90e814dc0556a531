"""Fused projections, kept whole: q, k and v are slices of the output of the model's own module.

Where a model has one projection for queries, keys and values (GPT-2's c_attn, NeoX's
query_key_value, Phi-3's qkv_proj) or for both halves of a gated FFN (gate_up_proj), TransformerLens
splits the *weight* into several new modules and never calls the original. Adapters, hooks, fake
quantisation or a custom class on the original module are then ignored, quantised weights cannot be
read at all, and some slices are copies that miss later edits of the weight. Here the original
module is called once for all of its parts, and its *output* is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import (
    JointGateUpMLPBridge,
)
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import (
    JointQKVAttentionBridge,
)
from transformers.pytorch_utils import Conv1D

Split = Callable[[Any], tuple[nn.Module, ...]]


def keep_fused(components: Iterable[Any]) -> None:
    """Make components split the outputs of fused projections; call before building a bridge."""
    for component in components:
        if isinstance(component, JointQKVAttentionBridge):
            component.split_qkv_matrix = _Cutter(component.split_qkv_matrix)
        elif isinstance(component, JointGateUpMLPBridge):
            component.split_gate_up_matrix = _Cutter(component.split_gate_up_matrix)


def put_together(bridge: Any) -> None:
    """Do the same for an existing bridge, whose components already have split weights."""
    keep_fused(bridge.original_model.modules())
    for component, projections in _projections(bridge):
        if isinstance(component, JointQKVAttentionBridge):
            parts = component.split_qkv_matrix(component.original_component)
        else:
            parts = component.split_gate_up_matrix(component.original_component)
        for projection, part in zip(projections, parts, strict=True):
            projection.set_original_component(part)
    watch_inputs(bridge)


def watch_inputs(bridge: Any) -> None:
    """Give each fused projection the hook points that may edit the input of a part in place."""
    for _, projections in _projections(bridge):
        for projection in projections:
            if isinstance(part := projection.original_component, FusedPart):
                part._fused.points = [each.hook_in for each in projections]


def _projections(bridge: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The components with a fused projection, each with the bridges of its parts."""
    for component in list(bridge.original_model.modules()):
        if isinstance(component, JointQKVAttentionBridge):
            yield component, (component.q, component.k, component.v)
        elif isinstance(component, JointGateUpMLPBridge):
            yield component, (component.gate, getattr(component, "in"))


class _Cutter:
    """Replacement for a TransformerLens function that splits a fused weight.

    Args:
        split: That function: maps the module with the fused projection to its parts.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __call__(self, holder: nn.Module) -> tuple[nn.Module, ...]:
        numbered = _Numbered(holder, "rows")
        parts = self._split(numbered)
        if len(_numbers(parts[0])) == 1:  # outputs of GPT-2's projections are columns
            numbered = _Numbered(holder, "columns")
            parts = self._split(numbered)
        fused = Fused(numbered.fused, [_slice(_numbers(part)) for part in parts])
        return tuple(FusedPart(fused, index) for index in range(len(parts)))


class _Numbered:
    """A module whose projections have weights filled with row or column indices."""

    def __init__(self, holder: nn.Module, along: str) -> None:
        self._holder = holder
        self._along = along
        self.fused: Any = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._holder, name)
        if isinstance(value, GeneralizedComponent) and value.original_component is not None:
            value = value.original_component
        if not isinstance(value, nn.Module) or not hasattr(value, "weight"):
            return value
        self.fused = value
        return _NumberedWeight(*_sizes(value), self._along, getattr(value, "bias", None))


class _NumberedWeight:
    """Weight and bias of a projection filled with indices, as expanded views."""

    def __init__(self, rows: int, columns: int, along: str, bias: Tensor | None) -> None:
        size = rows if along == "rows" else columns
        numbers = torch.arange(size, dtype=torch.float64, device="cpu")
        shaped = numbers[:, None] if along == "rows" else numbers[None, :]
        self.weight = shaped.expand(rows, columns)
        self.bias = None if bias is None else torch.zeros(bias.shape[0], dtype=torch.float64)


def _sizes(module: Any) -> tuple[int, int]:
    """Rows and columns of a projection's weight, which may be packed if quantised."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int) and module.weight.ndim != 2:
        return rows, columns
    return tuple(module.weight.shape)


def _numbers(part: nn.Module) -> list[int]:
    """Indices of a part's outputs, in order; a single one if rows and columns were confused."""
    weight: Any = part.weight
    numbers = weight[:, 0].long().tolist()
    return numbers if len(set(numbers)) > 1 else numbers[:1]


def _slice(outputs: list[int]) -> slice | Int[Tensor, "output"]:
    """Contiguous output indices as a slice, which avoids a copy."""
    first, last = outputs[0], outputs[-1]
    if outputs == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(outputs, device="cpu")


class Fused:
    """A fused projection and the output indices of its parts.

    Args:
        module: The model's own module.
        outputs: Output indices of each part.
    """

    def __init__(self, module: nn.Module, outputs: list[slice | Tensor]) -> None:
        self.module = module
        self.outputs = outputs
        self.points: list[Any] = []
        self._moved: dict[tuple[int, torch.device], Tensor] = {}
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """The outputs of one part; the module runs once for parts with the same input.

        If a hook may edit the input of a part in place, each part runs the module separately.
        """
        if self._input is not x or self._output is None or self._edited():
            self._input, self._output = x, self.module(x)
        output = self._cut(self._output, index)
        if index == len(self.outputs) - 1:
            self._input = self._output = None
        return output

    def _edited(self) -> bool:
        return any(point._forward_hooks for point in self.points)

    def _cut(self, x: Tensor, index: int, dim: int = -1) -> Tensor:
        outputs = self.outputs[index]
        if isinstance(outputs, slice):
            return x.narrow(dim, outputs.start, outputs.stop - outputs.start)
        place = index, x.device  # an index tensor on "meta" (offloaded weights) has no data
        if place not in self._moved:
            self._moved[place] = outputs.to(x.device)
        return x.index_select(dim, self._moved[place])

    def weight(self, index: int) -> Float[Tensor, "output input"]:
        """The rows of the weight that belong to a part, in the layout of `nn.Linear`.

        Raises:
            AttributeError: If the module is not a plain projection defined by its weight.
        """
        kind, weight = type(self.module), self.module.weight
        plain = kind in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
        if not plain or self.module._forward_hooks:
            raise AttributeError(
                f"{kind.__name__} is not a plain projection, so its weight alone does not define "
                "its output."
            )
        return self._cut(weight.T if kind is Conv1D else weight, index, dim=0)

    def bias(self, index: int) -> Float[Tensor, "output"] | None:
        """The entries of the bias that belong to a part."""
        bias: Any = getattr(self.module, "bias", None)
        return None if bias is None else self._cut(bias, index)


class FusedPart(nn.Linear):
    """One part of a fused projection.

    It has no weights of its own: ``weight`` and ``bias`` are sliced on access. Once weights are
    assigned, as TransformerLens does with processed weights, it becomes a plain linear layer.

    Args:
        fused: The fused projection.
        index: Index of the part.
    """

    def __init__(self, fused: Fused, index: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate weights
        self.__dict__["_fused"] = fused  # not registered: it already is a module of the model
        self._index = index
        outputs = fused.outputs[index]
        run = isinstance(outputs, slice)
        self.out_features = outputs.stop - outputs.start if run else len(outputs)

    def forward(self, input: Float[Tensor, "*_ input"]) -> Float[Tensor, "*_ output"]:
        """The part's outputs."""
        if self._parameters:
            return nn.functional.linear(input, self.weight, self.bias)
        return self._fused.part(input, self._index)

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", "bias"):
            return super().__getattr__(name)
        if name in self._parameters:
            return self._parameters[name]
        value = getattr(self._fused, name)(self._index)
        return None if value is None else nn.Parameter(value, requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            return super().__setattr__(name, value)
        other = "bias" if name == "weight" else "weight"
        if not self._parameters:
            self._parameters[other] = getattr(self, other)
        self._parameters[name] = value
        return None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            value = getattr(self, name, None)  # not readable under an adapter
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()


def all_components(component: Any) -> Iterator[Any]:
    """Yield a component of an adapter's component mapping and all components within it."""
    yield component
    for inner in getattr(component, "submodules", {}).values():
        yield from all_components(inner)
