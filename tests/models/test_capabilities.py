"""Capabilities are found without leaving a trace, and lies are found out."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from sinkscope.capture.scan import scan
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.models.anatomy import read_anatomy
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import CANDIDATES, probe
from sinkscope.models.signals import find_signals, is_causal
from tests.families.architectures import BY_NAME, COMMON, SPECIAL, Family

from .files import TOKENS, tiny_llama


@pytest.fixture
def bridge() -> TransformerBridge:
    return load_model(tiny_llama())


def forwards(bridge: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts forward passes."""
    calls: list[int] = []
    handle = bridge.original_model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(bridge, "_test_handle", handle, raising=False)
    return calls


def test_found_once(bridge: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = forwards(bridge, monkeypatch)
    first = capabilities(bridge)
    assert 0 < len(calls) <= 2
    assert capabilities(bridge) is first
    assert len(calls) <= 2


def test_found_again_when_attention_changes() -> None:
    bridge = load_model(BY_NAME["bert"].build())
    eager = capabilities(bridge)
    bridge.original_model.set_attn_implementation("sdpa")
    sdpa = capabilities(bridge)
    assert "pattern" in eager.signals and "pattern" not in sdpa.signals
    assert 'set_attn_implementation("eager")' in sdpa.unavailable_on("eager")["sink_attention"]
    assert {"z", "resid_post"} <= set(sdpa.signals) and "value" not in sdpa.signals
    assert "no pattern to prove" in sdpa.unavailable_on("eager")["values"]
    assert not eager.causal and not sdpa.causal
    bridge.original_model.set_attn_implementation("eager")
    assert capabilities(bridge) == eager


def test_state_is_left_alone(bridge: TransformerBridge) -> None:
    bridge.train()
    bridge.blocks[1].eval()
    modes = [module.training for module in bridge.modules()]
    seen: list[str] = []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: seen.append("mine"))
    counts = {name: len(point.fwd_hooks) for name, point in bridge.hook_dict.items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    capabilities(bridge)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in bridge.modules()] == modes
    assert {n: len(point.fwd_hooks) for n, point in bridge.hook_dict.items()} == counts
    assert not seen, "the caller's hook ran during the probe"
    bridge(TOKENS)
    assert seen == ["mine"]
    bridge.reset_hooks()
    bridge(TOKENS)
    assert seen == ["mine"]


def test_state_is_left_alone_after_an_error(bridge: TransformerBridge) -> None:
    seen: list[str] = []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: seen.append("mine"))

    def fail(*args: object) -> None:
        raise RuntimeError("only images, please\nand more")

    handle = bridge.original_model.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedError, match="does not run on plain token ids.*only images"):
        capabilities(bridge)
    handle.remove()
    bridge(TOKENS)
    assert seen == ["mine"]
    assert capabilities(bridge).causal


def test_training_works_afterwards(bridge: TransformerBridge) -> None:
    """Nothing that the model caches on its first call may be an inference tensor."""
    capabilities(bridge)
    bridge(TOKENS, return_type="loss").backward()
    assert any(parameter.grad is not None for parameter in bridge.parameters())


def test_causality_shows_without_a_pattern() -> None:
    """Where no pattern fires, a change of the last token must not reach earlier positions."""
    for name in ("llama", "mistral", "gpt_oss", "opt", "bert"):
        bridge = load_model(BY_NAME[name].build())
        seen = probe(bridge, lambda hook: hook.endswith("resid_post"))
        assert is_causal(seen, read_anatomy(bridge), 2e-3) == BY_NAME[name].causal


@pytest.mark.parametrize("context", [1, 2, 8])
def test_a_context_shorter_than_the_probe_is_probed_as_it_is(context: int) -> None:
    family = BY_NAME["gpt2"]
    hf = replace(family, settings=family.settings | dict(n_positions=context)).build()
    tokens = family.tokens(length=context)
    with torch.no_grad():
        patterns = torch.stack(hf(tokens, output_attentions=True).attentions)
    bridge = load_model(hf)
    report = scan(bridge, tokens, progress=False)
    received = patterns[..., 0].mean(-1)  # every query sees the first key
    torch.testing.assert_close(report.sink_importance, received.transpose(0, 1))
    assert capabilities(bridge).causal and capabilities(bridge).n_ctx == context


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_the_context_of_roberta_is_what_its_positions_leave(pad: int) -> None:
    """Positions are numbered from pad + 1: of 24 rows that many are no position's."""
    settings = COMMON | SPECIAL | dict(max_position_embeddings=24, pad_token_id=pad)
    family = Family("roberta", "RobertaForMaskedLM", settings | dict(type_vocab_size=1))
    hf = family.build()
    longest = family.tokens(1, length=24 - pad - 1)
    with torch.no_grad():
        patterns = torch.stack(hf(longest, output_attentions=True).attentions)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            hf(family.tokens(1, length=24 - pad))
    bridge = load_model(hf)
    assert capabilities(bridge).n_ctx == longest.shape[1]
    report = scan(bridge, longest, progress=False)
    torch.testing.assert_close(report.sink_attention, patterns[..., 1:, 0].mean(-1).transpose(0, 1))
    with pytest.raises(TextError, match=f"{24 - pad} tokens are more than the {23 - pad} posit"):
        scan(bridge, family.tokens(1, length=24 - pad), progress=False)


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_a_stock_bridge_that_scales_other_than_its_model_is_found_out(std: float) -> None:
    """TransformerLens divides by sqrt(d_head) what this GPT-2 does not; at 0.02 it hardly shows."""
    family = BY_NAME["gpt2"]
    hf = replace(family, settings=family.settings | dict(scale_attn_weights=False)).build()
    for name, weight in hf.named_parameters():
        if name.endswith("c_attn.weight"):
            torch.nn.init.normal_(weight, std=std)
    tokens = family.tokens()
    with torch.no_grad():
        patterns = torch.stack(hf(tokens, output_attentions=True).attentions)
    expected = patterns[..., 1:, 0].mean(-1).transpose(0, 1)
    bridge = load_model(hf)
    can = capabilities(bridge)
    assert can.scales == (1.0, 1.0, 1.0)
    assert "scales q·k by 0.354 in layer 0, where the model scales it by 1" in can.stock_differs
    eager = can.unavailable_on("eager")
    assert 'attention="streaming" measures' in eager["residual"]
    assert set(eager) == {*can.available, "learned_sink", "gates", "latent"}
    report = scan(bridge, tokens, progress=False)
    assert report.settings.attention == "streaming"
    torch.testing.assert_close(report.sink_attention, expected)
    with pytest.raises(UnsupportedError, match="Eager attention cannot be exact .* by 0.354"):
        scan(bridge, tokens, attention="eager", metrics=["residual"], progress=False)


def test_a_stock_bridge_that_scales_as_its_model_does_is_believed() -> None:
    family = BY_NAME["gpt2"]
    by_layer = replace(
        family, settings=family.settings | dict(scale_attn_by_inverse_layer_idx=True)
    )
    can = capabilities(load_model(by_layer.build()))
    assert can.stock_differs is None
    assert can.scales == pytest.approx([8**-0.5 / (layer + 1) for layer in range(3)])


def test_an_active_intervention_does_not_mislead(bridge: TransformerBridge) -> None:
    clean = capabilities(load_model(tiny_llama()))
    uniform = lambda p, hook: torch.full_like(p, 1 / p.shape[-1])  # noqa: E731
    bridge.add_hook("blocks.1.attn.hook_pattern", uniform)
    assert capabilities(bridge) == clean


def sigmoid_attention(bridge: TransformerBridge) -> None:
    """Attention without softmax, as a permanent part of the model."""
    kept: dict[str, torch.Tensor] = {}

    def scores(s: torch.Tensor, hook) -> None:
        kept[hook.name.replace("hook_attn_scores", "hook_pattern")] = s

    def pattern(p: torch.Tensor, hook) -> torch.Tensor:
        s = kept.pop(hook.name)
        hidden = s <= torch.finfo(s.dtype).min / 2
        return torch.sigmoid(s - math.log(s.shape[-1])).masked_fill(hidden, 0.0)

    for layer in range(bridge.cfg.n_layers):
        attn = f"blocks.{layer}.attn"
        bridge.add_hook(f"{attn}.hook_attn_scores", scores, is_permanent=True)
        bridge.add_hook(f"{attn}.hook_pattern", pattern, is_permanent=True)


def test_attention_without_softmax_is_recognised(bridge: TransformerBridge) -> None:
    sigmoid_attention(bridge)
    can = capabilities(bridge)
    assert not can.softmax
    assert {"pattern", "scores", "query", "key", "value", "z"} <= set(can.signals)


LIES = {
    "attn.hook_attn_scores": ({"scores"}, lambda x: 2 * x),
    "attn.hook_rot_q": ({"query", "key"}, lambda x: x.flip(1)),
    "attn.hook_v": ({"value", "z"}, lambda x: x.flip(1)),
    "attn.hook_z": ({"value", "z"}, lambda x: 1.1 * x),
    "attn.hook_pattern": ({"pattern"}, lambda x: x + 0.01),
    "hook_resid_post": ({"resid_pre", "resid_post", "attn_out", "mlp_out"}, lambda x: x + 1),
    "hook_attn_out": ({"attn_out", "mlp_out"}, lambda x: 1.1 * x),
    "hook_mlp_out": ({"attn_out", "mlp_out"}, lambda x: 1.1 * x),
    "mlp.hook_post": ({"neurons"}, lambda x: x + 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_hook_that_shows_something_else_is_not_offered(
    bridge: TransformerBridge, lie: str
) -> None:
    """In one layer the probe is shown something else than what the model computed."""
    expected, change = LIES[lie]
    names = {template.format(layer=layer) for template in CANDIDATES for layer in range(3)}
    seen = probe(bridge, names.__contains__)
    kept = seen.kept | {f"blocks.1.{lie}": change(seen.kept[f"blocks.1.{lie}"])}
    found = find_signals(
        replace(seen, kept=kept), read_anatomy(bridge), causal=True, tolerance=2e-3
    )
    believed = {signal for signal, hook in found.signals.items() if hook.endswith("." + lie)}
    assert expected <= set(found.reasons) | (set(found.signals) - believed)
    assert not believed


def test_a_spare_hook_that_tells_the_truth_is_taken(bridge: TransformerBridge) -> None:
    names = {template.format(layer=layer) for template in CANDIDATES for layer in range(3)}
    seen = probe(bridge, names.__contains__)
    kept = seen.kept | {"blocks.1.hook_attn_out": seen.kept["blocks.1.hook_resid_pre"]}
    found = find_signals(
        replace(seen, kept=kept), read_anatomy(bridge), causal=True, tolerance=2e-3
    )
    assert found.signals["attn_out"] == "blocks.{layer}.attn.o.hook_out"


def test_half_precision_is_recognised_too() -> None:
    for name in ("llama", "gemma2", "gpt_oss", "bert"):
        family = BY_NAME[name]
        exact = capabilities(load_model(family.build()))
        rough = capabilities(load_model(family.build(), dtype="bfloat16"))
        assert rough == exact, name


def test_native_models_have_no_true_scores() -> None:
    config = TransformerBridgeConfig(
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=2,
        n_ctx=32,
        d_vocab=97,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
    )
    can = capabilities(TransformerBridge.boot_native(config))
    assert can.causal and can.positions == "learned"
    assert "scores" not in can.signals and "pattern" in can.signals
    assert "is the pattern itself" in can.unavailable_on("eager")["logit_gap"]


def test_only_bridges(bridge: TransformerBridge) -> None:
    with pytest.raises(UnsupportedError, match="A TransformerBridge is needed here, not a Linear"):
        capabilities(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="no hook point for 'nonsense'; it has attn_out"):
        capabilities(bridge).hook("nonsense", 0)


def test_hooks_that_fire(bridge: TransformerBridge) -> None:
    hooks = capabilities(bridge).hooks
    assert "blocks.{layer}.attn.hook_pattern" in hooks and "ln_final.hook_scale" in hooks
    assert "blocks.{layer}.attn.hook_result" not in hooks
    neox = capabilities(load_model(BY_NAME["gpt_neox"].build())).hooks
    assert "blocks.{layer}.attn.hook_rot_q" not in neox


def test_description_says_it_all() -> None:
    can = capabilities(load_model(BY_NAME["gemma3"].build()))
    text = str(can)
    assert "Gemma3ForCausalLM" in text and "4 query, 2 key/value" in text
    assert "8 in layers 0-1 · full in layer 2" in text
    for metric in (*can.available, *can.unavailable):
        assert metric in text
    for hook in can.signals.values():
        assert hook in text
    page = StringIO()
    Console(width=100, file=page).print(can)
    assert "What can be measured" in page.getvalue()
    (row,) = [row for row in text.splitlines() if "last_output_norm" in row]
    assert "head_outputs" in row


def test_description_of_special_attention() -> None:
    assert "learned sinks" in str(capabilities(load_model(BY_NAME["gpt_oss"].build())))
    assert "scores capped at 5" in str(capabilities(load_model(BY_NAME["gemma2"].build())))
    assert "bidirectional" in str(capabilities(load_model(BY_NAME["bert"].build())))
    assert "parallel" in str(capabilities(load_model(BY_NAME["gpt_neox"].build())))
