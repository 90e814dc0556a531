"""The `streaming` context: what it leaves alone, what it refuses, and what it lets through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CodeGenConfig,
    CodeGenForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    masking_utils,
)

from sinkscope.attention import streaming as module
from sinkscope.attention.masks import MaskSpec, streaming_mask
from sinkscope.attention.streaming import streaming
from sinkscope.errors import UnsupportedError
from sinkscope.models.load import load_model

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def bridge() -> TransformerBridge:
    return load_model(llama())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(4, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def run(bridge: TransformerBridge, tokens: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return bridge(tokens, **kwargs)


def is_stock(bridge: TransformerBridge) -> bool:
    return (
        "blocks.0.attn.hook_lse" not in bridge.hook_dict
        and "forward" not in bridge.blocks[0].attn.__dict__
        and "q_proj" not in bridge.blocks[0].attn.original_component.__dict__
        and "layers" not in bridge.original_model.model.__dict__
        and bridge.original_model.config._attn_implementation != module.IMPLEMENTATION
    )


def nothing_registered() -> bool:
    return not (
        module.IMPLEMENTATION in AttentionInterface._global_mapping
        or module.IMPLEMENTATION in AttentionMaskInterface._global_mapping
        or module._layers
        or module._streams
    )


def test_hook_points_come_and_go_by_name(bridge: TransformerBridge, tokens: Tensor) -> None:
    before = list(bridge.hook_dict)
    heard: list[tuple[str, tuple[int, ...]]] = []

    def hear(x: Tensor, hook) -> None:
        heard.append((hook.name, tuple(x.shape)))

    with streaming(bridge):
        bridge.add_hook("blocks.1.attn.hook_lse", hear)
        bridge.add_hook(lambda name: name.endswith("hook_rot_v"), hear)
        run(bridge, tokens)
        assert "blocks.2.attn.hook_lse" in bridge.hook_dict
    assert heard == [
        ("blocks.0.attn.hook_rot_v", (2, 12, 2, 8)),
        ("blocks.1.attn.hook_rot_v", (2, 12, 2, 8)),
        ("blocks.1.attn.hook_lse", (2, 4, 12)),
        ("blocks.2.attn.hook_rot_v", (2, 12, 2, 8)),
    ]
    assert list(bridge.hook_dict) == before
    with pytest.raises(AttributeError, match="hook_lse"):
        bridge.add_hook("blocks.1.attn.hook_lse", hear)
    run(bridge, tokens)
    assert len(heard) == 4


def test_an_exception_inside_restores_the_bridge(bridge: TransformerBridge, tokens: Tensor) -> None:
    def fail(x: Tensor, hook) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), streaming(bridge):
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_lse", fail)])
    assert is_stock(bridge) and nothing_registered()


def test_an_exception_on_entry_restores_the_bridge(
    bridge: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "take_shortcuts", fail)
    with pytest.raises(ZeroDivisionError), streaming(bridge):
        pass
    assert is_stock(bridge) and nothing_registered()


def test_a_context_inside_another_changes_nothing(
    bridge: TransformerBridge, tokens: Tensor
) -> None:
    with streaming(bridge) as outer:
        with streaming(bridge) as inner:
            assert inner is outer
        assert "blocks.0.attn.hook_lse" in bridge.hook_dict
        run(bridge, tokens)
        assert set(outer.calls) == {0, 1, 2}
    assert is_stock(bridge) and nothing_registered()


def test_two_bridges_stream_independently(bridge: TransformerBridge, tokens: Tensor) -> None:
    other = load_model(llama())
    expected = run(bridge, tokens)
    with streaming(bridge):
        with streaming(other) as stream:
            run(other, tokens)
            assert set(stream.calls) == {0, 1, 2}
        assert is_stock(other)
        torch.testing.assert_close(run(bridge, tokens), expected)
    assert is_stock(bridge) and nothing_registered()


def test_a_model_that_shares_the_config_is_left_alone(tokens: Tensor) -> None:
    first = llama()
    twin = LlamaForCausalLM(first.config).eval()
    twin.load_state_dict(first.state_dict())
    with torch.no_grad():
        expected = twin(tokens).logits
    assert twin.config is first.config
    bridge = build_bridge_from_module(first, "LlamaForCausalLM", hf_config=first.config)
    before = dict(first.config.__dict__)
    with streaming(bridge):
        assert bridge.original_model.config._attn_implementation == module.IMPLEMENTATION
        assert twin.config.__dict__ == before
        with torch.no_grad():
            assert torch.equal(twin(tokens).logits, expected)
    assert bridge.original_model.config is twin.config and twin.config.__dict__ == before


def test_a_copy_taken_afterwards_is_a_plain_bridge(
    bridge: TransformerBridge, tokens: Tensor
) -> None:
    with streaming(bridge):
        run(bridge, tokens)
    twin = copy.deepcopy(bridge)
    assert is_stock(twin)
    assert torch.equal(run(twin, tokens), run(bridge, tokens))


def test_log_sum_exp_is_read_only(bridge: TransformerBridge, tokens: Tensor) -> None:
    with streaming(bridge):
        plain = run(bridge, tokens)
        bridge.add_hook("blocks.0.attn.hook_lse", lambda x, hook: x + 1)
        with pytest.warns(UserWarning, match="hook_lse is read-only"):
            assert torch.equal(run(bridge, tokens), plain)


def test_keys_are_there_while_the_log_sum_exp_fires(
    bridge: TransformerBridge, tokens: Tensor
) -> None:
    seen: dict[str, Tensor] = {}
    with streaming(bridge) as stream, torch.no_grad():
        hooks = [
            ("blocks.1.attn.hook_rot_k", lambda x, hook: seen.update(fired=x.clone())),
            (
                "blocks.1.attn.hook_lse",
                lambda x, hook: seen.update(keys=stream.calls[1].keys.clone()),
            ),
        ]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(seen["fired"], seen["keys"])


def test_a_hook_that_comes_in_the_middle_of_a_forward_pass_fires(
    bridge: TransformerBridge, tokens: Tensor
) -> None:
    """Components that run without their bridge notice a hook that another hook adds."""
    heard: list[str] = []
    late = ("attn.q.hook_out", "attn.o.hook_in", "ln2.hook_scale", "mlp.hook_out", "hook_out")

    def add(x: Tensor, hook) -> None:
        for name in late:
            bridge.add_hook(f"blocks.2.{name}", lambda x, hook: heard.append(hook.name))

    with streaming(bridge), torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", add)])
        bridge.reset_hooks()
    assert heard == [f"blocks.2.{name}" for name in late]


@pytest.mark.parametrize("way", ["register_forward_hook", "register_forward_pre_hook"])
def test_torch_hooks_on_components_are_honoured(
    bridge: TransformerBridge, tokens: Tensor, way: str
) -> None:
    parts = {
        "q": bridge.blocks[1].attn.q,
        "ln1": bridge.blocks[1].ln1,
        "attn": bridge.blocks[1].attn,
        "mlp": bridge.blocks[1].mlp,
        "block": bridge.blocks[1],
    }
    heard: list[str] = []
    handles = [
        getattr(part, way)(lambda *_, name=name: heard.append(name)) for name, part in parts.items()
    ]
    with streaming(bridge):
        run(bridge, tokens)
    for handle in handles:
        handle.remove()
    assert set(heard) == set(parts)


@pytest.mark.parametrize("layer", [0, 2, 3, -1])
def test_stopping_at_a_layer(bridge: TransformerBridge, tokens: Tensor, layer: int) -> None:
    expected = run(bridge, tokens, stop_at_layer=layer)
    with streaming(bridge):
        found = run(bridge, tokens, stop_at_layer=layer)
    torch.testing.assert_close(found, expected)


def test_starting_at_a_layer(bridge: TransformerBridge, tokens: Tensor) -> None:
    residual = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(2))
    expected = run(bridge, residual, start_at_layer=1)
    with streaming(bridge):
        found = run(bridge, residual, start_at_layer=1)
    torch.testing.assert_close(found, expected)


def test_head_results(bridge: TransformerBridge, tokens: Tensor) -> None:
    names = lambda name: name.endswith(("hook_result", "hook_attn_out"))  # noqa: E731
    bridge.set_use_attn_result(True)
    with torch.no_grad():
        _, expected = bridge.run_with_cache(tokens, names_filter=names)
        with streaming(bridge):
            _, found = bridge.run_with_cache(tokens, names_filter=names)
    assert "blocks.0.attn.hook_result" in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_mlp_inputs(bridge: TransformerBridge, tokens: Tensor) -> None:
    bridge.set_use_hook_mlp_in(True)
    edit = [("blocks.1.hook_mlp_in", lambda x, hook: x.roll(1, dims=-1))]
    with torch.no_grad():
        expected = bridge.run_with_hooks(tokens, fwd_hooks=edit)
        with streaming(bridge):
            found = bridge.run_with_hooks(tokens, fwd_hooks=edit)
    assert (expected - run(bridge, tokens)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected)


def test_forked_inputs_are_refused(bridge: TransformerBridge, tokens: Tensor) -> None:
    bridge.set_use_split_qkv_input(True)
    with pytest.raises(UnsupportedError, match="use_split_qkv_input"), streaming(bridge):
        pass
    bridge.set_use_split_qkv_input(False)
    with streaming(bridge):
        bridge.set_use_split_qkv_input(True)
        with pytest.raises(UnsupportedError, match="use_split_qkv_input"):
            run(bridge, tokens)
    assert is_stock(bridge)


def test_gradients_of_hooked_keys(bridge: TransformerBridge, tokens: Tensor) -> None:
    bridge.requires_grad_(True)

    def gradient() -> Tensor:
        seen: dict[str, Tensor] = {}
        with bridge.hooks(
            bwd_hooks=[("blocks.0.attn.hook_rot_k", lambda g, hook: seen.update(g=g.clone()))]
        ):
            bridge(tokens).square().sum().backward()
        return seen["g"]

    expected = gradient()
    with streaming(bridge):
        found = gradient()
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_attention_dropout_while_training(tokens: Tensor) -> None:
    bridge = load_model(llama(attention_dropout=0.5)).train()
    seen: list[Tensor] = []
    with streaming(bridge), torch.no_grad():
        hooks = [("blocks.0.attn.hook_pattern", lambda x, hook: seen.append(x.clone()))]
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        first, second = run(bridge, tokens), run(bridge, tokens)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    dropped = (seen[0][..., visible] == 0).float().mean()
    assert 0.35 < dropped < 0.65
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tokens: Tensor) -> None:
    wide, narrow = load_model(llama()), load_model(llama().to(dtype))
    expected = run(wide, tokens)
    seen: list[Tensor] = []
    with streaming(narrow), torch.no_grad():
        hooks = [("blocks.0.attn.hook_lse", lambda x, hook: seen.append(x))]
        logits = narrow.run_with_hooks(tokens, fwd_hooks=hooks)
    assert logits.dtype == dtype and seen[0].dtype == torch.float32
    stock = run(narrow, tokens)
    # As far from float32 as the stock bridge is, not further.
    ours, theirs = (logits.float() - expected).norm(), (stock.float() - expected).norm()
    assert ours < 1.5 * theirs


def test_compatibility_mode(tokens: Tensor) -> None:
    """Folded and centred weights: components then compute by themselves, and must be asked."""
    bridge = load_model(llama())
    bridge.enable_compatibility_mode(disable_warnings=True)
    expected = run(bridge, tokens)
    with streaming(bridge):
        torch.testing.assert_close(run(bridge, tokens), expected, rtol=1e-4, atol=1e-4)


def test_several_texts_in_one_row(bridge: TransformerBridge, tokens: Tensor) -> None:
    """Positions that start over pack texts, which transformers then masks from each other."""
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with streaming(bridge) as stream, torch.no_grad():
        packed = bridge.original_model(tokens[:1], position_ids=positions, use_cache=False).logits
        assert stream.calls[0].mask is not None and stream.calls[0].mask.ndim == 4
        apart = [bridge.original_model(part).logits for part in tokens[:1].split([5, 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1))


UNSUPPORTED = {
    "CodeGenForCausalLM": lambda: CodeGenForCausalLM(
        CodeGenConfig(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4,
            bos_token_id=1, eos_token_id=2,
        )
    ),
    "MambaForCausalLM": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refuses_what_it_cannot_stream_exactly(name: str) -> None:
    bridge = load_model(UNSUPPORTED[name]().eval())
    with pytest.raises(UnsupportedError, match=rf"{name} cannot stream.*eager"), streaming(bridge):
        pass
    assert "blocks.0.attn.hook_lse" not in bridge.hook_dict and nothing_registered()


def test_refuses_native_models() -> None:
    config = TransformerBridgeConfig(
        d_model=16, d_head=8, n_heads=2, n_layers=1, n_ctx=16, d_vocab=11, act_fn="gelu",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config)
    with pytest.raises(UnsupportedError, match="cannot stream"), streaming(bridge):
        pass


def test_no_mask_is_ever_built_for_a_plain_model(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window or padding is described, not written out as T×T."""
    built = []
    monkeypatch.setattr(
        masking_utils, "sdpa_mask", lambda **kwargs: built.append(kwargs) or sdpa_mask(**kwargs)
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=5)).eval()
    bridge = load_model(model)
    built.clear()  # the eager forward that the bridge was compared with
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with streaming(bridge):
        run(bridge, tokens, attention_mask=mask)
    assert not built


sdpa_mask = masking_utils.sdpa_mask


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (masking_utils.causal_mask_function, MaskSpec(True)),
        (masking_utils.bidirectional_mask_function, MaskSpec(False)),
        (masking_utils.sliding_window_causal_mask_function(3), MaskSpec(True, 3)),
        (masking_utils.sliding_window_bidirectional_mask_function(3), MaskSpec(False, 4)),
    ],
)
def test_masks_of_transformers_are_recognised(function, expected: MaskSpec) -> None:
    """And mean what they say: the description lets through exactly what transformers' mask does."""
    from sinkscope.attention.call import AttentionCall

    assert streaming_mask(1, 9, 9, mask_function=function) == expected
    dense = sdpa_mask(1, 9, 9, mask_function=function, allow_is_causal_skip=False)
    call = AttentionCall(1.0, window=expected.window, causal=expected.causal)
    seen = call.visible(slice(0, 9), slice(0, 9), torch.device("cpu"))
    assert torch.equal(torch.ones(1, 1, 9, 9, dtype=torch.bool) if seen is None else seen, dense)


def test_unknown_masks_are_written_out() -> None:
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    found = streaming_mask(2, 9, 9, mask_function=chunked)
    expected = sdpa_mask(2, 9, 9, mask_function=chunked, allow_is_causal_skip=False)
    assert torch.equal(found, expected)


def test_padding_that_pads_nothing_is_forgotten() -> None:
    assert (
        streaming_mask(2, 4, 4, attention_mask=torch.ones(2, 4, dtype=torch.bool)).padding is None
    )
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    assert torch.equal(streaming_mask(2, 4, 4, attention_mask=mask).padding, mask)
    # A static cache is longer than what has been seen.
    assert (
        streaming_mask(2, 4, 6, attention_mask=mask).padding.tolist()[1] == [True] * 4 + [False] * 2
    )
