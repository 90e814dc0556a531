"""Models that are already in memory, with the traps that they bring."""

from __future__ import annotations

import copy

import pytest
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from sinkscope.capture.scan import scan
from sinkscope.errors import ModelError
from sinkscope.interventions import SelfOnlyMask
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source

from .files import TOKENS, logits, tiny_llama, tokenizer

BERT = BertConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)


def test_no_tokenizer_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    bridge = load_model(tiny_llama())
    assert torch.equal(logits(bridge), logits(tiny_llama()))
    source = model_source(bridge)
    assert (source.kind, source.name, source.revision) == ("memory", "LlamaForCausalLM", "")


def test_tokenizer_made_in_memory() -> None:
    """TransformerLens itself fails on one, or silently never prepends BOS."""
    words = tokenizer()
    before = copy.deepcopy(words.init_kwargs)
    bridge = load_model(tiny_llama(), tokenizer=words)
    assert bridge.to_tokens("w5 w6", prepend_bos=True).tolist() == [[1, 5, 6]]
    assert bridge.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert bridge.to_string(torch.tensor([5, 6])) == "w5 w6"
    assert words.init_kwargs == before


def test_models_of_one_config_stay_apart() -> None:
    """They share their config object, so switching one's attention would switch the other's."""
    config = LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ours, theirs = LlamaForCausalLM(config), LlamaForCausalLM(config)
    assert ours.config is theirs.config
    theirs.set_attn_implementation("sdpa")
    load_model(ours)
    assert theirs.config._attn_implementation == "sdpa"
    assert theirs.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert ours.model.layers[0].self_attn.config is ours.config is theirs.config


def test_sdpa_bert_shows_its_pattern() -> None:
    """Bridged with sdpa, BERT's hook_pattern would silently never fire."""
    model = BertModel(BERT)
    assert model.config._attn_implementation == "sdpa"
    assert "pattern" in capabilities(load_model(model)).signals


def test_training_mode_and_gradients() -> None:
    model = tiny_llama().train()
    bridge = load_model(model)
    assert not bridge.training
    assert all(parameter.requires_grad for parameter in bridge.parameters())  # the caller's affair


def test_device_and_dtype_stay_unless_asked_for() -> None:
    assert load_model(tiny_llama().to(torch.bfloat16)).cfg.dtype == torch.bfloat16
    assert load_model(tiny_llama(), dtype="bfloat16").cfg.dtype == torch.bfloat16
    assert load_model(tiny_llama(), device="cpu").cfg.device == "cpu"


def test_bridge_is_returned_as_it_is() -> None:
    bridge = load_model(tiny_llama()).train()
    assert load_model(bridge) is bridge
    assert bridge.training
    for arguments in ({"device": "cpu"}, {"dtype": "float32"}, {"tokenizer": tokenizer()}):
        with pytest.raises(ModelError, match="used as it is"):
            load_model(bridge, **arguments)


def test_foreign_bridge_has_a_source() -> None:
    bridge = load_model(tiny_llama())
    del bridge.__dict__["sinkscope_source"]
    source = model_source(bridge)
    assert (source.kind, source.name, source.trained_head) == ("bridge", "LlamaForCausalLM", True)


def test_copies_know_their_source() -> None:
    bridge = load_model(tiny_llama(), name="mine")
    assert model_source(copy.deepcopy(bridge)) == model_source(bridge)


def test_a_model_has_one_bridge() -> None:
    model = tiny_llama()
    bridge = load_model(model)
    assert load_model(model) is bridge
    cast = load_model(model, dtype="float64")
    assert cast is not bridge and cast.cfg.dtype == torch.float64
    assert load_model(model) is bridge and model.dtype == torch.float32
    copied = copy.deepcopy(bridge)
    assert load_model(copied.original_model) is copied is not bridge
    with pytest.raises(ModelError, match="inside a TransformerBridge already"):
        load_model(copied.original_model, name="other")
    by_hand = tiny_llama()
    build_bridge_from_module(by_hand, "LlamaForCausalLM", hf_config=by_hand.config)
    with pytest.raises(ModelError, match="inside a TransformerBridge already"):
        load_model(by_hand)


def test_a_model_in_memory_is_scanned_again_and_again() -> None:
    model, tokens = tiny_llama(), torch.arange(5, 25)[None]
    first, second = (scan(model, tokens, progress=False) for _ in range(2))
    torch.testing.assert_close(first.sink_attention, second.sink_attention)
    with SelfOnlyMask(load_model(model), position=5):
        masked = scan(model, tokens, progress=False)
    assert masked.settings.interventions == ("SelfOnlyMask(position=5)",)
    assert float((masked.sink_attention - first.sink_attention).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("body_class", "config"),
    [(BertModel, BERT), (LlamaModel, LlamaConfig(**tiny_llama().config.to_dict()))],
)
def test_headless_bodies(body_class: type, config) -> None:
    torch.manual_seed(0)
    body = body_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    weights = copy.deepcopy(body.state_dict())
    with torch.no_grad():
        expected = body(TOKENS).last_hidden_state
    states: list[torch.Tensor] = []
    bridges = [load_model(body)]
    again = body_class(copy.deepcopy(config))
    again.load_state_dict(weights)
    bridges.append(load_model(again))
    # What leaves the body: the input of the head.
    hook = "unembed.hook_in" if body_class is LlamaModel else "mlm_head.hook_in"
    for bridge in bridges:
        with torch.no_grad():
            bridge.run_with_hooks(
                TOKENS, fwd_hooks=[(hook, lambda t, hook: states.append(t.clone()))]
            )
        assert not model_source(bridge).trained_head
    assert all((state - expected).abs().max() < 1e-5 for state in states)
    assert torch.equal(logits(bridges[0]), logits(bridges[1]))


def test_weights_that_are_not_finite() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
        model.lm_head.weight[1, 1] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite values in 2 tensors"):
        load_model(model)


def test_device_map_is_for_files() -> None:
    with pytest.raises(ModelError, match="device_map is for models read from files"):
        load_model(tiny_llama(), device_map="auto")
