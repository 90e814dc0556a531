"""Loading any model that TransformerLens can bridge: by name, from files, or from memory."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens import TransformerBridge
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
)
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sinkscope.attention.upstream import mended
from sinkscope.devices import chosen_device
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.checkpoint import (
    CheckpointReader,
    check_files,
    check_finite,
    has_tokenizer,
    one_sentence,
    quiet,
    seeded_weights,
)
from sinkscope.models.gguf import read_gguf
from sinkscope.models.hub import find_on_hub
from sinkscope.models.packaged import BUILT_IN, PACKAGES, packaged_folder
from sinkscope.models.provenance import ModelSource, attach_source, model_source

# --- Bridging a transformers model that is already in memory, with or without a tokenizer.

_BRIDGE = "_sinkscope_bridge"


def bridge_in_memory(model: PreTrainedModel, tokenizer: Any, name: str) -> TransformerBridge:
    """Wrap a transformers model, which is changed in place, and needs no tokenizer.

    Raises:
        ModelError: If the model is in a bridge already.
        UnsupportedError: If TransformerLens has no adapter for its class.
    """
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is inside a TransformerBridge already; pass the bridge."
        )
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(model).__name__}, so sinkscope cannot "
            "measure it."
        )
    _own_config(model)
    # Other implementations show no attention patterns. Calling boot_transformers(hf_model=...)
    # would do the same, but it asks the hub for a tokenizer where none is given.
    model.set_attn_implementation("eager")
    return build_bridge_from_module(
        model.eval(),
        type(model).__name__,
        hf_config=copy.deepcopy(model.config),
        tokenizer=None if tokenizer is None else self_contained(tokenizer),
        model_name=name,
    )


def remember(model: PreTrainedModel, bridge: TransformerBridge) -> None:
    """Let a model that was given once be given again: whoever scans it never saw the bridge."""
    model.__dict__[_BRIDGE] = bridge  # past nn.Module, which would register it


def bridge_of(model: PreTrainedModel) -> TransformerBridge | None:
    """The bridge that a transformers model was wrapped in by `load_model`, or None."""
    return model.__dict__.get(_BRIDGE)


def is_headless(model: PreTrainedModel) -> bool:
    """Whether this is a bare body, like BertModel, which TransformerLens cannot bridge."""
    return model.base_model is model and type(model).__name__ not in SUPPORTED_ARCHITECTURES


def with_untrained_head(body: PreTrainedModel) -> PreTrainedModel:
    """Put a bare body under the output head of its family; the head's weights are drawn, seeded.

    The body is used, not copied. Nothing measured inside the blocks depends on the head.

    Raises:
        UnsupportedError: If TransformerLens has no model of this family.
    """
    config = copy.deepcopy(body.config)
    config.architectures = None
    try:
        headed = getattr(transformers, determine_architecture_from_hf_config(config))
    except (ValueError, AttributeError) as error:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(body).__name__}, so sinkscope cannot "
            "measure it."
        ) from error
    with seeded_weights():
        model = headed(config)
    model = model.to(device=body.device, dtype=body.dtype)
    setattr(model, model.base_model_prefix, body)
    model.tie_weights()
    return model


def self_contained(tokenizer: Any) -> Any:
    """A tokenizer that TransformerLens takes, whether or not it was read from a folder.

    TransformerLens reloads a tokenizer from its ``name_or_path`` to make it prepend BOS, which
    fails for one that was made in memory. Saying that BOS is seen to prevents the reload; whether
    the tokenizer really prepends one is found out by encoding.
    """
    if tokenizer.init_kwargs.get("name_or_path"):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer


def _own_config(model: nn.Module) -> None:
    """Give a model configs of its own: models share those they were built from.

    Otherwise switching this model's attention would switch every sibling's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, memo)


def place(model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move and cast a model in place where that was asked for."""
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class _Request:
    """What the caller asked for, resolved."""

    device: torch.device | None
    dtype: torch.dtype | None
    device_map: Any
    trust_remote_code: bool
    tokenizer: Any
    allow_pickle: bool
    name: str


def load_model(
    spec: str | os.PathLike[str] | nn.Module,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    revision: str | None = None,
    checkpoint: int | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
    name: str | None = None,
) -> TransformerBridge:
    """Load a model as a TransformerBridge: eval mode, eager attention, weights as published.

    Args:
        spec: A packaged model ("smollm2-135m", "minilm-l6", "bb-3l"), a Hugging Face Hub id, a
            model folder, a ``.gguf`` file, a transformers model in memory (which is wrapped, and
            thereby changed, in place; the next time it is given, its bridge is returned), or a
            bridge (which is returned as it is).
        device: Where to put it; a GPU if there is one. A model in memory stays where it is.
        dtype: "float32" (the default, whatever the checkpoint's), "bfloat16", "float16", or "auto"
            for the checkpoint's own. A model in memory keeps its own.
        revision: Branch, tag or commit of a hub model.
        checkpoint: Training step of a hub model whose checkpoints TransformerLens knows (Pythia,
            stanford-crfm).
        device_map: Spread a large model over devices, as transformers does; instead of ``device``.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read weights from pickle files, which can run code, if there are no others.
        tokenizer: A tokenizer to use instead of the checkpoint's. Give it here: one that is set on
            the bridge later never prepends BOS.
        name: What reports call the model; ``spec`` by default.

    Returns:
        The bridge. Without a tokenizer it takes exact token ids only.

    Raises:
        ModelError: If the model cannot be found, read or trusted.
        UnsupportedError: If TransformerLens cannot bridge its architecture.

    Example:
        >>> model = load_model("smollm2-135m", device="cpu")
        >>> model_source(model).kind
        'packaged'
    """
    if isinstance(spec, TransformerBridge):
        asked = (device, dtype, revision, checkpoint, device_map, tokenizer)
        if any(choice is not None for choice in asked):
            raise ModelError(
                "A TransformerBridge is used as it is: move or cast it with bridge.to(...) before "
                "passing it, and pass no other arguments."
            )
        return mended(spec)
    if device is not None and device_map is not None:
        raise ModelError("Pass either device or device_map, not both.")
    in_memory = isinstance(spec, PreTrainedModel)
    if in_memory and (known := bridge_of(spec)) is not None:
        asked = (device, dtype, revision, checkpoint, device_map, tokenizer, name)
        if any(choice is not None for choice in asked):
            raise ModelError(
                f"This {type(spec).__name__} has been loaded already, as it was then; pass it "
                "alone, or load it with these arguments first."
            )
        return known
    if not in_memory and not isinstance(spec, str | os.PathLike):
        raise ModelError(
            f"A {type(spec).__name__} is neither a transformers model nor a TransformerBridge, nor "
            "a name or path to load one from."
        )
    request = _Request(
        device=None if device_map or (in_memory and device is None) else chosen_device(device),
        dtype=_dtype(dtype, default=None if in_memory else torch.float32),
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        name=name or (type(spec).__name__ if in_memory else os.fspath(spec)),
    )
    if in_memory:
        bridge, source = _from_memory(spec, request)
    else:
        with quiet():
            bridge, source = _from_name(os.fspath(spec), request, revision, checkpoint)
        bridge.requires_grad_(False)
    bridge.cfg.model_name = request.name
    check_finite(bridge.original_model, request.name)
    attach_source(bridge, replace(source, name=request.name))
    if in_memory:
        remember(spec, bridge)
    return mended(bridge).eval()


Loaded = tuple[TransformerBridge, ModelSource]


def _from_name(
    spec: str, request: _Request, revision: str | None, checkpoint: int | None
) -> Loaded:
    """Find out what a string names, and load it."""
    path = Path(spec).expanduser()
    on_hub = spec not in PACKAGES and spec not in BUILT_IN and not path.exists()
    if not on_hub and (revision is not None or checkpoint is not None):
        raise ModelError(f"revision and checkpoint are for Hugging Face Hub models; {spec} is not.")
    if spec in BUILT_IN:
        if request.device_map is not None or request.tokenizer is not None:
            raise ModelError(
                f"{spec} fits on any device and has a tokenizer of its own; pass neither "
                "device_map nor tokenizer."
            )
        bridge = BUILT_IN[spec].load(spec, request.device, request.dtype)
        return bridge, replace(model_source(bridge), kind="packaged")
    if spec in PACKAGES:
        bridge, _ = _from_folder(packaged_folder(spec), request)
        package = PACKAGES[spec]
        revision = f"sha256:{package.sha256}"
        return bridge, ModelSource(spec, "packaged", revision, package.trained_head)
    if path.is_dir():
        return _from_folder(path, request)
    if path.is_file():
        return _from_gguf(path, request)
    if path.suffix == ".gguf" or path.is_absolute() or spec.startswith((".", "~")):
        raise ModelError(f"There is no file or folder {spec}; {_what_would_work(spec)}")
    return _from_hub(spec, request, revision, checkpoint)


def _from_folder(folder: Path, request: _Request) -> Loaded:
    files = tuple(path.name for path in folder.iterdir())
    check_files(str(folder), files, request.allow_pickle)
    weights = tuple(sorted(folder.glob("*.safetensors")))
    bridge, trained_head = _from_checkpoint(str(folder), None, has_tokenizer(files), request)
    return bridge, ModelSource(str(folder), "folder", trained_head=trained_head, weights=weights)


def _from_hub(spec: str, request: _Request, revision: str | None, checkpoint: int | None) -> Loaded:
    if checkpoint is not None:
        revision = _revision_of(spec, revision, checkpoint)
    found = find_on_hub(spec, revision, _what_would_work(spec))
    check_files(spec, found.files, request.allow_pickle)
    bridge, trained_head = _from_checkpoint(
        spec, found.revision, has_tokenizer(found.files), request
    )
    return bridge, ModelSource(spec, "hub", found.revision, trained_head)


def _from_checkpoint(
    where: str, revision: str | None, has_own_tokenizer: bool, request: _Request
) -> tuple[TransformerBridge, bool]:
    """Read a folder or hub repository; also say whether its output head is trained."""
    reader = CheckpointReader(request.allow_pickle)
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": request.trust_remote_code,
    }
    with one_sentence(request.name):
        config = AutoConfig.from_pretrained(where, **common)
        dtype = request.dtype or getattr(config, "dtype", None) or torch.float32
        if has_own_tokenizer or request.tokenizer is not None:
            bridge = TransformerBridge.boot_transformers(
                where,
                device=request.device,
                dtype=dtype,
                device_map=request.device_map,
                model_class=reader,
                tokenizer=request.tokenizer and self_contained(request.tokenizer),
                **common,
            )
        else:
            # boot_transformers cannot do without a tokenizer.
            model = reader.from_pretrained(
                where, config=config, dtype=dtype, device_map=request.device_map, **common
            )
            place(model, request.device, None)
            bridge = bridge_in_memory(model, None, where)
    return bridge, reader.trained_head


def _from_gguf(path: Path, request: _Request) -> Loaded:
    if path.suffix != ".gguf":
        raise ModelError(
            f"{path} is a file but not a .gguf file; give the folder that holds the model's "
            "config.json and .safetensors files."
        )
    if request.device_map is not None:
        raise ModelError("device_map is not for GGUF files; pass device instead.")
    model, tokenizer = read_gguf(path, request.dtype or torch.float32)
    with one_sentence(request.name):
        place(model, request.device, None)
        bridge = bridge_in_memory(model, request.tokenizer or tokenizer, str(path))
    return bridge, ModelSource(str(path), "gguf", weights=(path,))


def _from_memory(model: PreTrainedModel, request: _Request) -> Loaded:
    if request.device_map is not None:
        raise ModelError("device_map is for models read from files; this one is in memory.")
    headless = is_headless(model)
    with one_sentence(request.name):
        if headless:
            model = with_untrained_head(model)
        place(model, request.device, request.dtype)
        bridge = bridge_in_memory(model, request.tokenizer, request.name)
    return bridge, ModelSource(request.name, "memory", trained_head=not headless)


def _revision_of(spec: str, revision: str | None, checkpoint: int) -> str:
    from transformer_lens.model_bridge.sources.transformers import _resolve_checkpoint_to_revision

    if revision is not None:
        raise ModelError("Pass either revision or checkpoint, not both.")
    with one_sentence(f"checkpoint {checkpoint} of {spec}"):
        return _resolve_checkpoint_to_revision(spec, None, checkpoint)


def _dtype(dtype: str | torch.dtype | None, default: torch.dtype | None) -> torch.dtype | None:
    """The dtype asked for; ``None`` stands for the checkpoint's own."""
    if dtype is None:
        return default
    if dtype == "auto":
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(
            f"{dtype!r} is not a dtype for weights; choose float32, bfloat16, float16 or auto."
        )
    return chosen


def _what_would_work(spec: str) -> str:
    names = [*PACKAGES, *BUILT_IN]
    close = get_close_matches(Path(spec).name.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}? Otherwise give" if close else "give"
    return (
        f"{hint} a packaged model ({', '.join(names)}), a Hugging Face Hub id, a model folder or a "
        ".gguf file."
    )
