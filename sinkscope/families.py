"""Coverage of architectures: sinkscope run on each language model that TransformerLens supports.

For each architecture that TransformerLens registers:

1. `tiny_model` builds a random model of its transformers class, a few dozen channels wide, with
   weights large enough that attention is far from uniform;
2. transformers' own eager forward pass gives logits and attention patterns;
3. the model is bridged, its capabilities are determined, and it is scanned on the eager and the
   streaming path, in float32 and in bfloat16;
4. a `Row` records the largest difference from step 2, or the reason why there is none.

`table` renders the rows as docs/families.md, which a test compares with new runs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from sinkscope.capture.scan import scan
from sinkscope.errors import SinkscopeError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.checkpoint import seeded_weights
from sinkscope.models.load import load_model
from sinkscope.output import UNDEFINED
from sinkscope.prompts.tokens import token_ids

VOCABULARY = 97
PROMPTS, LENGTH = 2, 20
LARGEST = 3_000_000
"""Upper bound on the parameters of a tiny model; more mean that the config has unknown sizes."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4,
    "num_attention_heads": 4, "attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "mlp_hidden_size": 48,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "sliding_window": 8, "window_size": 8,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "state_size": 8, "lru_width": 32,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of a tiny model under the names that configs give them."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_LINEAR, _CONV = "linear_attention", "conv"
_LATENT: dict[str, Any] = {"num_key_value_heads": 4}
_GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.2, "residual_multiplier": 0.3, "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 64, "key_multiplier": 0.6, "attention_in_multiplier": 1.3,
        "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8,
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "mlp_multipliers": [0.8, 0.5],
        "embedding_multiplier": 2.5, "lm_head_multiplier": 0.4,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "Gemma4ForCausalLM": {
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL], "global_head_dim": 16,
    },
    "Glm4MoeLiteForCausalLM": _LATENT,
    "GlmMoeDsaForCausalLM": _LATENT,
    "GraniteForCausalLM": _GRANITE,
    "GraniteMoeForCausalLM": _GRANITE,
    "GraniteMoeHybridForCausalLM": _GRANITE | {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"full_attn_idxs": [1, 3]},
    "Lfm2MoeForCausalLM": {"layer_types": [_CONV, _FULL, _CONV, _FULL]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "NemotronHForCausalLM": {"layers_block_type": [_LINEAR, "mlp", _FULL, "moe", _FULL]},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1, 0]},
    "YoutuForCausalLM": _LATENT,
    "Zamba2ForCausalLM": {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]},
}  # fmt: skip
"""Further settings of single architectures: what they need, and constant factors that are not 1."""


@dataclass(frozen=True)
class Row:
    """Results for one architecture.

    Attributes:
        architecture: Class in transformers.
        metrics: Number of metrics that a scan can measure, 0 where it is refused.
        ways: Implementations of attention that are exact: "eager", "streaming".
        difference: Largest difference of logits (relative to the largest logit) and of attention
            to the first token [probability] from transformers' eager forward pass in float32, over
            both paths; nan where there is nothing to compare.
        half: The same in bfloat16, where both sides round.
        float16: The same in float16.
        reason: Why it is refused, or what one path cannot do; "" where nothing is missing.
    """

    architecture: str
    metrics: int = 0
    ways: tuple[str, ...] = ()
    difference: float = math.nan
    half: float = math.nan
    float16: float = math.nan
    reason: str = ""


def architectures() -> list[str]:
    """Language models registered in TransformerLens that have a class in transformers."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    kinds = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")
    known = (name for name in SUPPORTED_ARCHITECTURES if hasattr(transformers, name))
    return sorted(name for name in known if name.endswith(kinds))


def run(names: list[str] | None = None) -> Iterator[Row]:
    """Yield a row for each architecture.

    Args:
        names: Architectures; all of them if None.

    Raises:
        SinkscopeError: If one is unknown.
    """
    known = architectures()
    if unknown := [name for name in names or () if name not in known]:
        raise SinkscopeError(
            f"There is no architecture {unknown[0]!r}; name classes of transformers that "
            f"TransformerLens boots, such as {known[0]} (`sinkscope models families` has all)."
        )
    for name in names or known:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield row(name)


def row(name: str) -> Row:
    """Build, run and compare one architecture; any failure is recorded in the row."""
    try:
        return _compared(name)
    except Exception as error:  # a defect, reported on the page
        return Row(name, reason=f"fails: {type(error).__name__}: {_first_line(error)}")


def _compared(name: str) -> Row:
    try:
        model = tiny_model(name)
        truth = _theirs(model)
    except Exception as error:  # whatever a config or a module of transformers may raise
        return Row(name, reason=f"no tiny model ({_first_line(error)})")
    try:
        bridge = load_model(tiny_model(name))
        caps = capabilities(bridge)
    except SinkscopeError as error:
        return Row(name, reason=str(error))
    differences: dict[str, float] = {}
    if not caps.attending:
        reason = f"{caps.absent['pattern']}; residual stream only"
    else:
        reason = caps.not_streamed or caps.stock_differs or ""
    for way in ("eager", "streaming"):
        try:
            differences[way] = _off(bridge, way, truth)
        except SinkscopeError as error:
            reason = reason or str(error)
    halves = []
    for dtype in (torch.bfloat16, torch.float16):
        try:
            rounded = load_model(tiny_model(name).to(dtype))
            halves.append(max((_off(rounded, way, truth) for way in differences), default=math.nan))
        except SinkscopeError as error:
            halves.append(math.nan)
            reason = reason or f"in {str(dtype).removeprefix('torch.')}: {error}"
    difference = max(differences.values(), default=math.nan)
    return Row(name, len(caps.available), tuple(differences), difference, *halves, reason)


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of a transformers class: eager attention, eval mode, float32, seeded."""
    model_class = getattr(transformers, name)
    config = copy.deepcopy(model_class.config_class())
    derived = {key for key in SMALL if isinstance(getattr(type(config), key, None), property)}
    known = {key: SMALL[key] for key in SMALL.keys() - derived if _states(config, key)}
    config = model_class.config_class(**known | OWN.get(name, {}))
    config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters though every known size is small")
    with seeded_weights():
        model = model_class._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
    return model


def _states(config: Any, key: str) -> bool:
    """Whether a config has a setting, possibly one for each layer, which cannot be read as one."""
    try:
        return hasattr(config, key)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        return True


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, VOCABULARY, (PROMPTS, LENGTH), generator=generator)


def _theirs(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Logits of transformers, and attention to the first token [prompt layer head] if returned."""
    with torch.no_grad():
        output = model(input_ids=_tokens(), output_attentions=True)
    patterns = [p for p in getattr(output, "attentions", None) or () if p is not None]
    if not patterns or any(p.ndim != 4 for p in patterns):
        return output.logits.float(), None
    return output.logits.float(), torch.stack([p[..., 0].mean(-1) for p in patterns], dim=1).float()


def _off(bridge: Any, way: str, truth: tuple[Tensor, Tensor | None]) -> float:
    """Largest difference of a scan's attention, and of the logits on its path, from the truth."""
    from sinkscope.attention.streaming import streaming

    logits, first = truth
    report = scan(bridge, token_ids(_tokens()), attention=way, progress=False)
    with torch.no_grad():
        if way == "streaming":
            with streaming(bridge):
                ours = bridge(_tokens())
        else:
            ours = bridge(_tokens())
    off = float((ours.float() - logits).abs().max() / logits.abs().max())
    measured = report.first_token_attention
    if first is None or measured is None:
        return off
    measured = measured[:, report.settings.attending]  # transformers returns only these layers
    if measured.shape != first.shape:
        raise ValueError(f"patterns of the shape {first.shape}, measured {measured.shape}")
    return max(off, float((measured - first).abs().max()))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


# -- the page ------------------------------------------------------------------------------------

HEADER = """# Architectures

What sinkscope measures on each language-model architecture that TransformerLens supports and
transformers implements, tried on a tiny random model; `sinkscope models families --markdown` writes
this page. *Metrics* is how many a scan measures, *attention* which implementations are exact.
*fp32* is the largest difference from transformers' own eager forward pass, of logits (relative to
the largest) and of attention to the first token, rounded up to a power of ten. *bf16* and *fp16*
compare the model in bfloat16 and float16 with the same float32 forward pass; there, rounding sends
some tokens to another expert. All on a CPU.

| architecture | metrics | attention | fp32 | bf16 | fp16 | what is missing |
|---|---|---|---|---|---|---|
"""


def table(rows: list[Row]) -> str:
    """The page, in Markdown."""
    return HEADER + "".join(f"| {' | '.join(cells(one))} |\n" for one in rows)


def cells(one: Row) -> tuple[str, ...]:
    """The cells of a row."""
    return (
        one.architecture,
        str(one.metrics or UNDEFINED),
        ", ".join(one.ways) or UNDEFINED,
        _power(one.difference),
        _power(one.half),
        _power(one.float16),
        one.reason.replace("|", "/"),
    )


def _power(difference: float) -> str:
    if math.isnan(difference):
        return UNDEFINED
    return "0" if difference == 0 else f"1e{math.ceil(math.log10(difference)):+03d}"
