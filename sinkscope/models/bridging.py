"""From a transformers model in memory to a TransformerLens bridge that is proved to be the model.

1. The model is not touched: the bridge is built on a copy that shares its weights (`sharing`).
2. Fused projections stay whole, so that what sits on them is measured (`fused`).
3. Both are run on a few tokens. Where the bridge's blocks give something else than the model's,
   a way of reading attention that does so is refused, with the block and what is peculiar in it.

A model that is given again gets the same bridge, unless its structure has changed in the meantime.
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
    """Put a bridge around a transformers model, which becomes part of it.

    Args:
        model: A model that nobody else uses: read from a file, or a `shared_copy`.
        tokenizer: A tokenizer, or None for a bridge that takes token ids only.
        name: What the bridge calls the model.

    Raises:
        UnsupportedError: If TransformerLens has no adapter for its class.
    """
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedError(
            f"TransformerLens has no adapter for {type(model).__name__}, so sinkscope cannot "
            "measure it."
        )
    # Other implementations show no attention patterns. Calling boot_transformers(hf_model=...)
    # would do the same, but it asks the hub for a tokenizer where none is given.
    model.set_attn_implementation("eager")
    model.config.return_dict = True
    config = copy.deepcopy(model.config)
    if getattr(config, "position_embedding_type", "") is None:
        # Granite-hybrid without positions. TransformerLens takes None for the default, "rope".
        config.position_embedding_type = "nope"
    with seeded_weights():  # TransformerLens draws weights that it then replaces
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
    """A copy of a tokenizer that TransformerLens takes as it is.

    TransformerLens reads a tokenizer again from where its name points to, to make it prepend BOS:
    tokens that were added since, another BOS or another vocabulary would be lost, and one that was
    made in memory cannot be read at all. Saying that BOS is seen to prevents that; whether the
    tokenizer really prepends one is found out by encoding.
    """
    tokenizer = copy.deepcopy(tokenizer)
    name = tokenizer.init_kwargs.get("name_or_path") or ""
    tokenizer.init_kwargs |= {"name_or_path": name, "add_bos_token": True}
    return tokenizer


def is_headless(model: PreTrainedModel) -> bool:
    """Whether this is a bare body, like BertModel, which TransformerLens cannot bridge."""
    return model.base_model is model and type(model).__name__ not in SUPPORTED_ARCHITECTURES


_ENCODER_DECODER = "ForConditionalGeneration"
"""How transformers' classes end that join an encoder, such as T5's, to a decoder."""


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


# -- proving ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """Whether a bridge computes what its model does.

    Attributes:
        stock: In what the bridge as TransformerLens made it differs, or None.
        streaming: In what it differs while attention streams, or None.
    """

    stock: str | None = None
    streaming: str | None = None


_PROOF = "_sinkscope_proof"


def proof_of(bridge: Any) -> Proof:
    """What was found when the bridge was made; nothing of a bridge that was made elsewhere."""
    return bridge.__dict__.get(_PROOF, Proof())


States = list[Tensor]
"""What each block hands on [prompt position channel], then the logits."""


def prove(bridge: TransformerBridge, model: PreTrainedModel) -> None:
    """Compare a bridge with its model on a few tokens, and note the result on the bridge.

    Args:
        bridge: The bridge, as it was just made.
        model: A `shared_copy` of the model, that is no part of any bridge.
    """
    model.set_attn_implementation("eager")
    wanted = _states_of_model(bridge, model)
    if wanted is None:  # then no bridge can be measured either, and `capabilities` says why
        return
    stock = _difference(bridge, model, wanted)
    streamed = _streamed_difference(bridge, model, wanted) if _streams(bridge) else None
    bridge.__dict__[_PROOF] = Proof(stock, streamed)


def _streamed_difference(
    bridge: TransformerBridge, model: PreTrainedModel, wanted: States
) -> str | None:
    """The same while attention streams, which may also be what transformers' sdpa computes.

    The two are not always one: Falcon's eager attention adds its position bias twice.
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
    """The states of a transformers model under its own eager attention, None where it fails."""
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
    """The probe's tokens where the model reads them; offloaded weights lie nowhere meanwhile."""
    devices = (p.device for p in model.parameters() if not p.is_meta)
    return probe_tokens(bridge).to(next(devices, torch.device("cpu")))


def _streams(bridge: TransformerBridge) -> bool:
    try:
        attention_of(bridge)
    except UnsupportedError:
        return False
    return True


def _difference(
    bridge: TransformerBridge, model: nn.Module, wanted: States, streamed: bool = False
) -> str | None:
    """Where the bridge first computes something else than the model, in words; None if nowhere."""
    try:
        found = _states_of_bridge(bridge)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return f"TransformerLens cannot run it ({str(error).partition(chr(10))[0]})"
    if len(found) != len(wanted):
        return "TransformerLens runs other blocks than the model"
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        half = bridge.cfg.dtype in (torch.float16, torch.bfloat16)
        off = _error(ours, theirs, typical=half and streamed)
        if off <= (5e-2 if half else 1e-3):
            continue
        if index == len(bridge.blocks):
            return f"TransformerLens computes other logits than the model (off by {off:.2g})"
        block = model.get_submodule(bridge.blocks[index].name)
        peculiar = "".join(f", in which {found}" for found in _peculiar(block))
        return (
            f"TransformerLens computes block {index} otherwise than the model (off by {off:.2g}"
            f"{peculiar})"
        )
    return None


def _error(ours: Tensor, theirs: Tensor, typical: bool) -> float:
    """Relative error of the worst position, or of a typical one.

    Eager attention does what the model does, step by step; a hook that changes the sink alone shows
    at one position. Fused attention rounds otherwise, which in half precision may carry single
    positions far off (SmolLM2 in bfloat16: 0.5, where the median is 0.02), or send a token to other
    experts.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    size = theirs.norm(dim=-1).clamp_min(1e-30)
    errors = ((ours - theirs).norm(dim=-1) / size).flatten()
    return float(errors.quantile(0.5) if typical else errors.max())


_USUAL = ("torch.nn.modules.", "transformers.")


def _peculiar(block: nn.Module) -> list[str]:
    """What in a block is not torch's or transformers', or has code of the user's own on it."""
    found = []
    for name, module in block.named_modules():
        kind, where = type(module).__name__, name or "the block itself"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(is_wiring, hooks)):
            found.append(f"{where} is a hooked {kind}")
        elif any(True for _ in replaced_code(module)):
            found.append(f"{where} is a {kind} whose forward was replaced")
        elif not type(module).__module__.startswith(_USUAL):
            found.append(f"{where} is a {kind}")
    return found[:3]


# -- models in memory and their bridges ------------------------------------------------------------


@dataclass
class _Made:
    """A bridge that was made of a model in memory.

    Attributes:
        model: The model.
        structure: Its structure when the bridge was last known to be the model.
        tokenizer: The tokenizer that was given with it, or None.
    """

    model: ref[nn.Module]
    structure: Structure
    tokenizer: Any


_bridges: WeakKeyDictionary[nn.Module, TransformerBridge] = WeakKeyDictionary()
_made: WeakKeyDictionary[TransformerBridge, _Made] = WeakKeyDictionary()
_BRIDGE = "_sinkscope_bridge"


def remember(model: PreTrainedModel, bridge: TransformerBridge, tokenizer: Any) -> None:
    """Let a model that was given once be given again: whoever scans it never saw the bridge."""
    _bridges[model] = bridge
    _made[bridge] = _Made(ref(model), structure_of(model), tokenizer)
    bridge.original_model.__dict__[_BRIDGE] = bridge  # past nn.Module, which would register it


def bridge_of(model: PreTrainedModel) -> TransformerBridge | None:
    """The bridge that `load_model` made of a model, or whose model this is.

    Raises:
        ModelError: If the model is part of a bridge that was made elsewhere.
    """
    if (inside := model.__dict__.get(_BRIDGE)) is not None:
        return inside
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is inside a TransformerBridge already; pass the bridge."
        )
    return _bridges.get(model)


def tokenizer_of(bridge: TransformerBridge) -> Any:
    """The tokenizer that a model in memory was given with, or None."""
    made = _made.get(bridge)
    return None if made is None else made.tokenizer


def is_current(bridge: TransformerBridge, compare: bool = True) -> bool:
    """Whether a bridge still is the model that it was made of.

    Weights are shared and need no look; other bridges are nobody's copies.

    Args:
        bridge: The bridge.
        compare: Whether to compare what both compute where their structures differ. They may
            compute the same: a module that counts its calls, say.
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
