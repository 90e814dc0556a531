"""Verify that a model's own attention applies an edited mask as intended.

Models in transformers differ: most add a mask to the scores, some add it before scaling, some
invert boolean masks, some refuse a mask with a head axis. The streaming path applies masks itself;
everything else is verified numerically: with the edit, the pattern of a probe has to be softmax(ln
A + edit), where A is the pattern without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.attention.support import takes_attention_functions
from sinkscope.devices import ran_out_of_memory
from sinkscope.errors import UnsupportedError
from sinkscope.interventions.masks import MaskIntervention
from sinkscope.models.probe import evaluating, input_device, only_hooks, probe_tokens

Pattern = Float[Tensor, "prompt head query key"]

_verified: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()
"""By model, the kinds of edit and of attention that have been verified."""


def verify(
    edit: MaskIntervention, like: Callable[[int], MaskIntervention], kind: object = None
) -> None:
    """Apply an edit to a few tokens, once for each kind of attention in the model.

    Args:
        edit: The edit to verify.
        like: Makes the same edit in a single layer, at positions that the probe has.
        kind: Everything else about the edit that a verification depends on.

    Raises:
        UnsupportedError: If the model's attention applies it differently.
    """
    if all(name != "attention_mask" for name, _ in edit.arguments.values()):
        return  # the attention of sinkscope.bb, which applies masks directly
    if takes_attention_functions(edit.model):
        return
    done = _verified.setdefault(edit.model, set())
    for layer in edit.layers:
        inner = getattr(edit.model.blocks[layer].attn, "original_component", None)
        key = type(edit), kind, type(inner), edit.caps.windows[layer]
        if key in done:
            continue
        done.add(key)  # first, so that the trial does not verify itself
        try:
            if not _is_applied(like(layer), layer):
                raise UnsupportedError(_refusal(edit))
        except (RuntimeError, ValueError, TypeError) as error:
            done.discard(key)
            if ran_out_of_memory(error):
                raise
            raise UnsupportedError(_refusal(edit)) from error
        except UnsupportedError:
            done.discard(key)
            raise


def _is_applied(edit: MaskIntervention, layer: int) -> bool:
    tokens = probe_tokens(edit.model)
    name = edit.caps.hook("pattern", layer)
    points = set(edit.model.hook_dict.values())
    with only_hooks(points, (), _nothing), evaluating(edit.model), torch.no_grad():
        before = _pattern(edit.model, tokens, name)
        with edit:
            after = _pattern(edit.model, tokens, name)
            bias = edit.edit(torch.zeros(1, 1, *before.shape[2:]))
    want = (before.log() + bias.double()).softmax(-1)
    close = 1e-4 if edit.model.cfg.dtype == torch.float32 else 2e-2
    return bool(((after - want).abs() <= close).all())


def _pattern(model: Any, tokens: Tensor, name: str) -> Pattern:
    kept: list[Pattern] = []

    def keep(pattern: Pattern, hook: Any) -> None:
        kept.append(pattern.double().cpu())

    with model.hooks(fwd_hooks=[(name, keep)]):
        model(tokens.to(input_device(model)), return_type=None)
    return kept[-1]


def _nothing(x: Any, hook: Any) -> None:
    """Do nothing, as a hook."""


def _refusal(edit: MaskIntervention) -> str:
    return (
        f"{edit.caps.architecture} does not apply an edited mask as {type(edit).__name__} intends, "
        "so this intervention cannot be exact there."
    )
