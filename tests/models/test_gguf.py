"""GGUF files: read like the model that they hold, or refused in one sentence."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import modeling_gguf_pytorch_utils

import sinkscope as ss
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.families import OWN, tiny_model
from sinkscope.models import gguf as gguf_module
from sinkscope.models.capabilities import capabilities
from sinkscope.models.gguf import read_gguf, read_header
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source

from .files import TOKENS, llama_gguf, logits, tiny_llama, write_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", pre="smollm")


def test_same_model(gguf_file: Path) -> None:
    bridge = load_model(gguf_file, device="cpu")
    assert (logits(bridge) - logits(tiny_llama())).abs().max() < 1e-5
    assert capabilities(bridge).architecture == "LlamaForCausalLM"
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    source = model_source(bridge)
    assert (source.kind, source.revision) == ("gguf", f"sha256:{digest}")


def test_one_progress_bar_which_names_the_file(gguf_file: Path, capfd) -> None:
    before = modeling_gguf_pytorch_utils.tqdm
    load_model(gguf_file)
    shown = capfd.readouterr().err
    assert f"Reading {gguf_file.name}" in shown and "de-quantizing" not in shown
    assert modeling_gguf_pytorch_utils.tqdm is before


def test_no_network(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert load_model(gguf_file, device="cpu").cfg.n_layers == 3


def test_dtype(gguf_file: Path) -> None:
    bridge = load_model(str(gguf_file), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in bridge.parameters()} == {torch.bfloat16}


def test_tokenizer_works_through_the_bridge(gguf_file: Path) -> None:
    bridge = load_model(gguf_file, device="cpu")
    ids = bridge.to_tokens("abc", prepend_bos=False)
    assert bridge.to_string(ids[0]) == "abc"
    assert bridge.to_tokens("abc", prepend_bos=True).tolist() == [[1, *ids[0].tolist()]]


def test_smollm_splits_digits_one_by_one(gguf_file: Path, tmp_path: Path) -> None:
    """Two spaces before a digit are one token: the digit is cut off before spaces are grouped."""
    assert read_header(gguf_file).metadata["tokenizer.ggml.pre"] == "smollm"
    _, with_scheme = read_gguf(gguf_file, torch.float32)
    _, without = read_gguf(llama_gguf(tmp_path / "other.gguf"), torch.float32)
    spaces = with_scheme.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  1")
    assert [piece for piece, _ in spaces] == ["ĠĠ", "1"]
    assert [p for p, _ in without.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  1")] == [
        "Ġ",
        "Ġ1",
    ]


def test_header_is_what_gguf_reads(gguf_file: Path) -> None:
    reader, header = gguf.GGUFReader(gguf_file), read_header(gguf_file)
    assert header.tensors == {tensor.name for tensor in reader.tensors}
    arrays = {
        key for key, field in reader.fields.items() if gguf.GGUFValueType.ARRAY in field.types
    }
    assert {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"} <= arrays
    single = {key for key in reader.fields if not key.startswith("GGUF.")} - arrays
    assert header.metadata == {key: reader.fields[key].contents() for key in single}


FAMILIES = {
    # class, what of the config GGUF files do not state (transformers' defaults), their metadata
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}, {"attention.key_length": 128}),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 4},
        {"attention.key_length": 8, "expert_count": 4, "expert_used_count": 2},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"block_auto_adjust_ff_dim": False},
        {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3},
    ),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_families(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys, experts, convolutions: equal to the model before it was saved."""
    name, settings, metadata = FAMILIES[architecture]
    monkeypatch.setitem(OWN, name, OWN.get(name, {}) | settings)
    model = tiny_model(name)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, metadata=metadata)
    with torch.no_grad():
        output = model(TOKENS, output_attentions=True)
    bridge = load_model(path, device="cpu")
    assert (logits(bridge) - output.logits).abs().max() < 1e-5 * output.logits.abs().max()
    report = ss.scan(bridge, ss.token_ids(TOKENS), progress=False)
    patterns = [pattern for pattern in output.attentions if pattern is not None]
    first = torch.stack([pattern[..., 1:, 0].mean(-1) for pattern in patterns], dim=1)
    attending = list(report.settings.attending)
    assert (report["sink_attention"][:, attending] - first).abs().max() < 1e-5


BIAS = {f"blk.{i}.attn_q.bias": np.ones(32, dtype=np.float32) for i in range(3)}
NOT_READ = {
    "biases": (dict(tensors=BIAS), "it leaves out blk.0.attn_q.bias and 2 more"),
    "frequencies": (
        dict(tensors={"rope_freqs.weight": np.full(4, 2.0, dtype=np.float32)}),
        "it leaves out the scaling of the rotary frequencies",
    ),
    "scaling": (
        dict(metadata={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        r"it leaves out the scaling of rotary positions \(yarn\)",
    ),
    "shape": (
        dict(metadata={"vocab_size": 90}),
        r"it makes lm_head.weight \[90, 32\] where the file has \[97, 32\]",
    ),
    "missing": (dict(tensors={"blk.1.ffn_up.weight": None}), "it finds no .*1.mlp.up_proj.weight"),
    "splits": (
        dict(pre="deepseek-coder"),
        "it splits text as GPT-2 does, whereas the file states 'deepseek-coder'",
    ),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_transformers_leaves_out_is_refused(case: str, tmp_path: Path) -> None:
    """Each gives another model than the file's, without a word from transformers."""
    changes, reason = NOT_READ[case]
    path = llama_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(UnsupportedError, match=f"does not read .*other.gguf as it is: {reason}"):
        load_model(path, device="cpu")


needs_tokenizers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="needs transformers 5.18"
)


@needs_tokenizers
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_as_the_file_states(add_bos: bool, tmp_path: Path) -> None:
    bridge = load_model(llama_gguf(tmp_path / "tiny.gguf", add_bos=add_bos), device="cpu")
    first = int(ss.texts(["abcdef"], prompts=1, length=3).tokenize(bridge).tokens[0, 0])
    assert bridge.tokenizer.convert_ids_to_tokens([first])[0] == ("<s>" if add_bos else "a")


@needs_tokenizers
def test_tokenizers_of_versions_that_ignore_bos_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers before 5.18, which also merged Gemma's pieces in a wrong order."""
    read = gguf_module.AutoTokenizer.from_pretrained

    def without_bos(*args, **kwargs):
        tokenizer = read(*args, **kwargs)
        tokenizer.add_bos_token = False
        return tokenizer

    monkeypatch.setattr(gguf_module.AutoTokenizer, "from_pretrained", without_bos)
    path = llama_gguf(tmp_path / "bos.gguf", add_bos=True)
    with pytest.raises(UnsupportedError, match="it puts no BOS token before a text"):
        load_model(path, device="cpu")
    other = llama_gguf(tmp_path / "other.gguf", pre="qwen2")
    assert load_model(other, device="cpu").tokenizer is not None
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    found = gguf_module._misread(read_header(other), None)
    assert found is not None and "needs version 5.18 or later" in found


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.5, 0.99])
def test_truncated(gguf_file: Path, tmp_path: Path, share: float) -> None:
    whole = gguf_file.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[: max(4, int(share * len(whole)))])
    with pytest.raises(ModelError, match="is truncated or damaged") as caught:
        load_model(short, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x00" * 4096])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(path, device="cpu")


def test_unknown_architecture(gguf_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = gguf_file.read_bytes().replace(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00zzzzz"
    )
    other.write_bytes(content)
    with pytest.raises(UnsupportedError, match="transformers cannot read"):
        load_model(other, device="cpu")


def test_weights_that_are_not_finite(gguf_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan.gguf"
    content = bytearray(gguf_file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # the last weight, float32 NaN
    broken.write_bytes(content)
    with pytest.raises(ModelError, match="NaN or infinite values"):
        load_model(broken, device="cpu")


def test_device_map_is_refused(gguf_file: Path) -> None:
    with pytest.raises(ModelError, match="device_map is not for GGUF"):
        load_model(gguf_file, device_map="auto")
