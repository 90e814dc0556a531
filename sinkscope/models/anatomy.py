"""What an architecture is made of, read from its config and modules, and which are refused.

Everything that a forward pass can show is left to `sinkscope.models.signals`; here is what it
cannot show in a dozen tokens: window sizes, softcaps, learned sinks, and structures that the
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
        attending: The layers that attend; the others hold linear attention, a state-space model,
            a convolution or nothing in the place of attention.
        no_attention: Why no layer is said to attend, where none is.
        d_model: Residual channels.
        n_ctx: Longest context in positions, ``None`` where the config states none. Rows of
            a position table that no position uses (RoBERTa's first) do not count.
        windows: Sliding window of each layer in positions, a position itself counted; ``None`` is
            full attention (or none).
        dense_up_to: Length up to which a query reads all keys that causality and windows leave it
            [positions], where beyond it reads those of its own chunk, or those that it chooses;
            ``None`` where it always reads all.
        softcap: Scores are ``softcap * tanh(scores / softcap)`` where not ``None``.
        sinks: Each layer's learned sink logits [head], or ``None``.
        stated_scales: The factor on q·k that each layer's module states, or ``None``.
        scales: For each layer, the factors that q·k may be scaled by, the likeliest first; none
            where a layer does not attend.
        moe: Whether any block's FFN is a mixture of experts.
        positions: "rotary", "learned", "sinusoidal", "alibi", "none", or TransformerLens' word.
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
        UnsupportedError: If its attention is of a kind that sinkscope does not measure.
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
    """Why a model in which no block has an attention component has none."""
    for block in blocks:
        for module in getattr(block, "original_component", block).modules():
            if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
                return (
                    f"TransformerLens runs the blocks of {name} as wholes and shows no queries, "
                    "keys or patterns of their attention"
                )
    return f"no block of {name} attends to keys"


def _text_config(bridge: Any) -> Any:
    """The config of the language model: transformers' own, or the bridge's where there is none."""
    config = getattr(bridge.original_model, "config", None) or bridge.cfg
    inner = getattr(config, "get_text_config", None)
    return inner() if callable(inner) else config


def _refuse_foreign(bridge: Any, name: str) -> None:
    """Refuse what is not one stack of blocks over tokens.

    Raises:
        UnsupportedError: With the one reason that matters.
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
        # TransformerLens 4.3 takes Falcon's rows for all queries, all keys, all values; they are
        # the queries, the key and the value of one group after another.
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
    """Each layer's sliding window, from the several ways in which configs state it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if local := getattr(config, "attention_layers", None):  # GPT-Neo has words of its own
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
"""How configs call a layer whose attention, if any, sees everything (up to `dense_up_to`)."""


def _dense_up_to(config: Any, modules: list[Any]) -> int | None:
    """How many keys the indexers of sparse attention (GLM-5) or chunks (Llama-4) let one read."""
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
            f"The learned sinks of {type(module).__name__} are offloaded, and sinkscope has to "
            "read them; load the model with all of its weights on devices."
        )
    return sinks.detach().float().cpu()


def _stated_scale(module: Any) -> float | None:
    """The factor on q·k under the name that transformers gives it, and no divisor."""
    scale = getattr(module, "scaling", None)
    return float(scale) if isinstance(scale, int | float) else None


def _scales(module: Any, d_head: int, layer: int) -> tuple[float, ...]:
    """Factors on q·k that transformers' attention modules use: a stated one, or a usual one."""
    if module is None:
        return ()
    stated = [getattr(module, name, None) for name in ("scaling", "scale", "softmax_scale")]
    usual = [d_head**-0.5, 1.0, d_head**-0.5 / (layer + 1)]
    return tuple(float(scale) for scale in [*stated, *usual] if isinstance(scale, int | float))


def _is_moe(block: Any) -> bool:
    from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

    return isinstance(getattr(block, "mlp", None), MoEBridge)


def _positions(bridge: Any) -> str:
    kind = getattr(bridge.cfg, "positional_embedding_type", None) or "none"
    if kind != "standard":
        return kind
    table = getattr(bridge, "pos_embed", None)
    learned = table is not None and any(True for _ in table.parameters())
    return "learned" if learned else "sinusoidal"
