"""Every family loads as a bridge that computes what transformers computes, and is recognised."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinkscope.capture import observers
from sinkscope.errors import UnsupportedError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model

from .architectures import BY_NAME, D_MLP, D_MODEL, N_HEADS, N_LAYERS, VOCAB, Family

# Which entry of the reference each signal must equal; OPT scales its queries before attention.
REFERENCE = {
    "pattern": "attentions",
    "scores": "scores",
    "query": "queries",
    "key": "keys",
    "value": "values",
    "z": "z",
    "latent": "latent",
    "normed_latent": "normed_latent",
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "neurons": "neurons",
}


def test_logits_equal_transformers(
    family: Family, family_bridge: TransformerBridge, family_reference: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        logits = family_bridge(family.tokens())
    assert (logits - family_reference["logits"]).abs().max() < 2e-5


def test_structure_is_recognised(family: Family, family_bridge: TransformerBridge) -> None:
    can = capabilities(family_bridge)
    assert can.architecture == family.model_class
    assert (can.n_layers, can.n_heads, can.n_kv_heads) == (N_LAYERS, N_HEADS, family.n_kv_heads)
    assert can.d_key == family.d_key
    assert (can.d_model, can.d_head, can.d_vocab, can.n_ctx) == (D_MODEL, family.d_head, VOCAB, 64)
    assert can.d_mlp == (None if family.moe else D_MLP)
    assert can.causal == family.causal
    assert can.windows == family.windows
    assert can.softcap == family.softcap
    assert can.positions == family.positions
    assert can.moe == family.moe
    assert can.learned_sinks == family.learned_sinks
    assert can.parallel_blocks == family.parallel_blocks
    assert can.softmax and can.lm_head


def test_signals_hold_what_they_say(
    family: Family, family_bridge: TransformerBridge, family_reference: dict[str, Tensor]
) -> None:
    can = capabilities(family_bridge)
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(signal: str, layer: int):
        return lambda tensor, hook: seen.__setitem__((signal, layer), tensor.clone())

    hooks = [(can.hook(s, i), keep(s, i)) for s in can.signals for i in range(can.n_layers)]
    with torch.no_grad():
        family_bridge.run_with_hooks(family.tokens(), fwd_hooks=hooks)
    for signal in can.signals:
        for layer in range(can.n_layers):
            want, got = family_reference[REFERENCE[signal]][layer], seen[signal, layer]
            if signal == "scores":
                visible = family_reference["visible"][layer][:, None].expand_as(want)
                want, got = want[visible], got[visible]
            if signal == "query" and family.name == "opt":
                got = got * family.d_head**-0.5
            assert want.shape == got.shape, signal
            assert (want - got).abs().max() < 1e-4 * want.abs().max(), (signal, layer)


def test_signals_on_offer(family: Family, family_bridge: TransformerBridge) -> None:
    can = capabilities(family_bridge)
    missing = set(REFERENCE) - set(can.signals)
    expected = set()
    if not family.stock_scores:
        expected |= {"scores"}
    if not family.stock_rotated:
        expected |= {"query", "key"}
    if family.moe:
        expected |= {"neurons"}
    if not family.latent:
        expected |= {"latent", "normed_latent"}
    assert missing == expected


def test_unavailable_metrics_have_reasons(family: Family, family_bridge: TransformerBridge) -> None:
    can = capabilities(family_bridge)
    eager = {
        "logit_gap": not family.stock_scores,
        "sink_logit": not family.stock_rotated,
        "learned_sink": not family.learned_sinks,
        "gates": True,
        "latent": not family.latent,
    }
    elsewhere = {
        "neurons": family.moe,
        "position_embedding_norm": family.positions != "learned",
        "loss": not family.causal,
    }
    missing = can.unavailable_on("eager")
    assert set(missing) == {metric for metric, absent in eager.items() if absent}
    assert set(can.undefined) == {name for name, absent in elsewhere.items() if absent}
    reasons = (*missing.values(), *can.undefined.values())
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert set(can.available) | set(can.unavailable) == set(observers.metrics())


def test_scales_are_those_of_the_config(family: Family, family_bridge: TransformerBridge) -> None:
    can = capabilities(family_bridge)
    scaled_by = {"gemma2": 24, "gemma3": 16}.get(family.name, family.d_key)
    assert can.scales == pytest.approx([scaled_by**-0.5] * N_LAYERS)


def test_padding_mask_is_passed_on(family: Family, family_bridge: TransformerBridge) -> None:
    """Right-padded prompts give the logits of the same prompts alone."""
    tokens = family.tokens(prompts=2)
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    with torch.no_grad():
        padded = family_bridge(tokens, attention_mask=mask)[1, :15]
        alone = family_bridge(tokens[1:, :15])[0]
    assert (padded - alone).abs().max() < 2e-5


FOREIGN = {
    "T5ForConditionalGeneration": (
        dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("model_class", FOREIGN)
def test_foreign_architectures_are_refused(model_class: str) -> None:
    settings, reason = FOREIGN[model_class]
    bridge = load_model(Family(model_class, model_class, settings).build())
    with pytest.raises(UnsupportedError, match=reason):
        capabilities(bridge)


def test_alibi_scores_are_true_but_are_not_products() -> None:
    """BLOOM adds a position bias to q·k: scores can be measured, their decomposition cannot."""
    settings = dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    can = capabilities(load_model(Family("bloom", "BloomForCausalLM", settings).build()))
    assert can.positions == "alibi"
    assert "scores" in can.signals and "query" not in can.signals
    assert "position bias" in can.unavailable_on("eager")["sink_logit"]


def test_classifier_heads_are_refused() -> None:
    config = transformers.LlamaConfig(**BY_NAME["llama"].settings)
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        load_model(transformers.LlamaForSequenceClassification(config))
