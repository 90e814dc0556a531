"""Structure of an architecture, read from its config and modules; unsupported ones are refused.

Everything that a forward pass can show is left to `sinkscope.models.signals`. This module reads
what a dozen tokens cannot show: window sizes, softcaps, learned sinks, and structures that the
definitions of sinkscope do not cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.prompts.tokens import context_size


@dataclass(frozen=True)
class Anatomy:
    """Structure of a decoder or encoder stack.

    Attributes:
        architecture: The model's class, for example "LlamaForCausalLM".
        n_layers: Number of blocks.
        attending: Indices of the layers with attention; the others have linear attention, a
            state-space model, a convolution or nothing in its place.
        no_attention: Why `attending` is empty, where it is.
        d_model: Width of the residual stream.
        n_ctx: Longest context in positions, ``None`` where the config states none. Rows of
            a position table that no position uses (RoBERTa's first) do not count.
        windows: Sliding window of each layer in positions, the query's own included; ``None`` is
            full attention (or none).
        dense_up_to: Length up to which a query attends to all keys that causality and windows allow
            [positions]; in longer prompts it attends only to its own chunk, or to keys it selects.
            ``None`` where there is no such limit.
        softcap: Scores are ``softcap * tanh(scores / softcap)`` where not ``None``.
        sinks: Each layer's learned sink logits [head], or ``None``.
        stated_scales: The factor on q·k that each layer's module states, or ``None``.
        scales: Candidates for the factor on q·k in each layer, the likeliest first; empty for
            layers without attention.
        moe: Whether any block has a mixture of experts.
        positions: "rotary", "learned", "sinusoidal", "alibi", "none", or TransformerLens' term.
    """

    architecture: str
    n_layers: int
    attending: tuple[int, ...]
    no_attention: str
    d_model: int
    n_ctx: int | None
    windows: tuple[int | None, ...]
    dense_up_to: int | None
    softcap: float | None
    sinks: tuple[Tensor | None, ...]
    stated_scales: tuple[float | None, ...]
    scales: tuple[tuple[float, ...], ...]
    moe: bool
    positions: str


def read_anatomy(bridge: Any) -> Anatomy:
    """Read the structure of a bridge's model.

    Raises:
        UnsupportedError: If sinkscope does not support its kind of attention.
    """
    cfg = bridge.cfg
    name = cfg.architecture or type(bridge.original_model).__name__
    _refuse_foreign(bridge, name)
    config = _text_config(bridge)
    blocks = list(bridge.blocks)
    components = [block._modules.get("attn") for block in blocks]
    modules = [getattr(attn, "original_component", attn) for attn in components]
    attending = tuple(layer for layer, attn in enumerate(components) if attn is not None)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return Anatomy(
        architecture=name,
        n_layers=len(blocks),
        attending=attending,
        no_attention=_no_attention(blocks, name),
        d_model=cfg.d_model,
        n_ctx=context_size(bridge),
        windows=_windows(config, len(blocks), attending, name),
        dense_up_to=_dense_up_to(config, modules),
        softcap=float(softcap) if softcap else None,
        sinks=tuple(_sinks(module) for module in modules),
        stated_scales=tuple(map(_stated_scale, modules)),
        scales=tuple(_scales(module, cfg.d_head, i) for i, module in enumerate(modules)),
        moe=any(_is_moe(block) for block in blocks),
        positions=_positions(bridge),
    )


def _no_attention(blocks: list[Any], name: str) -> str:
    """Why no block of a model has an attention component."""
    for block in blocks:
        for module in getattr(block, "original_component", block).modules():
            if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
                return (
                    f"TransformerLens runs each block of {name} as a whole and exposes no queries, "
                    "keys or patterns of their attention"
                )
    return f"no block of {name} attends to keys"


def _text_config(bridge: Any) -> Any:
    """The config of the language model from transformers, or else the bridge's."""
    config = getattr(bridge.original_model, "config", None) or bridge.cfg
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config


def _refuse_foreign(bridge: Any, name: str) -> None:
    """Refuse models that are not a single stack of blocks over tokens.

    Raises:
        UnsupportedError: With the reason.
    """
    cfg, config = bridge.cfg, _text_config(bridge)
    blocks = list(getattr(bridge, "blocks", None) or [])
    outer = getattr(bridge.original_model, "config", None)
    if getattr(outer, "is_encoder_decoder", False):
        reason = "is an encoder-decoder with cross-attention"
    elif getattr(cfg, "is_audio_model", False) or getattr(cfg, "is_visual_model", False):
        reason = "does not read text tokens"
    elif not blocks:
        reason = "is not a single stack of blocks"
    elif getattr(config, "new_decoder_architecture", False):
        # TransformerLens 4.3 reads the rows of Falcon's weight as all queries, all keys, all
        # values, but they are ordered by group: its queries, its key, its value.
        reason = "has a fused projection that TransformerLens splits in the wrong places"
    else:
        return
    raise UnsupportedError(
        f"{name} {reason}, which sinkscope cannot measure exactly; it measures models that are "
        "one stack of blocks with self-attention, or with something else in its place."
    )


def _windows(
    config: Any, n_layers: int, attending: tuple[int, ...], name: str
) -> tuple[int | None, ...]:
    """Each layer's sliding window, from the various keys under which configs state it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if local := getattr(config, "attention_layers", None):  # GPT-Neo's own terms
        window, kinds = config.window_size, local
    if kinds is None:
        unused = getattr(config, "use_sliding_window", True) is False
        return (None if unused or window is None else int(window),) * n_layers
    sizes = {"sliding_attention": window, "local": window} | dict.fromkeys(_FULL)
    unknown = sorted({kinds[layer] for layer in attending} - set(sizes))
    if unknown:
        raise UnsupportedError(
            f"{name} has layers of kind {unknown[0]!r}; sinkscope measures full and sliding-window "
            "self-attention only."
        )
    return tuple(sizes.get(kind) for kind in kinds)


_CHUNKED = "chunked_attention"
_FULL = ("full_attention", "global", "attention", "hybrid", "indexed_attention", _CHUNKED)
"""Config names of layers with full attention (up to `dense_up_to`) or none."""


def _dense_up_to(config: Any, modules: list[Any]) -> int | None:
    """Number of keys that a query attends to in sparse (GLM-5) or chunked (Llama-4) attention."""
    indexers = (getattr(module, "indexer", None) for module in modules)
    sizes = [int(indexer.index_topk) for indexer in indexers if indexer is not None]
    if _CHUNKED in (getattr(config, "layer_types", None) or ()):
        sizes.append(int(config.attention_chunk_size))
    return min(sizes, default=None)


def _sinks(module: Any) -> Tensor | None:
    sinks = getattr(module, "sinks", None)
    if not isinstance(sinks, Tensor):
        return None
    if sinks.is_meta:
        raise UnsupportedError(
            f"The learned sinks of {type(module).__name__} are offloaded, so sinkscope cannot "
            "read them; load the model with all of its weights on devices."
        )
    return sinks.detach().float().cpu()


def _stated_scale(module: Any) -> float | None:
    """The factor on q·k that a module states under transformers' name (divisors are ignored)."""
    scale = getattr(module, "scaling", None)
    return float(scale) if isinstance(scale, int | float) else None


def _scales(module: Any, d_head: int, layer: int) -> tuple[float, ...]:
    """Candidates for the factor on q·k: the one the module states, then the usual ones."""
    if module is None:
        return ()
    stated = [getattr(module, name, None) for name in ("scaling", "scale", "softmax_scale")]
    usual = [d_head**-0.5, 1.0, d_head**-0.5 / (layer + 1)]
    return tuple(float(scale) for scale in [*stated, *usual] if isinstance(scale, int | float))


def _is_moe(block: Any) -> bool:
    """Whether a block has experts, in the place of its FFN or beside a dense one."""
    from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

    return any(isinstance(part, MoEBridge) or stacks_experts(part) for part in block.modules())


def stacks_experts(module: Any) -> bool:
    """Whether a module stacks the down-projections of all experts in one parameter."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3


def _positions(bridge: Any) -> str:
    kind = getattr(bridge.cfg, "positional_embedding_type", None) or "none"
    if kind != "standard":
        return kind
    table = getattr(bridge, "pos_embed", None)
    learned = table is not None and any(True for _ in table.parameters())
    return "learned" if learned else "sinusoidal"
