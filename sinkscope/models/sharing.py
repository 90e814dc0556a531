"""Copies of models that share their weights.

TransformerLens inserts its components into the model that it wraps. To leave the user's model
unchanged, a bridge is built on a copy that has its own modules, configs, training flags and lists
of hooks, but shares parameters, buffers and hook functions with the model. No weight is copied, and
in-place edits of a weight affect both.

Later changes of the structure are *not* shared: a new hook, an adapter that is added or disabled, a
module that is replaced. They are detected by comparing `structure_of`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.overrides import TorchFunctionMode

from sinkscope.errors import ModelError
from sinkscope.models.active import is_wiring, replaced_code

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """A copy of a model's modules and configs over the same parameters, buffers and hooks.

    Blocks wrapped by `torch.compile` are unwrapped in the copy, as a compiled graph would bypass
    the hook points.

    Raises:
        ModelError: If the model contains something that cannot be copied.
    """
    inside = set(map(id, model.modules()))
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = _rewritten(module)
        buffers = [x for name, x in module._buffers.items() if name not in own]
        shared = (*module._parameters.values(), *buffers)
        memo |= {id(x): x.clone() for name in own if (x := module._buffers[name]) is not None}
        hooks = (_owner(hook) for hooks in _hooks(module) for hook in hooks.values())
        memo |= {id(x): x for x in (*shared, *hooks) if x is not None and id(x) not in inside}
    try:
        with _SharedTensors():
            for module in reversed(list(model.modules())):
                if isinstance(module, OptimizedModule):
                    memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
            return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"sinkscope measures a copy of this {type(model).__name__} that shares its weights, "
            f"but the model contains something that cannot be copied ({error}); remove it first."
        ) from error


def is_elsewhere(model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether any weight is on another device, or of another dtype, than requested."""
    where = None if device is None else torch.empty(0, device=device).device
    return any(
        (where is not None and p.device != where)
        or (dtype is not None and p.is_floating_point() and p.dtype != dtype)
        for p in model.parameters()
    )


def moved(copied: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """Move and cast a `shared_copy`, which ends the sharing."""
    own: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, p in module._parameters.items():
            if p is not None:
                alias = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
                module._parameters[name] = own.setdefault(id(p), alias)
    return copied.to(device=device, dtype=dtype)


class _SharedTensors(TorchFunctionMode):
    """Mode in which `copy.deepcopy` shares tensors instead of copying them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def _hooks(module: nn.Module) -> Iterator[Mapping[int, Any]]:
    """The dictionaries in which torch stores the forward and backward hooks of a module."""
    yield module._forward_hooks
    yield module._forward_pre_hooks
    yield module._backward_hooks
    yield module._backward_pre_hooks


def _owner(hook: Any) -> Any:
    """The object with a hook's state, which belongs to the user and must not be copied."""
    if isinstance(hook, MethodType):
        return hook.__self__
    return None if isinstance(hook, FunctionType) else hook


Structure = tuple[Any, ...]


def structure_of(model: nn.Module) -> Structure:
    """Everything about a model that a `shared_copy` of it does not share.

    Modules and their classes, their parameters and buffers with devices, their hooks, and their
    plain settings (the scale of an adapter, say). Training flags are left out, as scans use eval
    mode. Equal structures mean that a copy still corresponds to the model.
    """
    config = getattr(model, "config", None)
    return (repr(stated_by(config)), *map(_state_of, model.modules()))


NOT_STATED = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    | {"return_dict", "output_attentions", "output_hidden_states", "_attn_implementation"}
)
"""Config entries that do not affect what a model computes (dtypes are those of the weights)."""


def stated_by(config: Any) -> dict[str, Any]:
    """The config entries that affect what a model computes."""
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    return {key: known[key] for key in sorted(known) if key not in NOT_STATED}


def _state_of(module: nn.Module) -> Structure:
    tensors = {**module._parameters, **module._buffers}
    tensors |= dict.fromkeys(_rewritten(module))
    own = vars(module)
    return (
        id(module),
        type(module),
        tuple((name, id(x), _kind(x)) for name, x in tensors.items()),
        tuple(
            (key, id(hook))
            for hooks in _hooks(module)
            for key, hook in hooks.items()
            if not is_wiring(hook)
        ),
        tuple(map(_function, (own.get("forward"), type(module).forward, *replaced_code(module)))),
        repr(settings_of(module)),
    )


def _function(function: Any) -> Any:
    """An identifier of a function that differs from that of a later function at its address."""
    if isinstance(function, functools.partial):
        return (_function(function.func), *map(id, function.args))
    if isinstance(function, MethodType):
        return _function(function.__func__), id(function.__self__)
    try:
        return ref(function)  # a dead reference equals no other
    except TypeError:
        return id(function)


def _rewritten(module: nn.Module) -> set[str]:
    """Names of a rotary embedding's buffers that a forward pass may rewrite for its length."""
    if not hasattr(module, "max_seq_len_cached"):
        return set()
    kinds = vars(module).get("rope_type")
    kinds = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    if all(kind is not None and "dynamic" not in kind and kind != "longrope" for kind in kinds):
        return set()
    return {name for name in module._buffers if "original" not in name}


def _kind(x: Tensor | None) -> Any:
    return None if x is None else (x.dtype, x.device, tuple(x.shape))


NOT_SETTINGS = frozenset(vars(nn.Module())) | {
    "gradient_checkpointing",
    "max_seq_len_cached",
    "_is_hf_initialized",
}
"""Attributes of modules that are not settings: torch's own, and caches of forward passes."""


def settings_of(module: nn.Module) -> dict[str, Any]:
    """A module's plain settings: the scale of an adapter, an epsilon, whether it is disabled.

    The settings of a transformers model are in its config; its other attributes are ignored.
    """
    own = {} if hasattr(module, "base_model_prefix") else vars(module)
    return {key: own[key] for key in sorted(own) if key not in NOT_SETTINGS and is_plain(own[key])}


def is_plain(value: Any) -> bool:
    """Whether an attribute is a number, a string, or a container of these."""
    if isinstance(value, Mapping):
        return all(map(is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
