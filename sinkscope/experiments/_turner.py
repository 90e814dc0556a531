"""Rotary keys rotated on, so that a cache can count its own positions."""

from __future__ import annotations

import sys
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from sinkscope._algebra import close
from sinkscope._out_of_memory import ran_out_of_memory
from sinkscope._probe import only_hooks, probe_tokens
from sinkscope.capabilities import Capabilities
from sinkscope.capture import runner
from sinkscope.capture._kv_cache import cache_argument
from sinkscope.capture._support import core_module
from sinkscope.errors import UnsupportedError


class Turner:
    """Rotates keys on by a number of positions, the way their own model rotates them.

    Whether it does is tried before it is relied on: in a text of one token over and over nothing
    but the rotation tells positions apart, so a layer's first key turned by n is its key n.

    Args:
        model: A bridge.
        can: Its capabilities.

    Raises:
        UnsupportedError: If the model is not rotary, its angles change with the text's length, or
            its rotation cannot be found or is another one in some layers.
    """

    def __init__(self, model: Any, can: Capabilities) -> None:
        from transformer_lens.model_bridge.generalized_components.rotary_embedding import (
            RotaryEmbeddingBridge,
        )

        found = [m for m in model.modules() if isinstance(m, RotaryEmbeddingBridge)]
        core = core_module(model.blocks[0].attn)
        home = sys.modules[type(core).__module__] if core is not None else None
        self._rotate = getattr(home, "apply_rotary_pos_emb", None)
        if can.positions != "rotary" or len(found) != 1 or self._rotate is None:
            raise UnsupportedError(
                f"Positions can be counted in the cache where they are rotary; {can.architecture} "
                f'has {can.positions} ones that cannot be turned; count them as "absolute".'
            )
        self._angles: Any = found[0].original_component
        kind = getattr(self._angles, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UnsupportedError(
                f"The rotary angles of {can.architecture} change with the length of the text "
                f'({kind}), so keys in a cache cannot be turned; count positions as "absolute".'
            )
        if not self._turns(model):
            raise UnsupportedError(
                f"The keys of {can.architecture} are not rotated alike in every layer, or not as "
                'its rotary embedding says; count positions as "absolute".'
            )

    def turn(
        self,
        key: Float[Tensor, "prompt kv_head kept d_head"],
        by: Int[Tensor, "query kept"],
    ) -> Float[Tensor, "prompt kv_head copy d_head"]:
        """A copy of every key for every query, query after query, each rotated on by `by`."""
        wide = repeat(key.float(), "b h k d -> b h (q k) d", q=len(by))
        ids = rearrange(by, "q k -> 1 (q k)").to(key.device)
        cos, sin = self._angles(wide, ids)
        scale = getattr(self._angles, "attention_scaling", 1.0)
        # Some models rotate the first part of a key only, in their attention or in this function.
        part, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
        assert self._rotate is not None
        turned = self._rotate(part, part, cos / scale, sin / scale)[1]
        return torch.cat([turned, rest], dim=-1).to(key.dtype)

    def _turns(self, model: Any) -> bool:
        """Whether every layer's keys turn as they should."""
        device = runner.input_device(model)
        probe = probe_tokens(model)[:1]
        tokens = probe[:, :1].expand_as(probe).to(device)
        cache = DynamicCache()
        aside = only_hooks(model.hook_dict.values(), (), lambda x, hook: None)
        with torch.inference_mode(), runner.evaluating(model), aside:
            given = {cache_argument(model.original_model): cache}
            model.original_model(input_ids=tokens, use_cache=True, **given)
            by = torch.arange(tokens.shape[1])[:, None]
            half = model.cfg.dtype in (torch.float16, torch.bfloat16)
            # Wrong turns miss by the size of a key; half precision by 3 % in SmolLM2's last layers.
            tolerance = 0.2 if half else 1e-3
            try:
                return all(
                    close(self.turn(keys[:, :, :1], by).float(), keys.float(), tolerance)
                    for keys in (layer.keys for layer in cache.layers)
                )
            except RuntimeError as error:  # angles of another width than the keys they turn
                if ran_out_of_memory(error):
                    raise
                return False
