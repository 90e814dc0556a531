"""Model folders: read whole, from safetensors, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from sinkscope.errors import ModelError, SinkscopeError, UnsupportedError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source

from .files import llama_folder, logits, tiny_llama, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "llama")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def refused(kind: type[SinkscopeError], spec, match: str, **kwargs) -> None:
    with pytest.raises(kind, match=match) as caught:
        load_model(spec, device="cpu", **kwargs)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence, sentence


@pytest.mark.usefixtures("no_network")
def test_with_tokenizer(folder: Path) -> None:
    bridge = load_model(folder, device="cpu")
    assert torch.equal(logits(bridge), logits(tiny_llama()))
    assert bridge.to_tokens("w5 w6", prepend_bos=True).tolist() == [[1, 5, 6]]
    assert bridge.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert not bridge.training
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


@pytest.mark.usefixtures("no_network")
def test_without_tokenizer_takes_exact_ids(tmp_path: Path) -> None:
    bridge = load_model(str(llama_folder(tmp_path / "m", with_tokenizer=False)), device="cpu")
    assert bridge.tokenizer is None
    assert torch.equal(logits(bridge), logits(tiny_llama()))
    assert capabilities(bridge).causal


def test_tokenizer_given(tmp_path: Path) -> None:
    path = llama_folder(tmp_path / "m", with_tokenizer=False)
    bridge = load_model(path, device="cpu", tokenizer=tokenizer())
    assert bridge.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]


def test_source_names_the_weights(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    source = model_source(load_model(folder, device="cpu"))
    assert (source.kind, source.name) == ("folder", str(folder))
    assert source.revision == f"sha256:{digest}"
    assert model_source(load_model(folder, device="cpu", name="mine")).name == "mine"


def test_source_of_shards_depends_on_each(tmp_path: Path) -> None:
    path = llama_folder(tmp_path / "m", max_shard_size="20KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    bridge = load_model(path, device="cpu")
    assert torch.equal(logits(bridge), logits(tiny_llama()))
    before = model_source(bridge).revision
    weights = load_file(shards[-1])
    save_file({key: 2 * weight for key, weight in weights.items()}, shards[-1], {"format": "pt"})
    assert model_source(load_model(path, device="cpu")).revision != before


def test_dtype(folder: Path) -> None:
    for dtype, expected in (
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        bridge = load_model(folder, device="cpu", dtype=dtype)
        assert {parameter.dtype for parameter in bridge.parameters()} == {expected}
        assert bridge.cfg.dtype == expected


def test_auto_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    assert load_model(tmp_path / "m", device="cpu", dtype="auto").cfg.dtype == torch.bfloat16
    assert load_model(tmp_path / "m", device="cpu").cfg.dtype == torch.float32


def test_device_map(folder: Path) -> None:
    bridge = load_model(folder, device_map={"": "cpu"})
    assert torch.equal(logits(bridge), logits(tiny_llama()))


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_model(folder, device="cpu")
    assert torch.equal(torch.rand(4), expected)


def test_pickle_only_is_refused(folder: Path) -> None:
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(ModelError, folder, "pickle files only .*allow_pickle=True")
    bridge = load_model(folder, device="cpu", allow_pickle=True)
    assert torch.equal(logits(bridge), logits(tiny_llama()))


def test_safetensors_win_over_a_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    bridge = load_model(folder, device="cpu", allow_pickle=True)
    assert torch.equal(logits(bridge), logits(tiny_llama()))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(ModelError, folder, "truncated or damaged")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, with_tokenizer: bool) -> None:
    folder = llama_folder(tmp_path / "m", with_tokenizer=with_tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(
        ModelError, folder, r"1 tensors \(first model.layers.1.mlp.up_proj.weight\).*every result"
    )


def test_missing_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.v_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(ModelError, folder, "lacks 1 of the weights of LlamaForCausalLM .*v_proj")


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    said = r"layers\.0\.mlp\.down_proj.* \[32, 48\] where \[32, 64\] was expected"
    refused(ModelError, folder, said)


def test_missing_head_is_told_and_always_the_same(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    first, second = (load_model(tmp_path / "bert", device="cpu") for _ in range(2))
    assert not model_source(first).trained_head
    assert not capabilities(first).lm_head
    assert "no output head" in capabilities(first).undefined["loss"]
    assert torch.equal(logits(first), logits(second))
    body = BertModel.from_pretrained(tmp_path / "bert", attn_implementation="eager").eval()
    final: list[torch.Tensor] = []
    hook = [("blocks.1.hook_resid_post", lambda tensor, hook: final.append(tensor.clone()))]
    with torch.no_grad():
        expected = body(torch.arange(4, 16)[None]).last_hidden_state
        first.run_with_hooks(torch.arange(4, 16)[None], fwd_hooks=hook)
    assert (final[0] - expected).abs().max() < 1e-6


def test_unknown_architectures(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"model_type": "no-such-model", "architectures": ["NoSuchModel"]},
        {"model_type": "vitpose", "architectures": ["VitPoseForPoseEstimation"]},
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(UnsupportedError, folder, f"cannot bridge .{change['model_type']}")


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changed = config | {"model_type": "evil", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    refused(ModelError, folder, "own Python code.*trust_remote_code=True")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(ModelError, folder, "cannot be read")


def test_broken_tokenizer_is_not_taken_for_none(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    refused(ModelError, folder, "cannot be read")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(ModelError, folder, "cannot be read")


def test_folders_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(ModelError, folder, "holds no .safetensors weights")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    refused(ModelError, folder, r"path of the GGUF file itself \(model-q4.gguf\)")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    for spec in (tmp_path / "nothing", "./nothing", "nothing.gguf"):
        refused(ModelError, spec, "There is no file or folder")


def test_a_file_that_is_no_model(folder: Path) -> None:
    refused(ModelError, folder / "model.safetensors", "not a .gguf file; give the folder")


def test_arguments_that_make_no_sense(folder: Path) -> None:
    refused(ModelError, folder, "either device or device_map", device_map="auto")
    refused(ModelError, folder, "'int8' is not a dtype", dtype="int8")
    refused(ModelError, folder, "'float99' is not a dtype", dtype="float99")
    refused(ModelError, folder, "revision and checkpoint are for", revision="main")
    refused(ModelError, folder, "revision and checkpoint are for", checkpoint=3)
    refused(ModelError, torch.nn.Linear(2, 2), "Linear is neither a transformers model nor")
    for device in ("cuda:99", "tpu-of-mine"):
        with pytest.raises(ModelError, match="There is no device"):
            load_model(folder, device=device)


def test_tilde_is_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(folder.parent))
    assert load_model("~/llama", device="cpu").cfg.n_layers == 3
