"""Which interventions are in force on a model, for whoever measures it meanwhile.

A report names them, a metric may lose its meaning under one, and prompts have to reach the
positions that they change: a causal model is not told where a right-padded prompt ends, so that an
edit beyond its last token would be one of a pad, and nobody would notice.
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

# -- which hooks somebody has put on a model -------------------------------------------------------


def hooked(model: Any) -> set[str]:
    """Names of the hook points with hooks on them, permanent ones (the model's own) left out.

    Every intervention shows here but one that edits weights (`PositionEmbeddingEdit`), which
    `provenance.model_identity` tells apart.
    """
    return {
        name
        for name, point in model.hook_dict.items()
        if any(not handle.is_permanent for handle in point.fwd_hooks)
    }


_OURS = (
    *("torch.", "transformers.", "transformer_lens.", "sinkscope.", "accelerate.", "peft."),
    "jaxtyping.",  # wraps what it checks; the inner function tells whose it is
)


def user_hooks(model: Any) -> tuple[str, ...]:
    """Where hooks are that neither this package nor a library put there.

    Returns:
        Names of hook points, and of the model's own modules that have a torch hook.
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
    """The name of a weight or module without the components that a bridge puts in between."""
    return name.replace("_original_component.", "").replace("._original_component", "")


def is_wiring(hook: Any) -> bool:
    """Whether a hook is one that a library put there for its own purposes."""
    return not _is_users(hook)


def _is_users(hook: Any) -> bool:
    return hook is not None and not all(f"{name}.".startswith(_OURS) for name in _origins(hook))


def _origins(function: Any) -> Iterator[str]:
    """The modules whose code runs when a function is called, also of what it wraps.

    The name that `functools.wraps` copies is that of the wrapped function; where a function was
    defined, its globals tell.
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
    """Functions of the user's own that stand in for those of a library's module.

    These are a ``forward`` set on the module or on its class, and a function of the file that
    defines the class (``modeling_llama.apply_rotary_pos_emb``, say). What accelerate puts around a
    forward is looked into.
    """
    own = vars(module)
    places = (own.get("forward"), own.get("_old_forward"), type(module).forward)
    yield from filter(_is_users, places)
    if type(module).__module__.startswith(_MODELS):
        yield from _replaced_in(type(module).__module__)


_MODELS = ("transformers.models.", "torch.nn.modules.")


def _replaced_in(file: str) -> Iterator[Any]:
    """Functions of a library's file that are not the libraries' nor Python's own."""
    for found in vars(sys.modules[file]).values():
        if isinstance(found, FunctionType) and _is_users(found):
            known = (name.partition(".")[0] in sys.stdlib_module_names for name in _origins(found))
            if not all(known):
                yield found


@runtime_checkable
class InForce(Protocol):
    """What has to be known of an intervention.

    Attributes:
        positions: Those that every prompt must have.
        softmax: Whether rows of attention stay a softmax's: weights that sum to one at most.
        even: Whether the edit of a prompt depends on all positions that run, padding too.
    """

    @property
    def positions(self) -> tuple[int, ...]:
        """See above."""
        ...

    @property
    def softmax(self) -> bool:
        """See above."""
        ...

    @property
    def even(self) -> bool:
        """See above."""
        ...


_in_force: WeakKeyDictionary[Any, list[InForce]] = WeakKeyDictionary()


@contextmanager
def enforced(model: Any, intervention: InForce) -> Iterator[None]:
    """Inside, the intervention is in force on the model."""
    interventions = _in_force.setdefault(model, [])
    interventions.append(intervention)
    try:
        yield
    finally:
        interventions.remove(intervention)


def in_force(model: Any) -> tuple[InForce, ...]:
    """The interventions in force on a model, the outermost first."""
    return tuple(_in_force.get(model, ()))


def has_foreign_hooks(bridge: Any) -> bool:
    """Whether hooks or interventions of somebody are on a bridge, permanent hooks included."""
    points = getattr(bridge, "hook_dict", {}).values()
    hooks = [handle.user_hook for point in points for handle in point.fwd_hooks]
    return bool(in_force(bridge)) or not all(map(is_wiring, hooks))


def refuse_short_prompts(model: Any, mask: Bool[Tensor, "prompt position"]) -> None:
    """Refuse right-padded prompts that end before a position that an intervention changes.

    Raises:
        TextError: If one does; or if prompts differ in length under an intervention whose edit of
            a prompt depends on all positions that run.
    """
    if any(one.even for one in in_force(model)) and not bool(mask.all()):
        raise TextError(
            "An intervention takes a range over whole prompts, which padding would be part of, and "
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
