"""Provenance and identity of models.

`model_source` returns name, kind and revision of a model's files. `model_identity` is equal for
models that compute the same: it hashes all weights, the modules and their settings, and the output
of a forward pass over a few tokens.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from sinkscope.devices import ran_out_of_memory
from sinkscope.models.active import (
    has_foreign_hooks,
    in_force,
    is_wiring,
    name_in_model,
    replaced_code,
)
from sinkscope.models.packaged import sha256
from sinkscope.models.probe import evaluating, input_device, only_hooks, probe_tokens
from sinkscope.models.sharing import settings_of, stated_by
from sinkscope.prompts.tokens import Texts


def dtype_of(model: Any) -> str:
    """The weights' dtype, in the form of `Settings.dtype`."""
    return str(next(model.original_model.parameters()).dtype).removeprefix("torch.")


def weights_of(model: Any) -> str:
    """A hash of every weight, of all modules and their settings, and of the config.

    It excludes the effect of hooks, which a report lists separately, and of user code (see
    `own_output`), and is the same on every device.
    """
    return _hash(*_known_parts(model))[:16]


def own_output(model: Any) -> str:
    """A hash of a bridge's output on a few tokens, if user code is involved.

    User code is a custom module, or a ``forward`` replaced on a module, on its class or in the file
    of its class. Its effect is not determined by weights and settings, so the output is needed to
    decide whether two reports are of the same model. Hooks and interventions, which a report lists,
    are temporarily removed.

    Returns:
        16 hexadecimal digits, valid for one kind of device; "" for a model without user code.
    """
    if not any(map(_has_own_code, model.original_model.modules())):
        return ""
    with only_hooks(set(model.hook_dict.values()), (), lambda x, hook: None):
        return _hash(*_output(model, foreign=True))[:16]


def model_identity(model: Any) -> str:
    """A hash that identifies a model: two models with equal identities compute the same.

    It covers every weight and buffer of a checkpoint bit by bit, the class and plain settings of
    every module (including the scale of an adapter, or whether it is disabled), the config, and the
    output of a forward pass over a dozen tokens under all hooks on the model. A copy on another
    device has the same identity. If other code than torch's and transformers' is involved (a hook,
    a custom module), the output is hashed bit by bit, and the identity is then valid for one kind
    of device only.

    The result is not cached, since edits of weights may bypass torch's version counter.

    Args:
        model: A bridge, or a transformers model.

    Returns:
        32 hexadecimal digits.
    """
    return _hash(*_known_parts(model), *_output(model, _foreign(model)))[:32]


def _known_parts(model: Any) -> Iterator[str]:
    module = getattr(model, "original_model", model)
    yield from _weights(module)
    yield from _modules(module)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_component(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("transformer_lens.", "sinkscope."))


def _weights(model: nn.Module) -> Iterator[str]:
    """Name, dtype, shape and hash of every weight and every buffer that is saved."""
    for name, module in sorted(model.named_modules(), key=lambda each: name_in_model(each[0])):
        if _is_component(module):
            continue
        saved = {k: x for k, x in module._buffers.items() if _is_saved(module, k)}
        for key, tensor in sorted({**module._parameters, **saved}.items()):
            if tensor is not None:
                kind = f"{tensor.dtype} {tuple(tensor.shape)}"
                yield f"{name_in_model(name)}.{key} {kind} {_bits(tensor)}"


def _is_saved(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


_WORDS = 2**15
"""32-bit words per chunk: torch copies up to this many in a single thread, and on a busy machine
waiting for other threads takes longer than the work."""


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Fixed random integers of 64 bits (splitmix64)."""
    z = (np.arange(1, _WORDS + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(z.view(np.int64)).to(device)


def _bits(tensor: Tensor) -> str:
    """A hash of a tensor's bits, computed on its device.

    Σ_i m_i w_i modulo 2^64 over words w of 32 bits and random m, for each chunk of words; the sums
    are then hashed. SHA-256 of all bytes would run at about 0.6 GB/s and need them on the CPU.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a wrapper of integers and scales
        names, _ = tensor.__tensor_flatten__()
        return " ".join(_bits(getattr(tensor, name)) for name in names)
    if tensor.is_meta:
        return "offloaded"
    plain = tensor.detach().as_subclass(Tensor).contiguous().flatten()
    if not plain.numel():
        return ""
    raw = plain.view(torch.uint8)
    whole = raw.numel() // 4 * 4
    content = hashlib.sha256(bytes(raw[whole:].tolist()))
    content.update(repr(_sums(raw[:whole].view(torch.int32))).encode())
    return content.hexdigest()[:32]


def _sums(words: Tensor) -> list[int]:
    """Σ_i m_i w_i modulo 2^64 of each chunk of words."""
    multipliers = _multipliers(words.device)
    if words.device.type != "cpu":  # many chunks per launch
        whole = words.numel() // _WORDS * _WORDS
        many = words[:whole].view(-1, _WORDS).split(64)
        sums = [(runs.long() * multipliers).sum(dim=-1) for runs in many]
        if len(rest := words[whole:]):
            sums.append((rest.long() * multipliers[: len(rest)]).sum()[None])
        return torch.cat(sums).tolist() if sums else []
    room = torch.empty(_WORDS, dtype=torch.long)  # reused, as allocation costs more than the sums
    return [
        int(torch.dot(room[: len(run)].copy_(run), multipliers[: len(run)]))
        for run in words.split(_WORDS)
    ]


def _modules(model: nn.Module) -> Iterator[str]:
    """Class and plain settings of every module, and the config."""
    for name, module in sorted(model.named_modules(), key=lambda each: name_in_model(each[0])):
        if _is_component(module) or isinstance(module, nn.ModuleList):
            continue
        kind = f"{name_in_model(name)} {type(module).__module__}.{type(module).__qualname__}"
        yield f"{kind} {settings_of(module)!r}"
    yield json.dumps(stated_by(getattr(model, "config", None)), sort_keys=True, default=repr)


def _foreign(model: Any) -> bool:
    """Whether code other than torch's and transformers' is involved."""
    modules = getattr(model, "original_model", model).modules()
    return has_foreign_hooks(model) or any(map(_is_foreign, modules))


def _is_foreign(module: nn.Module) -> bool:
    if isinstance(module, HookPoint):  # its hooks have been checked
        return False
    if _has_own_code(module):
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(is_wiring, hooks))


def _has_own_code(module: nn.Module) -> bool:
    if not type(module).__module__.startswith(_KNOWN):
        return True
    return any(True for _ in replaced_code(module))


_KNOWN = ("torch.", "transformers.", "transformer_lens.", "sinkscope.")


def _output(model: Any, foreign: bool) -> Iterator[str]:
    """Output of a forward pass: bit by bit, or as a few values that are robust to rounding."""
    try:
        logits = probe_logits(model).double()
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        yield _unrepeatable()
        return
    except Exception:  # the forward pass may raise anything on these tokens
        yield _unrepeatable()
        return
    if foreign:
        yield digest_of(logits)
    elif logits.isfinite().all() and next(_parameters(model)).element_size() >= 4:
        # In half precision the results of two devices differ too much for coarse values.
        wave = torch.arange(logits.numel(), dtype=torch.float64)
        shapes = torch.stack([torch.sin(wave * step) for step in (0.7, 1.3, 2.1, 3.7)])
        size = logits.square().sum().sqrt().clamp_min(1e-30)
        yield repr((shapes @ logits.flatten() / size).div(0.05).round().tolist())


def _unrepeatable() -> str:
    """A unique value for a model that does not run on the probe, which thus equals no other."""
    return secrets.token_hex(16)


def _parameters(model: Any) -> Iterator[Tensor]:
    return getattr(model, "original_model", model).parameters()


def _reach(model: Any) -> int:
    """Number of positions required by the active interventions."""
    return max((at + 2 for one in in_force(model) for at in one.positions), default=0)


def probe_logits(model: Any) -> Tensor:
    """Logits of a bridge or a transformers model on the probe's tokens, with all of its hooks."""
    module = getattr(model, "original_model", model)
    device = input_device(model)
    with evaluating(module), torch.no_grad():
        output = model(probe_tokens(model, at_least=_reach(model)).to(device))
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.detach().float().cpu()


def digest(texts: Texts) -> str:
    """A hash of exact token ids and mask."""
    return digest_of(texts.tokens.long(), texts.mask.long())


def digest_of(*tensors: Tensor) -> str:
    """A hash of exact numbers and of their shapes."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(repr(tuple(tensor.shape)).encode())
        content.update(tensor.double().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


_KEY = "sinkscope_source"


@dataclass(frozen=True)
class ModelSource:
    """Provenance of a loaded model.

    Attributes:
        name: The name, hub id or path as the user gave it; the class for a model in memory.
        kind: "packaged", "hub", "folder", "gguf", "memory" or "bridge".
        known_revision: Commit of a hub model, or the known hash of a packaged one.
        trained_head: Whether the output head was in the checkpoint; otherwise logits and losses
            are meaningless.
        weights: The files hashed by `revision` if no revision is known.
    """

    name: str
    kind: str
    known_revision: str = ""
    trained_head: bool = True
    weights: tuple[Path, ...] = ()

    @cached_property
    def revision(self) -> str:
        """Commit, or "sha256:…" of the weights; "" if there is neither.

        The files are hashed on first access. For several files it is the hash of their names and
        hashes.
        """
        if self.known_revision or not self.weights:
            return self.known_revision
        if len(self.weights) == 1:
            return f"sha256:{sha256(self.weights[0])}"
        lines = "".join(f"{sha256(path)}  {path.name}\n" for path in self.weights)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def attach_source(bridge: Any, source: ModelSource) -> None:
    """Store ``source`` on the bridge, so that it is copied with the bridge."""
    bridge.__dict__[_KEY] = source


def model_source(bridge: Any) -> ModelSource:
    """Source of a bridge's weights; read from the bridge if it was not loaded by `load_model`.

    Args:
        bridge: A TransformerBridge.
    """
    known = bridge.__dict__.get(_KEY)
    return known or ModelSource(name=str(bridge.cfg.model_name), kind="bridge")
