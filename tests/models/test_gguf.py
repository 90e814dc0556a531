"""GGUF files: read like the model that they hold, or refused in one sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.capabilities import capabilities
from sinkscope.models.gguf import _pre_tokenizer, read_gguf
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source

from .files import llama_gguf, logits, tiny_llama


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
    assert _pre_tokenizer(gguf_file) == "smollm"
    _, with_scheme = read_gguf(gguf_file, torch.float32)
    _, without = read_gguf(llama_gguf(tmp_path / "other.gguf"), torch.float32)
    spaces = with_scheme.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  1")
    assert [piece for piece, _ in spaces] == ["ĠĠ", "1"]
    assert [p for p, _ in without.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  1")] == [
        "Ġ",
        "Ġ1",
    ]


def test_file_without_a_pre_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no such key")
    assert _pre_tokenizer(tmp_path / "x.gguf") == ""


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
