"""Wrap any toy model as a `TransformerBridge`, to be measured like every other model.

The bridge wraps a copy of the module itself, through TransformerLens' own native adapter, so that
there is no second implementation. One component differs from the native one: attention passes its
true pre-softmax scores to `hook_attn_scores` and uses edits of both scores and pattern, whatever
the operator; a gated layer has a `hook_gate`.

`scan` measures every operator. Where attention is not a softmax it omits the entropy of the rows,
which are not distributions; with a gate it omits the norms of W_O v.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sinkscope.bb.config import ModelConfig
from sinkscope.bb.model import Attention, BackcopyTransformer, FeedForward
from sinkscope.bb.task import BigramBackcopy
from sinkscope.bb.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter


def to_bridge(
    model: BackcopyTransformer,
    name: str = "bigram-backcopy",
    task: BigramBackcopy | None = None,
) -> TransformerBridge:
    """Wrap a copy of `model`, which is not modified.

    Layers without attention or a feed-forward network get one whose output is exactly zero (zero
    weights, zero pattern), and a linear feed-forward is written as a network of two matrices whose
    neurons are its outputs: every layer then has every hook point, and the logits are unchanged.

    Args:
        model: Any toy model, trained or not.
        name: The value of `cfg.model_name`.
        task: Give the bridge this task's character tokenizer, if its symbols are characters.

    Returns:
        The bridge, in evaluation mode.
    """
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    config = model.config
    bridge = build_bridge_from_module(
        _uniform(copy.deepcopy(model)).eval(),
        "TransformerLensNative",
        tl_config=TransformerBridgeConfig(
            d_model=config.width,
            d_head=config.d_head,
            n_heads=config.heads,
            n_layers=config.layers,
            n_ctx=config.context,
            d_vocab=config.vocab,
            d_mlp=4 * config.width,
            act_fn="relu",
            normalization_type=None if config.no_norm else "LN",
            positional_embedding_type="standard",
            eps=1e-5,
            default_prepend_bos=True,
        ),
        model_name=name,
        tokenizer=make_tokenizer(task) if task is not None else None,
        post_adapter_hook=partial(_use_true_attention, gated=config.attention == "gated"),
    )
    return bridge.eval()


def _use_true_attention(adapter: ArchitectureAdapter, gated: bool) -> None:
    from sinkscope.bb.attention_bridge import BackcopyAttentionBridge

    block = adapter.component_mapping["blocks"]
    native = block.submodules["attn"]
    block.submodules["attn"] = BackcopyAttentionBridge(
        name=native.name, config=adapter.cfg, submodules=native.submodules, gated=gated
    )
    # Hook points of the native component's optional split inputs, which this one lacks.
    absent = {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"}
    block.hook_aliases = {k: v for k, v in block.hook_aliases.items() if k not in absent}


def _uniform(model: BackcopyTransformer) -> BackcopyTransformer:
    """Give every block attention and feed-forward, in place, without changing the logits."""
    config, like = model.config, model.head.weight
    for block in model.layers:
        if block.attn is None:
            block.ln1, block.attn = _norm(config, like), _zero_attention(config, like)
        if block.mlp is None:
            block.ln2, block.mlp = _norm(config, like), _feed_forward(config, like)
        elif not isinstance(block.mlp, FeedForward):
            block.mlp = _feed_forward(config, like, block.mlp.weight)
    return model


def _norm(config: ModelConfig, like: Tensor) -> nn.Module:
    norm = nn.Identity() if config.no_norm else nn.LayerNorm(config.width, eps=1e-5)
    return norm.to(like)


def _zero_attention(config: ModelConfig, like: Tensor) -> Attention:
    attention = Attention(config, "none").to(like)
    for weight in attention.parameters():
        nn.init.zeros_(weight)
    return attention


def _feed_forward(config: ModelConfig, like: Tensor, matrix: Tensor | None = None) -> FeedForward:
    """Return no feed-forward (matrix None), or x -> matrix @ x with linear neurons 0 … width-1."""
    network = FeedForward(config).to(like)
    network.activation = nn.Identity()
    with torch.no_grad():
        network.fc_in.weight.zero_()
        network.fc_out.weight.zero_()
        if matrix is not None:
            network.fc_in.weight[: config.width] = matrix
            network.fc_out.weight[:, : config.width].fill_diagonal_(1.0)
    return network
