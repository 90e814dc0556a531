"""Does a model's own attention take an edited mask as the edit means it?

transformers has no one rule: most models add a mask to the scores, some add it before they scale
them, some read a boolean one the other way round, some refuse one with an axis for heads. The
streaming path applies masks itself. Everything else is asked, by arithmetic: with the edit in
force the pattern of a probe has to be softmax(ln A + edit).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope._out_of_memory import ran_out_of_memory
from sinkscope._probe import evaluating, only_hooks, probe_tokens
from sinkscope.capture._support import attention_of
from sinkscope.errors import UnsupportedError

if TYPE_CHECKING:
    from sinkscope.interventions._masking import MaskIntervention

Pattern = Float[Tensor, "prompt head query key"]

_proved: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def prove(
    edit: MaskIntervention, like: Callable[[int], MaskIntervention], kind: object = None
) -> None:
    """Try an edit on a few tokens, once for each kind of attention in the model.

    Args:
        edit: What is to be proved.
        like: Gives the same edit of one layer alone, at positions that the probe has.
        kind: What else a proof holds for only.

    Raises:
        UnsupportedError: If the model's attention does something else.
    """
    if all(name != "attention_mask" for name, _ in edit.masks.values()):
        return  # the laboratory's attention, which is ours
    try:
        attention_of(edit.model)
        return
    except UnsupportedError:
        pass
    done = _proved.setdefault(edit.model, set())
    for layer in edit.layers:
        inner = getattr(edit.model.blocks[layer].attn, "original_component", None)
        proof = type(edit), kind, type(inner), edit.can.windows[layer]
        if proof in done:
            continue
        done.add(proof)  # also keeps the trial itself from being tried
        try:
            if not _means_it(like(layer), layer):
                raise UnsupportedError(_refusal(edit))
        except (RuntimeError, ValueError, TypeError) as error:
            done.discard(proof)
            if ran_out_of_memory(error):
                raise
            raise UnsupportedError(_refusal(edit)) from error
        except UnsupportedError:
            done.discard(proof)
            raise


def _means_it(edit: MaskIntervention, layer: int) -> bool:
    tokens = probe_tokens(edit.model)
    name = edit.can.hook("pattern", layer)
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
        model(tokens.to(model.cfg.device), return_type=None)
    return kept[-1]


def _nothing(x: Any, hook: Any) -> None:
    """What is hooked to nothing."""


def _refusal(edit: MaskIntervention) -> str:
    return (
        f"{edit.can.architecture} does not take an edited mask as {type(edit).__name__} means it, "
        "so this intervention cannot be exact there."
    )
