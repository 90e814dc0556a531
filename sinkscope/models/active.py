"""Interventions and hooks that are currently active on a model.

A report lists them, and some metrics are undefined under some of them. Prompts must be long enough
to contain the positions that are edited: causal models run right-padded prompts without a mask, so
an edit beyond a prompt's last token would silently change a pad.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from jaxtyping import Bool
from torch import Tensor, nn

from sinkscope.errors import TextError

# -- hooks on a model ------------------------------------------------------------------------------


def hooked(model: Any) -> set[str]:
    """Names of the hook points that have hooks, other than permanent ones (the model's own).

    Covers every intervention except those that edit weights (`PositionEmbeddingEdit`), which
    `provenance.model_identity` detects.
    """
    return {
        name
        for name, point in model.hook_dict.items()
        if any(not handle.is_permanent for handle in point.fwd_hooks)
    }


_OURS = (
    *("torch.", "transformers.", "transformer_lens.", "sinkscope.", "accelerate.", "peft."),
    "jaxtyping.",  # wraps functions to check them; the inner function decides
)


def user_hooks(model: Any) -> tuple[str, ...]:
    """Places with hooks that belong neither to this package nor to a library.

    Returns:
        Names of hook points, and of the model's modules with a torch hook.
    """
    named = [
        point.name or name  # hook_dict has aliases of one point
        for name, point in model.hook_dict.items()
        if any(_is_users(handle.user_hook) for handle in point.fwd_hooks)
    ]
    for name, module in model.original_model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(map(_is_users, hooks)) and not hasattr(module, "fwd_hooks"):
            named.append(f"{name_in_model(name)} (torch)")
    return tuple(sorted(set(named)))


def name_in_model(name: str) -> str:
    """The name of a weight or module without the components that a bridge inserts."""
    return name.replace("_original_component.", "").replace("._original_component", "")


def is_wiring(hook: Any) -> bool:
    """Whether a hook belongs to a library."""
    return not _is_users(hook)


def _is_users(hook: Any) -> bool:
    return hook is not None and not all(f"{name}.".startswith(_OURS) for name in _origins(hook))


def _origins(function: Any) -> Iterator[str]:
    """The modules in which a function, and the functions it wraps, are defined.

    Read from the globals, because `functools.wraps` copies ``__module__`` from the wrapped
    function.
    """
    while isinstance(function, functools.partial):
        function = function.func
    inner = getattr(function, "__func__", function)  # of a bound method
    if isinstance(inner, FunctionType):
        yield str(inner.__globals__.get("__name__"))
    else:
        yield getattr(inner, "__module__", None) or type(inner).__module__
    if (wrapped := getattr(inner, "__wrapped__", None)) is not None:
        yield from _origins(wrapped)


def replaced_code(module: nn.Module) -> Iterator[Any]:
    """User functions that replace functions of a library's module.

    These are a ``forward`` set on the module or on its class, and functions replaced in the file
    that defines the class (``modeling_llama.apply_rotary_pos_emb``, say). Wrappers that accelerate
    puts around a forward are unwrapped.
    """
    own = vars(module)
    places = (own.get("forward"), own.get("_old_forward"), type(module).forward)
    yield from filter(_is_users, places)
    if type(module).__module__.startswith(_MODELS):
        yield from _replaced_in(type(module).__module__)


_MODELS = ("transformers.models.", "torch.nn.modules.")


def _replaced_in(file: str) -> Iterator[Any]:
    """Functions in a library's file that were defined neither by a library nor by Python."""
    for function in vars(sys.modules[file]).values():
        if isinstance(function, FunctionType) and _is_users(function):
            packages = {name.partition(".")[0] for name in _origins(function)}
            if not packages <= sys.stdlib_module_names:
                yield function


@runtime_checkable
class InForce(Protocol):
    """The properties of an active intervention.

    Attributes:
        positions: Positions that every prompt must have.
        softmax: Whether rows of attention remain a softmax: weights that sum to at most one.
        even: Whether the edit of a prompt depends on all positions of the batch, padding included.
    """

    @property
    def positions(self) -> tuple[int, ...]:
        """See the class."""
        ...

    @property
    def softmax(self) -> bool:
        """See the class."""
        ...

    @property
    def even(self) -> bool:
        """See the class."""
        ...


_in_force: WeakKeyDictionary[Any, list[InForce]] = WeakKeyDictionary()


@contextmanager
def enforced(model: Any, intervention: InForce) -> Iterator[None]:
    """Register an intervention as active on the model within the context."""
    interventions = _in_force.setdefault(model, [])
    interventions.append(intervention)
    try:
        yield
    finally:
        interventions.remove(intervention)


def in_force(model: Any) -> tuple[InForce, ...]:
    """The interventions active on a model, outermost first."""
    return tuple(_in_force.get(model, ()))


def has_foreign_hooks(bridge: Any) -> bool:
    """Whether a bridge has hooks, permanent ones included, or active interventions."""
    points = getattr(bridge, "hook_dict", {}).values()
    hooks = [handle.user_hook for point in points for handle in point.fwd_hooks]
    return bool(in_force(bridge)) or not all(map(is_wiring, hooks))


def refuse_short_prompts(model: Any, mask: Bool[Tensor, "prompt position"]) -> None:
    """Refuse right-padded prompts that end before a position that an intervention edits.

    Raises:
        TextError: If a prompt is too short, or if prompts differ in length under an intervention
            whose edit of a prompt depends on all positions of the batch.
    """
    if any(one.even for one in in_force(model)) and not bool(mask.all()):
        raise TextError(
            "An intervention computes a range over whole prompts, which would include padding, as "
            "these prompts differ in length; use prompts of one length."
        )
    needed = [position for one in in_force(model) for position in one.positions]
    farthest = max(needed, default=-1)
    if farthest >= 0 and farthest >= (shortest := int(mask.sum(dim=1).min())):
        raise TextError(
            f"An intervention changes position {farthest}, which lies outside the shortest prompt, "
            f"whose positions run from 0 to {shortest - 1}; use longer prompts or an earlier "
            "position."
        )
