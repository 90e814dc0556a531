"""Bridges for transformers models in memory, verified to compute the same as the model.

1. The model is left unchanged: the bridge is built on a copy that shares its weights (`sharing`).
2. Fused projections stay whole, so that adapters and hooks on them take effect (`fused`).
3. Both are run on a few tokens. An attention path on which the bridge's blocks deviate from the
   model's is refused; the message names the block and its unusual modules.

The bridge is cached per model and reused unless the model's structure has changed since.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
)
from transformers import PreTrainedModel

from sinkscope.attention.streaming import streaming
from sinkscope.attention.support import attention_of
from sinkscope.attention.upstream import mended
from sinkscope.devices import ran_out_of_memory
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.active import is_wiring, replaced_code
from sinkscope.models.checkpoint import seeded_weights
from sinkscope.models.fused import all_components, keep_fused, watch_inputs
from sinkscope.models.probe import evaluating, only_hooks, probe_tokens
from sinkscope.models.rope import forget_earlier_lengths
from sinkscope.models.sharing import Structure, shared_copy, structure_of

# -- building --------------------------------------------------------------------------------------


def build(model: PreTrainedModel, tokenizer: Any, name: str) -> TransformerBridge:
    """Build a bridge around a transformers model, which becomes part of it.

    Args:
        model: A model that is not used elsewhere: read from a file, or a `shared_copy`.
        tokenizer: A tokenizer, or None for a bridge that accepts token ids only.
        name: Name of the model in the bridge.

    Raises:
        UnsupportedError: If TransformerLens has no adapter for its class.
    """
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(model).__name__}, so sinkscope cannot "
            "measure it."
        )
    # Other implementations return no attention patterns. boot_transformers(hf_model=...) would do
    # the same, but without a tokenizer it queries the hub for one.
    model.set_attn_implementation("eager")
    model.config.return_dict = True
    config = copy.deepcopy(model.config)
    if getattr(config, "position_embedding_type", "") is None:
        # Granite-hybrid without positions; TransformerLens reads None as the default, "rope".
        config.position_embedding_type = "nope"
    with seeded_weights():  # TransformerLens initialises weights before replacing them
        bridge = build_bridge_from_module(
            model.eval(),
            type(model).__name__,
            hf_config=config,
            tokenizer=None if tokenizer is None else self_contained(tokenizer),
            model_name=name,
            post_adapter_hook=lambda adapter: keep_fused(
                inner
                for component in adapter.component_mapping.values()
                for inner in all_components(component)
            ),
        )
    watch_inputs(bridge)
    forget_earlier_lengths(bridge.original_model)
    return mended(bridge)


def self_contained(tokenizer: Any) -> Any:
    """A copy of a tokenizer that TransformerLens uses unchanged.

    To make a tokenizer prepend BOS, TransformerLens reloads it from its ``name_or_path``: added
    tokens, another BOS or another vocabulary would be lost, and a tokenizer made in memory cannot
    be reloaded at all. Declaring that it already adds BOS prevents that; whether it really does is
    determined by encoding.
    """
    tokenizer = copy.deepcopy(tokenizer)
    name = tokenizer.init_kwargs.get("name_or_path") or ""
    tokenizer.init_kwargs |= {"name_or_path": name, "add_bos_token": True}
    return tokenizer


def is_headless(model: PreTrainedModel) -> bool:
    """Whether a model has no output head (BertModel), without which it cannot be bridged."""
    return model.base_model is model and type(model).__name__ not in SUPPORTED_ARCHITECTURES


_ENCODER_DECODER = "ForConditionalGeneration"
"""Suffix of transformers' encoder-decoder classes, such as T5's."""


def with_untrained_head(body: PreTrainedModel) -> PreTrainedModel:
    """Add a randomly initialised (seeded) output head of its family to a headless model.

    The model is not copied. No measurement inside the blocks depends on the head.

    Raises:
        UnsupportedError: If TransformerLens has no adapter for a model of this family with a head.
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
    if type(body).__name__.endswith("EncoderModel") and headed.__name__.endswith(_ENCODER_DECODER):
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(body).__name__} alone, only for "
            f"{headed.__name__}, an encoder-decoder with cross-attention, so sinkscope cannot "
            "measure it."
        )
    with seeded_weights():
        model = headed(config)
    model = model.to(device=body.device, dtype=body.dtype)
    setattr(model, model.base_model_prefix, body)
    model.tie_weights()
    return model


# -- verifying -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """Whether a bridge computes the same as its model.

    Attributes:
        stock: How the unmodified bridge differs from the model, or None.
        streaming: How the bridge differs on the streaming path, or None.
    """

    stock: str | None = None
    streaming: str | None = None


_PROOF = "_sinkscope_proof"


def proof_of(bridge: Any) -> Proof:
    """The verification made when the bridge was built; empty for bridges built elsewhere."""
    return bridge.__dict__.get(_PROOF, Proof())


States = list[Tensor]
"""The output of each block [prompt position channel], then the logits."""


def prove(bridge: TransformerBridge, model: PreTrainedModel) -> None:
    """Compare a bridge with its model on a few tokens, and store the result on the bridge.

    Args:
        bridge: A newly built bridge.
        model: A `shared_copy` of the model that is not part of a bridge.
    """
    model.set_attn_implementation("eager")
    wanted = _states_of_model(bridge, model)
    if wanted is None:  # the bridge cannot run either, and `capabilities` gives the reason
        return
    stock = _difference(bridge, model, wanted)
    streamed = _streamed_difference(bridge, model, wanted) if _streams(bridge) else None
    bridge.__dict__[_PROOF] = Proof(stock, streamed)


def _streamed_difference(
    bridge: TransformerBridge, model: PreTrainedModel, wanted: States
) -> str | None:
    """How the bridge differs on the streaming path from both eager and sdpa attention, or None.

    The two can differ in transformers: Falcon's eager attention adds its position bias twice.
    """
    with streaming(bridge):
        difference = _difference(bridge, model, wanted, streamed=True)
    if difference is None:
        return None
    # Not set_attn_implementation, which leaves Falcon as it is.
    model.config._attn_implementation = "sdpa"
    fused = _states_of_model(bridge, model)
    if fused is None:
        return difference
    with streaming(bridge):
        return _difference(bridge, model, fused, streamed=True) and difference


def _states_of_model(bridge: TransformerBridge, model: nn.Module) -> States | None:
    """The states of a transformers model with eager attention, or None if its forward fails."""
    states: States = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(_first(output).detach().float().cpu())

    try:
        blocks = [model.get_submodule(block.name) for block in bridge.blocks]
        handles = [block.register_forward_hook(keep) for block in blocks]
        try:
            with evaluating(model), torch.no_grad():
                output = model(input_ids=_tokens(bridge, model), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [*states, output.logits.detach().float().cpu()]
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return None


def _states_of_bridge(bridge: TransformerBridge) -> States:
    states: States = []
    ends = [block.hook_out for block in bridge.blocks]

    def keep(activation: Tensor, hook: Any) -> None:
        states.append(activation.detach().float().cpu())

    with (
        only_hooks(set(bridge.hook_dict.values()), ends, keep),
        evaluating(bridge),
        torch.no_grad(),
    ):
        logits = bridge(_tokens(bridge, bridge.original_model), return_type="logits")
    return [*states, logits.detach().float().cpu()]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _tokens(bridge: TransformerBridge, model: nn.Module) -> Tensor:
    """The probe's tokens on the input device of the model; offloaded weights are on "meta"."""
    devices = (p.device for p in model.parameters() if not p.is_meta)
    return probe_tokens(bridge).to(next(devices, torch.device("cpu")))


def _streams(bridge: TransformerBridge) -> bool:
    try:
        attention_of(bridge)
    except UnsupportedError:
        return False
    return True


def allowed_error(dtype: torch.dtype) -> float:
    """Relative difference up to which two computations of a model count as equal."""
    return 5e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def _difference(
    bridge: TransformerBridge, model: nn.Module, wanted: States, streamed: bool = False
) -> str | None:
    """Describe the first deviation of the bridge from the model; None if there is none."""
    try:
        states = _states_of_bridge(bridge)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return f"TransformerLens cannot run it ({str(error).partition(chr(10))[0]})"
    if len(states) != len(wanted):
        return "TransformerLens runs a different set of blocks from the model"
    for index, (ours, theirs) in enumerate(zip(states, wanted, strict=True)):
        half = bridge.cfg.dtype in (torch.float16, torch.bfloat16)
        off = _error(ours, theirs, typical=half and streamed)
        if off <= allowed_error(bridge.cfg.dtype):
            continue
        if index == len(bridge.blocks):
            return f"TransformerLens computes logits that differ from the model's (by {off:.2g})"
        block = model.get_submodule(bridge.blocks[index].name)
        peculiar = "".join(f", in which {what}" for what in _peculiar(block))
        return (
            f"TransformerLens computes block {index} differently from the model (off by {off:.2g}"
            f"{peculiar})"
        )
    return None


def _error(ours: Tensor, theirs: Tensor, typical: bool) -> float:
    """Largest relative error over positions, or the median one if `typical`.

    On the eager path every step equals the model's, and the maximum also detects a hook that only
    changes the sink. Fused attention rounds differently, which in half precision may cause a large
    error at single positions (SmolLM2 in bfloat16: 0.5, with a median of 0.02), or route a token to
    other experts.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    size = theirs.norm(dim=-1).clamp_min(1e-30)
    errors = ((ours - theirs).norm(dim=-1) / size).flatten()
    return float(errors.quantile(0.5) if typical else errors.max())


_USUAL = ("torch.nn.modules.", "transformers.")


def _peculiar(block: nn.Module) -> list[str]:
    """Describe modules of a block that are not from torch or transformers, or run user code."""
    names = []
    for name, module in block.named_modules():
        kind, where = type(module).__name__, name or "the block itself"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(is_wiring, hooks)):
            names.append(f"{where} is a hooked {kind}")
        elif any(True for _ in replaced_code(module)):
            names.append(f"{where} is a {kind} whose forward was replaced")
        elif not type(module).__module__.startswith(_USUAL):
            names.append(f"{where} is a {kind}")
    return names[:3]


# -- models in memory and their bridges ------------------------------------------------------------


@dataclass
class _Made:
    """Record of a bridge built for a model in memory.

    Attributes:
        model: The model.
        structure: Its structure when bridge and model were last known to agree.
        tokenizer: The tokenizer that was passed with it, or None.
    """

    model: ref[nn.Module]
    structure: Structure
    tokenizer: Any


_bridges: WeakKeyDictionary[nn.Module, TransformerBridge] = WeakKeyDictionary()
_made: WeakKeyDictionary[TransformerBridge, _Made] = WeakKeyDictionary()
_BRIDGE = "_sinkscope_bridge"


def remember(model: PreTrainedModel, bridge: TransformerBridge, tokenizer: Any) -> None:
    """Cache the bridge of a model, so that passing the model again returns the same bridge."""
    _bridges[model] = bridge
    _made[bridge] = _Made(ref(model), structure_of(model), tokenizer)
    bridge.original_model.__dict__[_BRIDGE] = bridge  # setattr would register it


def bridge_of(model: PreTrainedModel) -> TransformerBridge | None:
    """The bridge that `load_model` built for a model, or that contains it, or None.

    Raises:
        ModelError: If the model is part of a bridge that was built elsewhere.
    """
    if (inside := model.__dict__.get(_BRIDGE)) is not None:
        return inside
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is inside a TransformerBridge already; pass the bridge."
        )
    return _bridges.get(model)


def tokenizer_of(bridge: TransformerBridge) -> Any:
    """The tokenizer that was passed with a model in memory, or None."""
    made = _made.get(bridge)
    return None if made is None else made.tokenizer


def is_current(bridge: TransformerBridge, compare: bool = True) -> bool:
    """Whether a bridge still agrees with the model for which it was built.

    Weights are shared and need no check. Bridges that were not built from a model in memory are
    always current.

    Args:
        bridge: The bridge.
        compare: Whether to compare outputs if the structures differ, which need not change the
            result (a module that counts its calls, say).
    """
    made = _made.get(bridge)
    model = None if made is None else made.model()
    if made is None or model is None or (now := structure_of(model)) == made.structure:
        return True
    if not compare:
        return False
    copied: Any = shared_copy(model)
    copied.set_attn_implementation("eager")
    wanted = _states_of_model(bridge, copied)
    if wanted is None or _difference(bridge, model, wanted) is not None:
        return False
    made.structure = now
    return True
