"""Edit the position of a token: its learned position vector, or its rotary position id."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import Intervention, check_mode
from sinkscope.models.probe import probe

_MODES = ("replace", "swap")


class PositionEmbeddingEdit(Intervention):
    """Give a position the learned vector of another one: W_pos[target] = W_pos[source].

    The embedding table itself is edited, and copied back bit for bit afterwards, so that the edit
    takes effect on every path, with padding and with a KV cache.

    Args:
        model: A bridge with learned position embeddings.
        source: The position whose vector is taken; negative ones count from the last.
        target: The position that receives it.
        mode: "replace", or "swap" to give `source` the target's vector as well.

    Raises:
        UnsupportedError: If the model has no learned position embeddings, or they are not rows of
            one table.
        TextError: If a position is outside the table.

    Source: Yan et al. (2024), Unveiling and Controlling Anomalous Attention Distribution in
    Transformers, arXiv 2407.01601, Fig. 4.
    """

    def __init__(self, model: Any, source: int, target: int, mode: str = "replace") -> None:
        super().__init__(model)
        if self.caps.positions != "learned":
            raise UnsupportedError(
                f"{self.caps.architecture} has no learned position embeddings (its positions are "
                f"{self.caps.positions}); for rotary ones use PositionIdEdit."
            )
        self.mode = check_mode(mode, _MODES)
        self._table, first = position_table(model)
        size = len(self._table) - first
        self._source, self._target = (
            first + _in_table(position, size) for position in (source, target)
        )
        self.positions = (self._target - first,)

    def _begin(self, undo: ExitStack) -> None:
        rows = [self._source, self._target]
        saved = self._table.detach()[rows].clone()
        undo.callback(self._write, rows, saved)
        new = saved[[1, 0]] if self.mode == "swap" else saved[[0, 0]]
        self._write(rows, new)

    @torch.no_grad()
    def _write(self, rows: list[int], vectors: Float[Tensor, "2 dim"]) -> None:
        self._table[rows] = vectors


class PositionIdEdit(Intervention):
    """Give a token the rotary position id of another position.

    Queries and keys at `target` are rotated by the angles of `source` in every layer. The attention
    mask does not change.

    Args:
        model: A bridge with rotary positions.
        source: The position whose id is used.
        target: The position that receives it.
        mode: "replace", or "swap" to give `source` the id of `target` as well.

    Raises:
        UnsupportedError: If the model has no rotary position ids that can be edited, or angles that
            depend on the largest id, so that one far id would rotate every token.
        TextError: If a position is not a whole number from 0, or (when it runs) beyond a prompt.
    """

    def __init__(self, model: Any, source: int, target: int, mode: str = "replace") -> None:
        super().__init__(model)
        self.mode = check_mode(mode, _MODES)
        for position in (source, target):
            if type(position) is not int or position < 0:
                raise TextError(f"Position {position!r} is not a whole number from 0.")
        self.source, self.target = source, target
        self.positions = (target, source) if mode == "swap" else (target,)
        self._rotaries = rotaries(model)
        if self.caps.positions != "rotary" or not self._rotaries:
            raise UnsupportedError(
                f"{self.caps.architecture} has no rotary position ids to edit (its positions are "
                f"{self.caps.positions}); for learned ones use PositionEmbeddingEdit."
            )
        if kinds := length_dependent(self._rotaries):
            raise UnsupportedError(
                f"The rotary angles of {self.caps.architecture} depend on the largest position id "
                f"({', '.join(kinds)}), so that editing one would rotate other tokens too."
            )

    def _begin(self, undo: ExitStack) -> None:
        self._follow_hooks(undo)
        for rotary in self._rotaries:
            handle = rotary.register_forward_pre_hook(self._before, with_kwargs=True)
            undo.callback(handle.remove)

    def _before(
        self, rotary: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not self._in_force():
            return None
        return with_ids(args, kwargs, self._edit)

    def _edit(self, ids: Int[Tensor, "_ position"]) -> Int[Tensor, "_ position"]:
        last = int(ids.max())
        if max(self.positions) > last:
            raise TextError(
                f"Position {max(self.positions)} lies outside the tokens that this forward pass "
                f"reaches, 0 to {last}; use longer prompts or an earlier position."
            )
        edited = ids.masked_fill(ids == self.target, self.source)
        if self.mode == "swap":
            edited = edited.masked_fill(ids == self.source, self.target)
        return edited


def rotaries(model: Any) -> list[nn.Module]:
    """Return the modules of a bridge that compute rotary angles from position ids."""
    from transformer_lens.model_bridge.generalized_components.rotary_embedding import (
        RotaryEmbeddingBridge,
    )

    return [module for module in model.modules() if isinstance(module, RotaryEmbeddingBridge)]


def with_ids(
    args: tuple, kwargs: dict[str, Any], edit: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of such a module with edited position ids."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": edit(kwargs["position_ids"])}
    return (args[0], edit(args[1]), *args[2:]), kwargs


def length_dependent(rotaries: list[Any]) -> list[str]:
    """Return the names of the kinds of rotary embedding whose angles depend on the largest id."""
    kinds: set[str] = set()
    for rotary in rotaries:
        kind = getattr(rotary.original_component, "rope_type", "default")
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind}  # one per layer type
    return sorted(kinds & {"dynamic", "longrope"})


def position_table(model: Any) -> tuple[Float[Tensor, "row dim"], int]:
    """Return the table of learned position vectors, and its row for position 0.

    Some models (OPT, RoBERTa) begin with rows that no position uses, so the embedding's output
    for positions 0, 1, 2, … is looked up in the table.

    Raises:
        UnsupportedError: If that output is not in the table.
    """
    table = model.W_pos
    shown = probe(model, lambda name: name == "pos_embed.hook_out").kept.get("pos_embed.hook_out")
    if shown is not None and not table.is_meta:
        length = shown.shape[1]
        rows = table.detach().float().cpu()
        for first in range(min(8, len(rows) - length + 1)):
            if torch.equal(rows[first : first + length], shown[0]):
                return table, first
    raise UnsupportedError(
        f"The position vectors of {type(model.original_model).__name__} are not rows of one table "
        "that is added as it is, so they cannot be edited exactly."
    )


def _in_table(position: int, size: int) -> int:
    if type(position) is not int or not -size <= position < size:
        raise TextError(
            f"Position {position!r} lies outside the {size} learned positions of this model."
        )
    return position % size
