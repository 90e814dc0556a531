"""Copies of a bridge on other devices, each proved to compute what the bridge does.

1. Modules, settings, adapters and hooks of libraries are copied as they are; weights and buffers
   are copied straight to the other device, so that no second copy of them lies on the first.
2. Every weight, module and setting of the copy has to have the hash of the model's, and a forward
   pass over a few tokens has to give its logits.
3. Interventions and hooks of the user's own belong to the model that they were put on; a copy would
   lack them, so a model with any is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.devices import chosen_device
from sinkscope.errors import ModelError, SinkscopeError, UnsupportedError
from sinkscope.models.active import hooked, in_force, user_hooks
from sinkscope.models.bridging import allowed_error
from sinkscope.models.provenance import probe_logits, weights_of
from sinkscope.validation import shown


def check_devices(devices: Any) -> tuple[torch.device, ...]:
    """Devices as they were asked for, each with its index.

    Raises:
        SinkscopeError: If they are no list of names, or none.
        ModelError: If one is not there.
    """
    listed = isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) > 0
    if not listed or not all(isinstance(one, str | torch.device) for one in devices):
        raise SinkscopeError(
            f'devices is {shown(devices)}; expected a list of devices such as ["cuda:0", "cuda:1"].'
        )
    return tuple(torch.empty(0, device=chosen_device(one)).device for one in devices)


def further_devices(model: Any, devices: Sequence[torch.device]) -> list[torch.device]:
    """The devices that a model has to be copied to: all but the one on which it lies.

    Args:
        model: A bridge.
        devices: What `check_devices` gave. One that is there twice gets two replicas.

    Raises:
        ModelError: If the model lies on several devices, or on none of these.
    """
    lies_on = {p.device for p in model.original_model.parameters()}
    if len(lies_on) > 1 or any(p.is_meta for p in model.original_model.parameters()):
        raise ModelError(
            "This model is spread over several devices, and devices=... copies a whole model to "
            "each; load it with device=... on one, or scan it without devices."
        )
    (own,) = lies_on
    if own not in devices:
        raise ModelError(
            f"The model lies on {own}, which is not among the devices "
            f"{', '.join(map(str, devices))}; name it too, or load the model on one of them."
        )
    further = list(devices)
    further.remove(own)
    return further


def replicas(model: Any, devices: Sequence[torch.device]) -> list[Any]:
    """Copies of a bridge, one on each device.

    Args:
        model: A bridge, which is left as it is.
        devices: Where to; may be empty.

    Returns:
        Bridges with weights of their own.

    Raises:
        UnsupportedError: If interventions or hooks of the user's own are on the model.
        ModelError: If the model cannot be copied, or a copy computes something else.
    """
    if not devices:
        return []
    if names := (*map(repr, in_force(model)), *user_hooks(model), *sorted(hooked(model))):
        raise UnsupportedError(
            f"Interventions and hooks stay on the model that they were put on ({names[0]}), and "
            "its copies on other devices would lack them; scan without devices under them."
        )
    weights, logits = weights_of(model), probe_logits(model)
    return [_proved(_copied(model, device), device, weights, logits) for device in devices]


def _copied(model: Any, device: torch.device) -> Any:
    memo: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    modules = (*nn.Module.modules(model), *model.original_model.modules())
    for module in dict.fromkeys(modules):
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is not None and id(x) not in memo:
                memo[id(x)] = _there(x, device)
    try:
        copied = copy.deepcopy(model, memo)
        # Moves no weight; what else knows of a device learns it.
        copied.to(device, print_details=False)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"This {type(model.original_model).__name__} cannot be copied to {device} "
            f"({str(error).splitlines()[0]}); scan it without devices."
        ) from error
    return copied


def _there(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a weight or buffer on `device`, still a parameter if it was one."""
    there = x.detach().to(device, copy=True)
    if not isinstance(x, nn.Parameter):
        return there
    return nn.Parameter(there, requires_grad=x.requires_grad)


def _proved(copied: Any, device: torch.device, weights: str, logits: Tensor) -> Any:
    found = probe_logits(copied) if weights_of(copied) == weights else None
    if found is not None and found.shape == logits.shape:
        dtype = next(copied.original_model.parameters()).dtype
        off = (found - logits).norm() / logits.norm().clamp_min(1e-30)
        if float(off) <= allowed_error(dtype):
            return copied
    raise ModelError(
        f"A copy of this {type(copied.original_model).__name__} on {device} computes something "
        "else than the model, perhaps because code of one's own holds on to the original; scan it "
        "without devices."
    )
