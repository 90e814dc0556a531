"""A KV cache of a few kept positions and a window, exact for a whole chunk of queries at once.

StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) feeds one token at a time: each query sees the
kept positions and the most recent W positions, itself included, and positions are counted inside
the cache. Here queries run in chunks:

1. `Layout` says which keys the queries of a chunk see. Each query has its own window, which a mask
   expresses.
2. With positions counted in the cache, the kept keys are at a different distance from each query.
   `KeyRotation` gives each query its own copy of them, re-rotated accordingly. Rotary attention
   depends on distances only, so nothing is approximated.
3. `WindowCache` stores the kept positions and the window of every layer. Its memory is bounded by
   window, chunk and number of kept positions.
4. Where `Stored` is given, kept positions are quantised once they have left a query's window,
   except some tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from sinkscope.attention.kv_cache import cache_argument
from sinkscope.attention.support import core_module
from sinkscope.capture import runner
from sinkscope.devices import ran_out_of_memory
from sinkscope.errors import UnsupportedError
from sinkscope.metrics.quantisation import Scheme, quantised
from sinkscope.models.capabilities import Capabilities
from sinkscope.models.probe import input_device, only_hooks, probe_tokens
from sinkscope.models.signals import close


class KeyRotation:
    """Rotates keys by a further number of positions, with the rotation of their model.

    This is verified on the model first: in a text of one repeated token only the rotation
    distinguishes positions, so a layer's first key rotated by n has to equal its key n.

    Args:
        model: A bridge.
        can: Its capabilities.

    Raises:
        UnsupportedError: If the model is not rotary, its angles change with the text's length, or
            its rotation cannot be found or differs between layers.
    """

    def __init__(self, model: Any, caps: Capabilities) -> None:
        from transformer_lens.model_bridge.generalized_components.rotary_embedding import (
            RotaryEmbeddingBridge,
        )

        rotary = [m for m in model.modules() if isinstance(m, RotaryEmbeddingBridge)]
        core = core_module(model.blocks[0].attn)
        home = sys.modules[type(core).__module__] if core is not None else None
        self._rotate = getattr(home, "apply_rotary_pos_emb", None)
        if caps.positions != "rotary" or len(rotary) != 1 or self._rotate is None:
            raise UnsupportedError(
                f"Positions can be counted in the cache where they are rotary; {caps.architecture} "
                f'has {caps.positions} ones that cannot be re-rotated; count them as "absolute".'
            )
        self._angles: Any = rotary[0].original_component
        kind = getattr(self._angles, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"The rotary angles of {caps.architecture} change with the length of the text "
                f'({kind}), so keys in a cache cannot be re-rotated; count positions as "absolute".'
            )
        if not self._is_exact(model):
            raise UnsupportedError(
                f"The keys of {caps.architecture} are not rotated alike in every layer, or not as "
                'its rotary embedding says; count positions as "absolute".'
            )

    def rotate(
        self,
        key: Float[Tensor, "prompt kv_head kept d_head"],
        by: Int[Tensor, "query kept"],
    ) -> Float[Tensor, "prompt kv_head copy d_head"]:
        """A copy of every key for every query, query after query, each rotated further.

        Args:
            key: Keys as stored in the cache.
            by: Number of positions for each query.
        """
        wide = repeat(key.float(), "b h k d -> b h (q k) d", q=len(by))
        ids = rearrange(by, "q k -> 1 (q k)").to(key.device)
        cos, sin = self._angles(wide, ids)
        scale = getattr(self._angles, "attention_scaling", 1.0)
        # Some models rotate only the first part of a key, in their attention or in this function.
        part, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
        assert self._rotate is not None
        rotated = self._rotate(part, part, cos / scale, sin / scale)[1]
        return torch.cat([rotated, rest], dim=-1).to(key.dtype)

    def _is_exact(self, model: Any) -> bool:
        """Whether every layer's keys are rotated as assumed."""
        device = input_device(model)
        probe = probe_tokens(model)[:1]
        tokens = probe[:, :1].expand_as(probe).to(device)
        cache = DynamicCache()
        no_hooks = only_hooks(model.hook_dict.values(), (), lambda x, hook: None)
        with torch.inference_mode(), runner.evaluating(model), no_hooks:
            given = {cache_argument(model.original_model): cache}
            model.original_model(input_ids=tokens, use_cache=True, **given)
            by = torch.arange(tokens.shape[1])[:, None]
            half = model.cfg.dtype in (torch.float16, torch.bfloat16)
            # Wrong rotations are off by the size of a key, half precision by 3 % in SmolLM2's last
            # layers.
            tolerance = 0.2 if half else 1e-3
            try:
                return all(
                    close(self.rotate(keys[:, :, :1], by).float(), keys.float(), tolerance)
                    for keys in (layer.keys for layer in cache.layers)
                )
            except RuntimeError as error:  # the angles differ in width from the keys
                if ran_out_of_memory(error):
                    raise
                return False


COUNTED = ("cache", "absolute")
"""How positions are counted: inside the cache, as StreamingLLM does, or from the text's start."""


@dataclass(frozen=True)
class Layout:
    """Which keys the queries of one chunk see, and at which positions.

    Keys come in this order: kept positions that have left the window (with positions counted in the
    cache, a copy of each for every query), the window before the chunk, the chunk.

    Attributes:
        start: Position of the chunk's first query.
        stop: Position after its last.
        window: Recent positions that a query sees, its own included; None for all.
        kept: Kept positions, in order, that have left the window of some query.
        counted: One of `COUNTED`.
        alone: Positions whose query sees itself only.
    """

    start: int
    stop: int
    window: int | None
    kept: tuple[int, ...]
    counted: str
    alone: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        start: int,
        stop: int,
        window: int | None,
        keep: Sequence[int],
        counted: str,
        alone: Sequence[int] = (),
    ) -> Layout:
        """The layout of a chunk when the positions `keep` stay visible."""
        left = () if window is None else tuple(k for k in sorted(keep) if k <= stop - 1 - window)
        return cls(start, stop, window, left, counted, tuple(alone))

    @property
    def first(self) -> int:
        """The earliest position that is still in the window of the first query."""
        return 0 if self.window is None else max(0, self.start - self.window + 1)

    def visible(self) -> Bool[Tensor, "1 1 query key"]:
        """The attention mask: which query sees which key."""
        query = torch.arange(self.start, self.stop)[:, None]
        key = torch.arange(self.first, self.stop)[None, :]
        recent = key <= query
        if self.window is not None:
            recent = recent & (key > query - self.window)
        kept = torch.tensor(self.kept, dtype=torch.long)[None, :]
        left = kept <= query - (self.window or 0)
        for position in self.alone:
            recent = torch.where(query == position, key == position, recent)
            left = left & (query != position)
        if self.counted == "cache" and self.kept:
            own = torch.eye(len(query), dtype=torch.bool)
            left = rearrange(own[:, :, None] & left[:, None, :], "query copy k -> query (copy k)")
        return torch.cat([left, recent], dim=1)[None, None]

    def rotations(self) -> Int[Tensor, "query kept"]:
        """By how many positions each kept key is rotated further for each query.

        In the cache, the r-th kept position is at r, and the query at the end of the cache.
        """
        assert self.window is not None
        query = torch.arange(self.start, self.stop)[:, None]
        kept = torch.tensor(self.kept)[None, :]
        left = (kept <= query - self.window).sum(1, keepdim=True)
        in_cache = left + (query + 1).clamp(max=self.window) - 1
        rank = torch.arange(len(self.kept))[None, :]
        return query - in_cache + rank - kept


_RANGE_BYTES = 2
"""Bytes of a scale, or of an end of a range, which have 16 bits."""


@dataclass(frozen=True)
class Stored:
    """How keys and values that have left the window are stored: quantised, except some tokens.

    Attributes:
        scheme: With a range for each token or group, so that a token's does not depend on others.
        full: Tokens that stay in full precision.

    Raises:
        UnsupportedError: If the scheme's range is over several tokens.
    """

    scheme: Scheme
    full: Bool[Tensor, "layer position"]

    def __post_init__(self) -> None:
        if self.scheme.per not in ("token", "group"):
            raise UnsupportedError(
                f"{self.scheme} takes its range over tokens that are not all there when a cache is "
                "written; use a range per token or group, such as int4-token or int4-group64."
            )

    def read(
        self, x: Float[Tensor, "prompt kv_head position d_head"], layer: int, start: int
    ) -> Float[Tensor, "prompt kv_head position d_head"]:
        """Return a layer's keys or values as they are read back.

        Args:
            x: As they were written.
            layer: The layer.
            start: Position of the first.
        """
        apart = self.full[layer, start : start + x.shape[2]].to(x.device)
        flat = quantised(rearrange(x, "b h t d -> b t (h d)"), self.scheme, apart[None, :, None])
        return rearrange(flat, "b t (h d) -> b h t d", h=x.shape[1])

    def bytes(self, x: Float[Tensor, "prompt kv_head d_head"], layer: int, position: int) -> float:
        """Size of one token's keys or values, ranges of 16 bits a number included."""
        if self.full[layer, position]:
            return float(_size(x))
        channels = x[0].numel()
        ranges = 1 if self.scheme.per == "token" else -(-channels // self.scheme.group)
        numbers = 1 if self.scheme.symmetric else 2
        bits = channels * self.scheme.bits
        return x.shape[0] * (bits / 8 + ranges * numbers * _RANGE_BYTES)


class WindowCache(Cache):
    """Stores some positions and a window of the rest, layer by layer.

    Args:
        rotation: Rotation of the kept keys; None where positions are counted absolutely.
        stored: How the kept positions are stored; unquantised by default.
    """

    def __init__(self, rotation: KeyRotation | None = None, stored: Stored | None = None) -> None:
        super().__init__(layers=[])
        self._rotation = rotation
        self._stored = stored
        self._layout: Layout | None = None
        self._kept: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self._recent: dict[int, tuple[Tensor, Tensor]] = {}
        self._keep: frozenset[int] = frozenset()

    def begin(self, layout: Layout, keep: Sequence[int]) -> None:
        """Set the layout of the next chunk."""
        self._layout, self._keep = layout, frozenset(keep)

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        """Tokens that came before this chunk."""
        return self._layout.start if self._layout is not None else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the chunk, and return those its queries attend to."""
        layout = self._layout
        assert layout is not None
        self._absorb(key_states, value_states, layer_idx, layout)
        key, value = key_states, value_states
        if layer_idx in self._recent:
            before = self._recent[layer_idx]
            key = torch.cat([before[0], key], dim=2)
            value = torch.cat([before[1], value], dim=2)
        self._recent[layer_idx] = _last(key, layout), _last(value, layout)
        if not layout.kept:
            return key, value
        kept = [self._kept[layer_idx][position] for position in layout.kept]
        old_key = torch.stack([one[0] for one in kept], dim=2)
        old_value = torch.stack([one[1] for one in kept], dim=2)
        if self._rotation is not None:
            old_key = self._rotation.rotate(old_key, layout.rotations())
            old_value = repeat(old_value, "b h k d -> b h (q k) d", q=layout.stop - layout.start)
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)

    def bytes(self) -> float:
        """Bytes kept between chunks, including the ranges of quantised values."""
        total = float(sum(_size(x) for pair in self._recent.values() for x in pair))
        if self._stored is None:
            return total + sum(_size(x) for pair in self._pairs() for x in pair)
        for layer, own in self._kept.items():
            recent = self._end() - self._recent[layer][0].shape[2]
            for position, pair in own.items():
                if position < recent:  # the others are in the window
                    total += sum(self._stored.bytes(x, layer, position) for x in pair)
        return total

    def token_bytes(self) -> float:
        """Size of a token's keys and values of all layers in full precision, if one was kept."""
        return sum(_size(x) for pair in self._pairs() for x in pair) / max(1, self._kept_tokens())

    def _end(self) -> int:
        """Tokens up to the end of this chunk."""
        return self._layout.stop if self._layout is not None else 0

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for layer in self._kept.values() for pair in layer.values()]

    def _kept_tokens(self) -> int:
        return max((len(own) for own in self._kept.values()), default=0)

    def _absorb(self, key: Tensor, value: Tensor, layer: int, layout: Layout) -> None:
        """Store the chunk's positions that stay visible."""
        own = self._kept.setdefault(layer, {})
        if self._stored is not None:
            key, value = (self._stored.read(x, layer, layout.start) for x in (key, value))
        for position in range(layout.start, layout.stop):
            if position in self._keep:
                row = position - layout.start
                own[position] = key[:, :, row].clone(), value[:, :, row].clone()


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _last(
    x: Float[Tensor, "prompt kv_head key d_head"], layout: Layout
) -> Float[Tensor, "prompt kv_head _ d_head"]:
    """Copy what the next chunk's first query will still see, so that the rest can be freed."""
    if layout.window is None:
        return x
    size = min(layout.window - 1, x.shape[2])
    return x[:, :, x.shape[2] - size :].clone()
