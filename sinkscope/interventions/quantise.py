"""Simulated low precision: store activations, keys and values by a scheme and read them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capture.batches import Batch
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import (
    HookedIntervention,
    Hooks,
    check_layers,
    check_positions,
)
from sinkscope.interventions.calibration import needs_calibration, run_through
from sinkscope.metrics.quantisation import Scheme, quantised
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.validation import one_of, strings, whole_numbers

TENSORS: Mapping[str, str] = {
    "attn_in": "what the query, key and value projections read: the residual state after its norm",
    "key": "keys as they are multiplied and cached, rotated where positions are rotary",
    "value": "values as attention mixes and caches them",
    "z": "the heads' outputs, which W_O reads",
    "mlp_in": "what the FFN's first projections (of experts, the router too) read",
    "neurons": "the FFN's hidden units, which the down projection reads",
}
"""What can be quantised, named like the report's signals where possible."""
CACHE = ("key", "value")
"""The tensors of the KV cache."""

_B = "blocks.{layer}."
# BERT's attention adds its own input to its output, so it is edited at the projections alone.
_INPUTS = {
    "attn_in": (_B + "attn.q.hook_in", _B + "attn.k.hook_in", _B + "attn.v.hook_in"),
    "mlp_in": (_B + "mlp.hook_in",),
}

Ends = tuple[Float[Tensor, "channel"], Float[Tensor, "channel"]]
"""Smallest and largest entry of every channel."""


class Quantise(HookedIntervention):
    """Quantise some tensors wherever they are read, x → x̂ (see `metrics.quantisation`).

    Weights, and the arithmetic after reading, stay in the model's precision.

    Args:
        model: A bridge.
        scheme: The scheme, such as "int8-tensor" or "int4-group64-asym"; see
            `metrics.quantisation.Scheme`.
        tensors: Of `TENSORS`; all of them by default, ("key", "value") for a KV cache alone.
        layers: The layers; None for all.
        keep: Positions that stay in full precision, in every tensor.
        channels: For a (layer, tensor), the channels that stay in full precision; those of keys,
            values and z are counted head after head.
        calibration: For a static scheme, the texts on which its ranges are measured, without the
            positions in `keep`; or the result of `channel_ends` for them.

    Raises:
        UnsupportedError: If a layer, tensor or channel does not exist or this architecture does not
            expose it; if a static scheme has no calibration; when it runs, if a range over whole
            prompts is requested in the middle of one (with a KV cache).
        TextError: If a position is not a whole number from 0, or (when it runs) beyond a prompt.
    """

    def __init__(
        self,
        model: Any,
        scheme: str | Scheme = "int8-tensor",
        tensors: str | Iterable[str] | None = None,
        layers: int | Iterable[int] | None = None,
        *,
        keep: int | Iterable[int] = (),
        channels: Mapping[tuple[int, str], Iterable[int]] | None = None,
        calibration: Any = None,
    ) -> None:
        super().__init__(model)
        self.scheme = Scheme.parse(scheme)
        self.tensors = check_tensors(tensors, self.caps)
        self.layers = check_layers(layers, self.caps.n_layers)
        self.positions = check_positions(keep) if _any(keep) else ()
        self.even = self.scheme.whole_prompts
        self._channels = _checked_channels(channels, self.caps)
        self._marked: Bool[Tensor, "layer prompt position"] | None = None
        self._ends: Mapping[tuple[int, str], Ends] = {}
        if self.scheme.static:
            given = needs_calibration(str(self.scheme), calibration)
            self._ends = (
                given
                if isinstance(given, Mapping)
                else channel_ends(model, given, self.tensors, self.layers, keep=self.positions)
            )

    def mark(self, tokens: Bool[Tensor, "layer prompt position"] | None) -> None:
        """Also keep the given tokens of each prompt and layer in the next passes.

        Args:
            tokens: True at the tokens that stay in full precision, for exactly the prompts that
                run; None to stop.
        """
        self._marked = tokens

    def _hooks(self) -> Hooks:
        return [
            (name, self._edit(layer, tensor))
            for layer in self.layers
            for tensor in self.tensors
            for name in hooks_of(self.caps, tensor, layer)
        ]

    def _edit(self, layer: int, tensor: str) -> Callable[..., Tensor]:
        def edit(x: Float[Tensor, "prompt position *channel"], hook: Any) -> Tensor:
            if self.scheme.whole_prompts and self.cursor.past:
                raise UnsupportedError(
                    f"{self.scheme} takes its range over a whole prompt, and this pass goes on "
                    "from a KV cache; use a range per token or group, or a static one."
                )
            flat = flattened(x)
            keep = self._kept(layer, tensor, flat)
            new = quantised(flat, self.scheme, keep, self._between(layer, tensor, keep, flat))
            return new.reshape(x.shape)

        return edit

    def _kept(self, layer: int, tensor: str, x: Tensor) -> Bool[Tensor, "_ _ _"] | None:
        """Return what stays in full precision, to be broadcast to `x`; None for nothing."""
        rows = self.cursor.rows(self.positions)
        channels = self._channels.get((layer, tensor), ())
        if not rows and not channels and self._marked is None:
            return None
        keep = torch.zeros(1, x.shape[1], 1, dtype=torch.bool, device=x.device)
        keep[:, rows] = True
        if self._marked is not None:
            marked = self._marked[layer].to(x.device)
            if marked.shape != x.shape[:2]:
                raise TextError(
                    f"Tokens are marked of {marked.shape[0]} prompts of {marked.shape[1]} tokens, "
                    f"and {x.shape[0]} of {x.shape[1]} run; mark those of the prompts that run."
                )
            keep = keep | marked[:, :, None]
        if channels:
            apart = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
            apart[list(channels)] = True
            keep = keep | apart
        return keep

    def _between(
        self, layer: int, tensor: str, keep: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the range of a static scheme."""
        if not self.scheme.static:
            return None
        low, high = (end.to(x.device) for end in self._ends[layer, tensor])
        if self.scheme.per == "tensor":
            apart = list(self._channels.get((layer, tensor), ()))
            rest = torch.ones(len(low), dtype=torch.bool, device=low.device)
            rest[apart] = False
            if rest.any():
                low, high = low[rest], high[rest]
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        return low[None, None], high[None, None]


def channel_ends(
    model: Any,
    texts: Any,
    tensors: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    keep: Iterable[int] = (),
    marked: Bool[Tensor, "layer prompt position"] | None = None,
) -> dict[tuple[int, str], Ends]:
    """Return the smallest and the largest entry of every channel, over all tokens of some texts.

    Args:
        model: A bridge.
        texts: Anything that a scan takes.
        tensors: Of `TENSORS`; all of them by default.
        layers: The layers; all of them by default.
        keep: Positions that are left out.
        marked: Tokens of each prompt and layer that are left out.

    Returns:
        By (layer, tensor), on the CPU; 0 where no token is left.
    """
    caps = capabilities(model)
    ends: dict[tuple[int, str], Ends] = {}
    left_out = list(keep)

    def listener(layer: int, tensor: str) -> Callable[[Tensor, Batch], None]:
        def listen(x: Tensor, batch: Batch) -> None:
            x = flattened(x).float()
            counts = batch.mask.clone()
            counts[:, left_out] = False
            if marked is not None:
                counts &= ~marked[layer, batch.rows, : batch.length].to(counts.device)
            apart = ~counts[:, :, None]
            low = x.masked_fill(apart, torch.inf).amin((0, 1)).cpu()
            high = x.masked_fill(apart, -torch.inf).amax((0, 1)).cpu()
            if (layer, tensor) in ends:
                before = ends[layer, tensor]
                low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
            ends[layer, tensor] = low, high

        return listen

    listeners = {
        hooks_of(caps, tensor, layer)[0]: listener(layer, tensor)
        for layer in check_layers(layers, caps.n_layers)
        for tensor in check_tensors(tensors, caps)
    }
    run_through(model, texts, listeners)
    return {
        where: (low.masked_fill(low > high, 0), high.masked_fill(low > high, 0))
        for where, (low, high) in ends.items()
    }


def flattened(x: Float[Tensor, "prompt position *channel"]) -> Float[Tensor, "prompt position _"]:
    """Flatten the channels of all heads into one dimension."""
    return rearrange(x, "b t h d -> b t (h d)") if x.ndim == 4 else x


def hooks_of(caps: Capabilities, tensor: str, layer: int) -> tuple[str, ...]:
    """Return the hook points where a tensor of `TENSORS` is read; all have the same value.

    Raises:
        UnsupportedError: If this architecture does not expose it.
    """
    if tensor not in _INPUTS:
        return (caps.hook(tensor, layer),)
    if not _shows_input(caps, tensor):
        raise UnsupportedError(f"{caps.architecture} has no hook point for {tensor!r}.")
    return tuple(name.format(layer=layer) for name in _INPUTS[tensor])


def check_tensors(tensors: str | Iterable[str] | None, caps: Capabilities) -> tuple[str, ...]:
    """Return tensors of `TENSORS` that the architecture exposes; None for all of these.

    Raises:
        UnsupportedError: If there are none, one is unknown, or the architecture does not expose
            one.
    """
    if tensors is None:
        return tuple(name for name in TENSORS if name in caps.signals or _shows_input(caps, name))
    result = tuple(
        one_of("tensor", name, tuple(TENSORS), error=UnsupportedError)
        for name in strings("tensors", tensors, UnsupportedError)
    )
    if not result:
        raise UnsupportedError(f"No tensor is named; name some of {', '.join(TENSORS)}.")
    for name in result:
        hooks_of(caps, name, 0)
    return result


def _shows_input(caps: Capabilities, tensor: str) -> bool:
    return tensor in _INPUTS and set(_INPUTS[tensor]) <= set(caps.hooks)


def _any(keep: Any) -> bool:
    return not isinstance(keep, tuple | list | set | range) or len(keep) > 0


def _checked_channels(
    channels: Mapping[tuple[int, str], Iterable[int]] | None, caps: Capabilities
) -> dict[tuple[int, str], tuple[int, ...]]:
    sizes = {
        "key": caps.n_kv_heads * caps.d_key,
        "value": caps.n_kv_heads * caps.d_head,
        "z": caps.n_heads * caps.d_head,
        "neurons": caps.d_mlp or 0,
    }
    result = {}
    for (layer, tensor), chosen in (channels or {}).items():
        check_layers(layer, caps.n_layers)
        one_of("tensor", tensor, tuple(TENSORS), error=UnsupportedError)
        chosen = tuple(chosen)
        if chosen:
            last = sizes.get(tensor, caps.d_model) - 1
            result[layer, tensor] = whole_numbers(
                f"channels of {tensor}", chosen, at_most=last, error=UnsupportedError
            )
    return result
