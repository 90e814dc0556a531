"""Adapters and quantised weights, where the libraries that make them are installed."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinkscope.capture.scan import scan
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.output import output_weight
from sinkscope.models.provenance import model_identity, probe_logits
from sinkscope.models.replicas import replicas
from tests.families.architectures import BY_NAME

from .files import TOKENS, tiny_llama
from .test_proved import assert_measured, eager, sink_attention

# What PEFT warns of, and what it calls of transformers, is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TARGETS = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "llama": ["q_proj", "o_proj", "down_proj"],
}


def library(name: str) -> Any:
    """A library, or a skip; in an environment that is made for these tests it has to be there."""
    if os.environ.get("SINKSCOPE_REQUIRE_ADAPTERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def adapted(family: str, **settings: Any) -> Any:
    peft = library("peft")
    model = BY_NAME[family].build()
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=TARGETS[family], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", TARGETS)
def test_lora_is_measured_on_and_off(family: str) -> None:
    model = adapted(family)
    inside = model.get_base_model()
    on = eager(inside)
    assert (on - eager(BY_NAME[family].build())).abs().max() > 1e-2
    for attention in ("streaming", "eager"):
        torch.testing.assert_close(
            sink_attention(model, attention=attention), on, atol=1e-5, rtol=0
        )
    identity = model_identity(load_model(model))
    with model.disable_adapter():
        assert_measured(inside)
        assert model_identity(load_model(model)) != identity
    assert_measured(inside)


def test_the_share_of_an_adapter_in_the_output_projection_counts() -> None:
    model = adapted("llama")
    bridge = load_model(model)
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    z = torch.randn(1, 3, 32)
    with torch.no_grad():
        wanted = projection(z)
    found = torch.einsum("bqhd,hdm->bqm", z.unflatten(-1, (4, 8)), output_weight(bridge, 0))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert capabilities(bridge).split_output


def test_learned_prompts_are_refused() -> None:
    peft = library("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedError, match="learned prompts"):
        scan(peft.get_peft_model(tiny_llama(), config), TOKENS, progress=False)


def test_an_adapter_folder_says_what_to_do(tmp_path: Any) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"adapter of some/base.*AutoPeftModelForCausalLM"):
        load_model(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_weights_saved_from_inside_a_wrapper(tmp_path: Any, prefix: str) -> None:
    from safetensors.torch import save_file

    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    weights = {prefix + key: weight.clone() for key, weight in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"begin with '{prefix}'"):
        load_model(tmp_path)


def assert_like_itself(model: nn.Module) -> None:
    wanted: Tensor = eager(model)
    torch.testing.assert_close(sink_attention(model), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_torchao(family: str) -> None:
    torchao = library("torchao.quantization")
    model = BY_NAME[family].build()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert_like_itself(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_quanto(family: str) -> None:
    quanto = library("optimum.quanto")
    model = BY_NAME[family].build()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert_like_itself(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_replica_has_the_adapter(family: str) -> None:
    model = load_model(adapted(family))
    (copied,) = replicas(model, [torch.device("cpu")])
    assert torch.equal(probe_logits(copied), probe_logits(model))
    without = probe_logits(load_model(BY_NAME[family].build()))
    assert (probe_logits(copied) - without).abs().max() > 1e-2
