"""Streaming where transformers' attention calls no attention function: GPT-Neo, Falcon, ALiBi, …"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinkscope as ss
from sinkscope.attention.streaming import streaming
from sinkscope.errors import UnsupportedError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model

from . import test_streaming_families as common
from .architectures import _FALCON as FALCON
from .architectures import BY_NAME, N_LAYERS, OWN_ARITHMETIC, Family
from .test_streaming_families import listen

bridge, tokens = common.bridge, common.tokens
test_an_identity_pattern_makes_z_the_values = common.test_an_identity_pattern_makes_z_the_values
test_edits_act_as_on_the_stock_bridge = common.test_edits_act_as_on_the_stock_bridge
test_leaves_the_bridge_as_it_was = common.test_leaves_the_bridge_as_it_was
test_generates_the_same_tokens = common.test_generates_the_same_tokens
test_edits_before_the_dot_product = common.test_edits_before_the_dot_product_take_effect


@pytest.fixture(params=[family.name for family in OWN_ARITHMETIC])
def family(request: pytest.FixtureRequest) -> Family:
    return BY_NAME[request.param]


def ragged(family: Family) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask that hides the end of one prompt."""
    tokens = family.tokens()
    mask = torch.ones_like(tokens)
    mask[1, -7:] = 0
    return tokens, mask


def transformers_logits(family: Family, tokens: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return family.build(attention=family.attention)(tokens, attention_mask=mask).logits


def test_computes_what_transformers_computes(family: Family, bridge: TransformerBridge) -> None:
    tokens, mask = ragged(family)
    with streaming(bridge):
        logits = listen(bridge, tokens, attention_mask=mask)["logits"]
    expected = transformers_logits(family, tokens, mask)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=4e-5)


def test_describes_the_call(family: Family, bridge: TransformerBridge) -> None:
    with streaming(bridge) as stream, torch.no_grad():
        bridge(family.tokens())
    calls = [stream.calls[layer] for layer in range(N_LAYERS)]
    assert tuple(call.window for call in calls) == family.windows
    assert all(call.causal and call.mask is None and call.offset == 0 for call in calls)
    assert all((call.key_bias is not None) == (family.positions == "alibi") for call in calls)


def test_a_scan_equals_transformers_patterns(family: Family) -> None:
    """From the patterns that transformers returns, prompt by prompt; scores are their logarithm."""
    if family.attention != "eager":
        pytest.skip("transformers returns no pattern here: compared through the logits")
    tokens, mask = ragged(family)
    with torch.no_grad():
        output = family.build()(tokens, attention_mask=mask, output_attentions=True)
    rows = [row[: int(real.sum())].tolist() for row, real in zip(tokens, mask, strict=True)]
    report = ss.scan(
        family.build(), ss.token_ids(rows), batch=2, attention="streaming", progress=False
    )
    for prompt, length in enumerate(map(len, rows)):
        for layer, patterns in enumerate(output.attentions):
            pattern = patterns[prompt, :, :length, :length].double()
            want = {
                "sink_attention": pattern[:, 1:, 0].mean(-1),
                "attention_entropy": torch.special.entr(pattern).sum(-1).mean(-1),
                "sink_logit_gap": _gap(pattern),
            }
            for name, expected in want.items():
                found = report[name][prompt, layer].double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def _gap(pattern: Tensor) -> Tensor:
    """ln A_i0 − mean over the other visible keys j ≠ i of ln A_ij, mean over queries."""
    gaps = []
    for query in range(1, pattern.shape[-1]):
        row = pattern[:, query]
        others = [j for j in range(1, query) if (row[:, j] > 0).all()]
        if others and (row[:, 0] > 0).all():
            gaps.append(row[:, 0].log() - row[:, others].log().mean(-1))
    return torch.stack(gaps).mean(0)


def test_both_ways_agree(family: Family) -> None:
    """Every field; also the mass that each key receives, and values weighted by attention."""
    tokens, mask = ragged(family)
    rows = [row[: int(real.sum())].tolist() for row, real in zip(tokens, mask, strict=True)]
    prompts = ss.token_ids(rows)
    if family.attention != "eager":
        with pytest.raises(UnsupportedError, match="adds ALiBi twice"):
            ss.scan(family.build(), prompts, attention="eager", progress=False)
        return
    stock = ss.scan(family.build(), prompts, attention="eager", progress=False)
    ours = ss.scan(family.build(), prompts, attention="streaming", progress=False)
    assert set(stock.measured()) <= set(ours.measured())
    for field in stock.measured():
        torch.testing.assert_close(
            ours[field], stock[field], rtol=1e-4, atol=1e-5, equal_nan=True, msg=field
        )


@pytest.mark.parametrize(
    "name", ["gpt_neo", "gptj", "xglm", "falcon_multi_query", "bloom", "smollm3", "hunyuan"]
)
def test_an_edited_mask_reaches_both_ways(name: str) -> None:
    family = BY_NAME[name]
    model, prompts = load_model(family.build()), ss.token_ids(family.tokens())
    plain = ss.scan(model, prompts, metrics="core", progress=False)["sink_attention"]
    with ss.SelfOnlyMask(model, 5):
        stock, ours = (
            ss.scan(model, prompts, metrics="core", attention=attention, progress=False)[
                "sink_attention"
            ]
            for attention in ("eager", "streaming")
        )
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_auto_streams(family: Family) -> None:
    report = ss.scan(family.build(), ss.token_ids(family.tokens()), metrics="core", progress=False)
    assert report.settings.attention == "streaming"


def test_a_cache_fed_in_chunks(family: Family, bridge: TransformerBridge) -> None:
    """Position bias and windows count the keys of the cache."""
    tokens = family.tokens()
    expected = transformers_logits(family, tokens, torch.ones_like(tokens))
    with streaming(bridge):
        first = listen(bridge, tokens[:, :9], return_type="logits_and_cache", use_cache=True)
        logits, cache = first["logits"]
        second = listen(
            bridge, tokens[:, 9:], return_type="logits_and_cache", past_key_values=cache
        )
    found = torch.cat([logits, second["logits"][0]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=4e-5)


def test_grouped_falcons_are_refused() -> None:
    """TransformerLens splits their fused projection in the wrong places."""
    settings = dict(FALCON, new_decoder_architecture=True, num_kv_heads=2, multi_query=False)
    bridge = load_model(Family("falcon", "FalconForCausalLM", settings).build())
    with pytest.raises(UnsupportedError, match="fused projection"):
        capabilities(bridge)
