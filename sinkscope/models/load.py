"""Loading any model that TransformerLens can bridge: by name, from files, or from memory.

`load_model` reads the model from its input; `bridging` builds and verifies the bridge.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformer_lens import TransformerBridge
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sinkscope.attention.upstream import mended
from sinkscope.devices import chosen_device, exclusive, usual_torch
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.active import has_foreign_hooks
from sinkscope.models.bridging import (
    bridge_of,
    build,
    is_current,
    is_headless,
    prove,
    remember,
    self_contained,
    tokenizer_of,
    with_untrained_head,
)
from sinkscope.models.checkpoint import (
    CheckpointReader,
    check_files,
    check_finite,
    has_tokenizer,
    one_sentence,
    quiet,
)
from sinkscope.models.fused import put_together
from sinkscope.models.gguf import read_gguf
from sinkscope.models.hub import check_hub_indices, find_on_hub
from sinkscope.models.packaged import BUILT_IN, PACKAGES, packaged_folder
from sinkscope.models.provenance import ModelSource, attach_source, model_source
from sinkscope.models.rope import forget_earlier_lengths
from sinkscope.models.shards import check_indices
from sinkscope.models.sharing import is_elsewhere, moved, shared_copy
from sinkscope.validation import shown


@dataclass(frozen=True)
class _Request:
    """The resolved request of the caller."""

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
            model folder, a ``.gguf`` file, a transformers model in memory, or a bridge (which is
            returned unchanged). A model in memory is not modified: its bridge is a copy that shares
            its weights, so that in-place edits of them take effect, and is returned again for the
            same model. Wrappers (`torch.compile`, `nn.DataParallel`, `AveragedModel`, a
            `PeftModel`, a pipeline) are replaced by the model inside.
        device: Device of the model; by default a GPU if there is one. A model in memory stays on
            its device by default; for another one, its weights are copied.
        dtype: "float32" (the default, whatever the checkpoint's), "bfloat16", "float16", or "auto"
            for that of the checkpoint. A model in memory keeps its dtype by default; for another
            one, its weights are copied.
        revision: Branch, tag or commit of a hub model.
        checkpoint: Training step of a hub model with checkpoints listed in TransformerLens (Pythia,
            stanford-crfm).
        device_map: Spread a large model over devices, as in transformers; instead of ``device``.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read weights from pickle files, which can run code, if there are no others.
        tokenizer: A tokenizer to use unchanged instead of the checkpoint's, or the name or folder
            of one. Pass it here: one that is set on the bridge later never prepends BOS.
        name: Name of the model in reports; ``spec`` by default.

    Returns:
        The bridge. Without a tokenizer it accepts exact token ids only.

    Raises:
        ModelError: If the model cannot be found, read or trusted.
        UnsupportedError: If TransformerLens cannot bridge its architecture.

    Example:
        >>> model = load_model("smollm2-135m", device="cpu")
        >>> model_source(model).kind
        'packaged'
    """
    spec, tokenizer = unwrapped(spec, tokenizer)
    choices = (device, dtype, revision, checkpoint, device_map, tokenizer)
    chosen = any(choice is not None for choice in choices)
    if isinstance(spec, TransformerBridge):
        return _as_it_is(spec, chosen)
    if device is not None and device_map is not None:
        raise ModelError("Pass either device or device_map, not both.")
    in_memory = isinstance(spec, PreTrainedModel)
    if not in_memory and not isinstance(spec, str | os.PathLike):
        raise ModelError(
            f"A {type(spec).__name__} is neither a transformers model nor a TransformerBridge, nor "
            "the name or path of one."
        )
    if isinstance(spec, str) and not spec:
        raise ModelError(f"The name of the model is empty; {_what_would_work(spec)}")
    if spec in BUILT_IN and (device_map is not None or tokenizer is not None):
        raise ModelError(
            f"{spec} fits on any device and has a tokenizer of its own; pass neither device_map "
            "nor tokenizer."
        )
    request = _Request(
        device=None if device_map or (in_memory and device is None) else chosen_device(device),
        dtype=chosen_dtype(dtype, default=None if in_memory else torch.float32),
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        tokenizer=_tokenizer(tokenizer, trust_remote_code),
        allow_pickle=allow_pickle,
        name=name or (type(spec).__name__ if in_memory else os.fspath(spec)),
    )
    with usual_torch():
        if in_memory:
            with exclusive(spec):
                return _from_memory(spec, request, anew=chosen or name is not None)
        with quiet():
            loaded = _from_name(os.fspath(spec), request, revision, checkpoint)
        loaded.bridge.requires_grad_(False)
        return _finished(loaded, request)


def _as_it_is(bridge: TransformerBridge, chosen: bool) -> TransformerBridge:
    """Check a bridge that was passed as the model."""
    if chosen:
        raise ModelError(
            "A TransformerBridge is used as it is: move or cast it with bridge.to(...) before "
            "passing it, and pass no other arguments."
        )
    with exclusive(bridge):
        if not is_current(bridge):
            raise ModelError(
                f"The {type(bridge.original_model).__name__} of this bridge has been changed since "
                "(a module, hook, adapter or setting); pass the new result of load_model(model)."
            )
    return mended(bridge)


@dataclass(frozen=True)
class _Loaded:
    """A newly built bridge.

    Attributes:
        bridge: The bridge.
        source: Source of its weights.
        reference: A `shared_copy` of its model from before it was wrapped; None if it is not a
            transformers model.
    """

    bridge: TransformerBridge
    source: ModelSource
    reference: PreTrainedModel | None


def _finished(loaded: _Loaded, request: _Request) -> TransformerBridge:
    bridge = loaded.bridge
    bridge.cfg.model_name = request.name
    check_finite(bridge.original_model, request.name)
    attach_source(bridge, replace(loaded.source, name=request.name))
    mended(bridge).eval()
    if loaded.reference is not None:
        prove(bridge, loaded.reference)
    return bridge


def unwrapped(spec: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Unwrap a wrapper of torch, transformers or PEFT, and get the tokenizer of a pipeline.

    Raises:
        UnsupportedError: If the wrapper changes what the model inside computes.
    """
    while not isinstance(spec, PreTrainedModel | TransformerBridge):
        if isinstance(spec, OptimizedModule):
            spec = spec._orig_mod
        elif isinstance(spec, nn.DataParallel | DistributedDataParallel | AveragedModel):
            spec = spec.module
        elif isinstance(spec, Pipeline):
            spec, tokenizer = spec.model, tokenizer or spec.tokenizer
        elif any(kind.__name__ == "PeftModel" for kind in type(spec).__mro__):
            if spec.active_peft_config.is_prompt_learning:
                raise UnsupportedError(
                    f"{type(spec).__name__} adds learned prompts before the tokens, which "
                    "sinkscope cannot measure; only adapters inside the model are supported."
                )
            spec = spec.get_base_model()
        else:
            break
    return spec, tokenizer


def _from_name(
    spec: str, request: _Request, revision: str | None, checkpoint: int | None
) -> _Loaded:
    """Load the model named by a string."""
    path = Path(spec).expanduser()
    on_hub = spec not in PACKAGES and spec not in BUILT_IN and not os.path.exists(path)
    if not on_hub and (revision is not None or checkpoint is not None):
        raise ModelError(f"revision and checkpoint are for Hugging Face Hub models; {spec} is not.")
    if spec in BUILT_IN:
        bridge = BUILT_IN[spec].load(spec, request.device, request.dtype)
        return _Loaded(bridge, replace(model_source(bridge), kind="packaged"), None)
    if spec in PACKAGES:
        package = PACKAGES[spec]
        revision = f"sha256:{package.sha256}"
        source = ModelSource(spec, "packaged", revision, package.trained_head)
        return replace(_from_folder(packaged_folder(spec), request), source=source)
    if os.path.isdir(path):
        return _from_folder(path, request)
    if os.path.isfile(path):
        return _from_gguf(path, request)
    if path.suffix == ".gguf" or path.is_absolute() or spec.startswith((".", "~")):
        raise ModelError(f"There is no file or folder {spec}; {_what_would_work(spec)}")
    return _from_hub(spec, request, revision, checkpoint)


def _from_folder(folder: Path, request: _Request) -> _Loaded:
    try:
        files = tuple(path.name for path in folder.iterdir())
    except OSError as error:
        raise ModelError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    _refuse_adapter(folder, files)
    check_files(str(folder), files, request.allow_pickle)
    check_indices(folder, str(folder))
    weights = tuple(sorted(folder.glob("*.safetensors")))
    bridge, reader = _from_checkpoint(str(folder), None, has_tokenizer(files), request)
    source = ModelSource(str(folder), "folder", trained_head=reader.trained_head, weights=weights)
    return _Loaded(bridge, source, reader.reference)


def _refuse_adapter(folder: Path, files: tuple[str, ...]) -> None:
    """Refuse a folder with only an adapter.

    Raises:
        ModelError: If the folder contains an adapter but no model.
    """
    if "adapter_config.json" not in files or "config.json" in files:
        return
    with one_sentence(str(folder)):
        base = json.loads((folder / "adapter_config.json").read_text())
    raise ModelError(
        f"{folder} contains an adapter of {base.get('base_model_name_or_path', 'another model')} "
        "but no model; pass the result of peft.AutoPeftModelForCausalLM.from_pretrained(folder)."
    )


def _from_hub(
    spec: str, request: _Request, revision: str | None, checkpoint: int | None
) -> _Loaded:
    if checkpoint is not None:
        revision = revision_of(spec, revision, checkpoint)
    repo = find_on_hub(spec, revision, _what_would_work(spec))
    check_files(spec, repo.files, request.allow_pickle)
    check_hub_indices(spec, repo)
    bridge, reader = _from_checkpoint(spec, repo.revision, has_tokenizer(repo.files), request)
    source = ModelSource(spec, "hub", repo.revision, reader.trained_head)
    return _Loaded(bridge, source, reader.reference)


def _from_checkpoint(
    where: str, revision: str | None, has_own_tokenizer: bool, request: _Request
) -> tuple[TransformerBridge, CheckpointReader]:
    """Read a folder or hub repository; also return the reader, which records its contents."""
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
            put_together(bridge)
            forget_earlier_lengths(bridge.original_model)
        else:
            # boot_transformers requires a tokenizer.
            model = reader.from_pretrained(
                where, config=config, dtype=dtype, device_map=request.device_map, **common
            )
            bridge = build(_placed(model, request.device), None, where)
    if reader.reference is not None and request.device is not None:
        reader.reference.to(request.device)  # moves only its buffers, as weights are shared
    return bridge, reader


def _from_gguf(path: Path, request: _Request) -> _Loaded:
    if path.suffix != ".gguf":
        raise ModelError(
            f"{path} is a file but not a .gguf file; give the folder that contains the model's "
            "config.json and .safetensors files."
        )
    if request.device_map is not None:
        raise ModelError("device_map is not for GGUF files; pass device instead.")
    model, tokenizer = read_gguf(path, request.dtype or torch.float32)
    with one_sentence(request.name):
        model = _placed(model, request.device)
        reference = shared_copy(model)
        bridge = build(model, request.tokenizer or tokenizer, str(path))
    return _Loaded(bridge, ModelSource(str(path), "gguf", weights=(path,)), reference)


def _placed(model: PreTrainedModel, device: torch.device | None) -> PreTrainedModel:
    return model if device is None else model.to(device=device)


def _from_memory(model: PreTrainedModel, request: _Request, anew: bool) -> TransformerBridge:
    """The bridge of a model in memory; a new one if `anew`, with other settings than before.

    Raises:
        ModelError: If the model has been changed while hooks were on its bridge.
    """
    if request.device_map is not None:
        raise ModelError("device_map is for models read from files; this one is in memory.")
    known = bridge_of(model)
    if known is not None and known.original_model is model and anew:
        raise ModelError("This model is inside a TransformerBridge already; pass the bridge.")
    if known is not None and not anew:
        with exclusive(known):
            if is_current(known, compare=has_foreign_hooks(known)):
                return known
        if has_foreign_hooks(known):
            raise ModelError(
                f"This {type(model).__name__} has been changed (a module, hook, adapter or "
                "setting) since hooks or interventions were put on its bridge; put them on the new "
                "result of load_model(model)."
            )
        request = replace(request, tokenizer=tokenizer_of(known), name=model_source(known).name)
    headless = is_headless(model)
    with one_sentence(request.name):
        ours = shared_copy(model)
        if moves := is_elsewhere(model, request.device, request.dtype):
            ours = moved(ours, request.device, request.dtype)
        if headless:
            ours = with_untrained_head(ours)
        reference = shared_copy(ours)
        bridge = build(ours, request.tokenizer, request.name)
        source = ModelSource(request.name, "memory", trained_head=not headless)
        bridge = _finished(_Loaded(bridge, source, reference), request)
    if not moves:
        remember(model, bridge, request.tokenizer)
    return bridge


def revision_of(spec: str, revision: str | None, checkpoint: int) -> str:
    """The revision of a training step listed in TransformerLens.

    Raises:
        ModelError: If the step is not listed, or a revision is given as well.
    """
    from transformer_lens.model_bridge.sources.transformers import _resolve_checkpoint_to_revision

    if revision is not None:
        raise ModelError("Pass either revision or checkpoint, not both.")
    with one_sentence(f"checkpoint {checkpoint} of {spec}"):
        return _resolve_checkpoint_to_revision(spec, None, checkpoint)


def _tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any:
    """The given tokenizer, loaded from files if it is a name or folder.

    Raises:
        ModelError: If it is not a tokenizer, or cannot be read.
    """
    if isinstance(tokenizer, str | os.PathLike):
        with one_sentence(f"the tokenizer {os.fspath(tokenizer)}"):
            folder = PACKAGES.get(os.fspath(tokenizer)) and packaged_folder(os.fspath(tokenizer))
            return AutoTokenizer.from_pretrained(
                folder or os.fspath(tokenizer), trust_remote_code=trust_remote_code
            )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a transformers tokenizer, or the "
            "name or folder of one."
        )
    return tokenizer


def chosen_dtype(dtype: Any, default: torch.dtype | None = None) -> torch.dtype | None:
    """The requested dtype; ``None`` means that of the checkpoint.

    Raises:
        ModelError: If weights cannot have it.
    """
    if dtype is None:
        return default
    if dtype == "auto":
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(
            f"{shown(dtype)} is not a dtype for weights; choose float32, bfloat16, float16 or auto."
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
