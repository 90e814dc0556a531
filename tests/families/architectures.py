"""Tiny random models, one for each architecture family that sinkscope claims to measure.

Every model is seeded, built from a config of its own (transformers shares config objects between
models, so switching attention in one would switch the others), runs transformers' eager attention,
and has weights large enough that attention patterns are far from uniform: at the default
initialisation almost any error would hide below the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from sinkscope.models.load import load_model

D_MODEL = 32
D_MLP = 48
N_HEADS = 4
N_KV_HEADS = 2
N_LAYERS = 3
VOCAB = 97
WINDOW = 8
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=D_MODEL,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    intermediate_size=D_MLP,
    max_position_embeddings=64,
)
GROUPED = dict(COMMON, num_key_value_heads=N_KV_HEADS, **SPECIAL)
LATENT = dict(
    COMMON,
    num_key_value_heads=N_HEADS,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_rope_head_dim=4,
    qk_nope_head_dim=10,
    v_head_dim=6,
    **SPECIAL,
)
"""Multi-head latent attention: 14 channels of queries and keys, 6 of values."""
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Parts:
    """Where a block keeps the modules that the reference reads (paths inside a block).

    Attributes:
        blocks: Path of the block list inside the model.
        attention: The module whose output, after any post-norm, is added to the residual.
        ffn: Likewise for the feed-forward half.
        down: The projection that reads the FFN's hidden units; ``None`` for mixtures of experts.
        output: The projection that reads the heads' outputs, where a gate stands before it.

    A path may name alternatives, "mlp|feed_forward"; attention may be missing from some blocks.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    down: str | None = "mlp.down_proj"
    output: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture: how to build its tiny model, and what is true of it by construction.

    Attributes:
        name: Short name, the id of its test cases.
        model_class: The transformers class.
        settings: Arguments of its config class.
        parts: Where a block keeps what the reference reads.
        positions: Position scheme, in the words of ``Capabilities.positions``.
        causal: Whether a position sees earlier positions only.
        n_kv_heads: Key/value heads.
        d_head: Width of a head.
        windows: Sliding window of each layer (``None``: full attention).
        softcap: Cap on attention scores.
        moe: Whether the FFN is a mixture of experts.
        learned_sinks: Whether heads have a learned sink logit.
        parallel_blocks: Whether attention and FFN read the same residual.
        stock_scores: Whether the stock bridge's ``hook_attn_scores`` holds true scores.
        prescale: What its queries are multiplied by before they reach the attention function.
        stock_rotated: Whether the stock bridge shows queries and keys as attention uses them.
        attention: transformers' implementation that is the reference. Falcon's eager one adds ALiBi
            twice, in the mask and by itself.
        streams: Whether its attention can be streamed exactly.
        length: Suggested number of positions, longer than any window.
    """

    name: str
    model_class: str
    settings: dict
    parts: Parts = Parts()
    positions: str = "rotary"
    causal: bool = True
    n_kv_heads: int = N_KV_HEADS
    d_head: int = D_MODEL // N_HEADS
    windows: tuple[int | None, ...] = (None,) * N_LAYERS
    softcap: float | None = None
    moe: bool = False
    learned_sinks: bool = False
    parallel_blocks: bool = False
    stock_scores: bool = True
    stock_rotated: bool = True
    prescale: float = 1.0
    attention: str = "eager"
    streams: bool = True
    length: int = 24

    @property
    def latent(self) -> bool:
        """Whether keys and values are made of a latent."""
        return "kv_lora_rank" in self.settings

    @property
    def d_key(self) -> int:
        """Width of a head's queries and keys."""
        sizes = self.settings
        return sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"] if self.latent else self.d_head

    def build(self, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
        """Make the tiny model: eval mode, float32, on the CPU."""
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class._from_config(config, attn_implementation=attention).eval()
            _spread_weights(model)
        return model

    def tokens(self, prompts: int = 3, length: int | None = None, seed: int = 0) -> torch.Tensor:
        """Random token ids [prompt position] that avoid the special ones."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(4, VOCAB, (prompts, length or self.length), generator=generator)


@torch.no_grad()
def _spread_weights(model: PreTrainedModel) -> None:
    """Redraw every weight, biases and learned sinks too: nothing stays at zero or one."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
        elif name.endswith("sinks"):
            parameter.normal_(std=1.0)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.get_input_embeddings().weight.normal_(std=1.0)


LLAMA_LIKE = Parts()
POST_NORMED = Parts(attention="post_attention_layernorm", ffn="post_feedforward_layernorm")
EXPERTS = Parts(down=None)

FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", GROUPED),
    Family(
        "mistral",
        "MistralForCausalLM",
        dict(GROUPED, sliding_window=WINDOW),
        windows=(WINDOW,) * N_LAYERS,
    ),
    Family("qwen2", "Qwen2ForCausalLM", GROUPED),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        dict(GROUPED, head_dim=16),
        d_head=16,
    ),
    Family("olmo2", "Olmo2ForCausalLM", GROUPED, parts=POST_NORMED),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        dict(
            GROUPED,
            head_dim=16,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            sliding_window=WINDOW,
            layer_types=[SLIDING, FULL, SLIDING],
        ),
        parts=POST_NORMED,
        d_head=16,
        windows=(WINDOW, None, WINDOW),
        softcap=5.0,
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        dict(
            GROUPED,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=[SLIDING, SLIDING, FULL],
        ),
        parts=POST_NORMED,
        d_head=16,
        windows=(WINDOW, WINDOW, None),
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        dict(
            GROUPED,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=150000.0,
                factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        parts=EXPERTS,
        d_head=16,
        windows=(WINDOW, None, WINDOW),
        moe=True,
        learned_sinks=True,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        dict(COMMON, **SPECIAL),
        parts=Parts("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h"),
        n_kv_heads=N_HEADS,
        parallel_blocks=True,
        stock_rotated=False,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        dict(
            vocab_size=VOCAB,
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_inner=D_MLP,
            n_positions=64,
            **SPECIAL,
        ),
        parts=Parts("transformer.h", "attn", "mlp", "mlp.c_proj"),
        positions="learned",
        n_kv_heads=N_HEADS,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            word_embed_proj_dim=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            ffn_dim=D_MLP,
            max_position_embeddings=64,
            **SPECIAL,
        ),
        parts=Parts("model.decoder.layers", "self_attn", "fc2", "fc2"),
        positions="learned",
        n_kv_heads=N_HEADS,
        stock_scores=False,
        prescale=(D_MODEL // N_HEADS) ** -0.5,
    ),
    Family("phi3", "Phi3ForCausalLM", GROUPED, stock_rotated=False),
    Family(
        "bert",
        "BertForMaskedLM",
        dict(COMMON, pad_token_id=0),
        parts=Parts("bert.encoder.layer", "attention.output.dense", "output.dense", "output.dense"),
        positions="learned",
        causal=False,
        n_kv_heads=N_HEADS,
        stock_scores=False,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        dict(GROUPED, num_local_experts=4, num_experts_per_tok=2),
        parts=EXPERTS,
        moe=True,
    ),
    Family("youtu", "YoutuForCausalLM", LATENT, n_kv_heads=N_HEADS, d_head=6),
)
_ROUTED = dict(
    LATENT,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=24,
    n_shared_experts=1,
)
LATENTS: tuple[Family, ...] = (
    Family(  # queries without a latent, rotated as complex numbers
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        dict(_ROUTED, q_lora_rank=None, first_k_dense_replace=1),
        parts=EXPERTS,
        n_kv_heads=N_HEADS,
        d_head=6,
        moe=True,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        dict(_ROUTED, first_k_dense_replace=1, rope_interleave=False),
        parts=EXPERTS,
        n_kv_heads=N_HEADS,
        d_head=6,
        moe=True,
    ),
    Family(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        dict(
            _ROUTED,
            index_topk=24,
            index_head_dim=8,
            index_n_heads=2,
            layer_types=["indexed_attention"] * N_LAYERS,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
        parts=EXPERTS,
        n_kv_heads=N_HEADS,
        d_head=6,
        streams=False,
        moe=True,
    ),
)
"""The other families with multi-head latent attention; the last is sparse beyond 24 positions."""

OTHERS: tuple[Family, ...] = (
    Family("olmo", "OlmoForCausalLM", GROUPED),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        dict(GROUPED, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL]),
        parts=POST_NORMED,
        windows=(WINDOW, WINDOW, None),
    ),
    Family(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        dict(GROUPED, num_experts=4, num_experts_per_tok=2),
        parts=Parts(
            attention="post_attention_layernorm", ffn="post_feedforward_layernorm", down=None
        ),
        moe=True,
    ),
    Family(
        "llama4",
        "Llama4ForCausalLM",
        dict(
            GROUPED,
            head_dim=8,
            intermediate_size_mlp=D_MLP,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0, 1],
            attention_chunk_size=32,
        ),
        parts=Parts(ffn="feed_forward", down=None),
        moe=True,
        stock_scores=False,
        stock_rotated=False,
    ),
    Family("smollm3", "SmolLM3ForCausalLM", dict(GROUPED, no_rope_layers=[1, 0, 1])),
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        dict(GROUPED, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING]),
        windows=(WINDOW, None, WINDOW),
        parallel_blocks=True,
    ),
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        dict(GROUPED, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING]),
        parts=POST_NORMED,
        windows=(WINDOW, None, WINDOW),
    ),
    Family(
        "hunyuan",
        "HunYuanDenseV1ForCausalLM",
        dict(GROUPED, head_dim=16),
        d_head=16,
        stock_rotated=False,
    ),
)
"""Families that differ from those above in one respect, and take fewer of the tests."""

_FALCON = dict(
    vocab_size=VOCAB,
    hidden_size=D_MODEL,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    ffn_hidden_size=D_MLP,
    **SPECIAL,
)
OWN_ARITHMETIC: tuple[Family, ...] = (
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            num_layers=N_LAYERS,
            num_heads=N_HEADS,
            intermediate_size=D_MLP,
            max_position_embeddings=64,
            window_size=WINDOW,
            attention_types=[[["global", "local", "global"], 1]],
            **SPECIAL,
        ),
        parts=Parts("transformer.h", "attn", "mlp", "mlp.c_proj"),
        positions="learned",
        n_kv_heads=N_HEADS,
        windows=(None, WINDOW, None),
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        dict(
            vocab_size=VOCAB,
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_inner=D_MLP,
            n_positions=64,
            rotary_dim=4,
            **SPECIAL,
        ),
        parts=Parts("transformer.h", "attn", "mlp", "mlp.fc_out"),
        n_kv_heads=N_HEADS,
        parallel_blocks=True,
    ),
    Family(
        "xglm",
        "XGLMForCausalLM",
        dict(
            vocab_size=VOCAB,
            d_model=D_MODEL,
            num_layers=N_LAYERS,
            attention_heads=N_HEADS,
            ffn_dim=D_MLP,
            max_position_embeddings=64,
            **SPECIAL,
        ),
        parts=Parts("model.layers", "self_attn", "fc2", "fc2"),
        positions="sinusoidal",
        n_kv_heads=N_HEADS,
        prescale=(D_MODEL // N_HEADS) ** -0.5,
    ),
    Family(
        "falcon_multi_query",
        "FalconForCausalLM",
        dict(_FALCON, multi_query=True),
        parts=Parts("transformer.h", "self_attention", "mlp", "mlp.dense_4h_to_h"),
        n_kv_heads=1,
        parallel_blocks=True,
    ),
    Family(
        "falcon_alibi",
        "FalconForCausalLM",
        dict(_FALCON, multi_query=True, alibi=True),
        parts=Parts("transformer.h", "self_attention", "mlp", "mlp.dense_4h_to_h"),
        positions="alibi",
        n_kv_heads=1,
        parallel_blocks=True,
        attention="sdpa",
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        dict(vocab_size=VOCAB, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, **SPECIAL),
        parts=Parts("transformer.h", "self_attention", "mlp", "mlp.dense_4h_to_h"),
        positions="alibi",
        n_kv_heads=N_HEADS,
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        dict(
            vocab_size=VOCAB,
            d_model=D_MODEL,
            n_layers=N_LAYERS,
            n_heads=N_HEADS,
            expansion_ratio=2,
            max_seq_len=64,
            **SPECIAL,
        ),
        parts=Parts("transformer.blocks", "attn", "ffn", "ffn.down_proj"),
        positions="alibi",
        n_kv_heads=N_HEADS,
    ),
)
"""Families whose attention in transformers calls no attention function."""

BY_NAME: dict[str, Family] = {
    family.name: family for family in (*FAMILIES, *LATENTS, *OTHERS, *OWN_ARITHMETIC)
}


def bridge_of(family: Family) -> TransformerBridge:
    """The family's tiny model as a bridge, one for all tests: leave it as it was."""
    return _bridge_named(family.name)


@cache
def _bridge_named(name: str) -> TransformerBridge:
    return load_model(BY_NAME[name].build(), device="cpu")
