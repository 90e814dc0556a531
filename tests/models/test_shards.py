"""An index may name safetensors files of its checkpoint, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from sinkscope.errors import ModelError
from sinkscope.models import hub
from sinkscope.models.load import load_model
from sinkscope.models.shards import check_indices
from tests.families.architectures import BY_NAME

BAD = [
    "pytorch_model.bin", "../elsewhere/model.safetensors", "/tmp/model.safetensors",
    "a/../../model.safetensors", "..\\model.safetensors", "C:\\model.safetensors", "model", 3, None,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in several files."""
    BY_NAME["llama"].build().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def point(folder: Path, file: object) -> None:
    (index,) = folder.glob("*.index.json")
    listed = json.loads(index.read_text())
    first = min(listed["weight_map"])
    listed["weight_map"][first] = file
    index.write_text(json.dumps(listed))


def test_an_index_as_transformers_writes_it_is_fine(folder: Path) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    check_indices(folder, "model")
    assert load_model(folder, device="cpu").cfg.n_layers == 3


@pytest.mark.parametrize("file", BAD)
def test_what_lies_elsewhere_or_is_no_safetensors_file_is_not_read(folder: Path, file) -> None:
    point(folder, file)
    with pytest.raises(ModelError, match=r"index\.json of .* names .* it is not read\.$"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_one_sentence(folder: Path, text: str) -> None:
    (index,) = folder.glob("*.index.json")
    index.write_text(text)
    with pytest.raises(ModelError, match="is damaged: it lists no weights"):
        load_model(folder, device="cpu")


def test_an_index_of_the_hub_is_checked_before_the_weights_are_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    point(folder, "pytorch_model.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names = [path.name for path in folder.iterdir()]
    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: info)
    fetched: list[str] = []

    def fetch(name: str, file: str, **options: object) -> str:
        fetched.append(file)
        return str(folder / file)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    with pytest.raises(ModelError, match=r"org/tiny names 'pytorch_model\.bin'"):
        load_model("org/tiny", device="cpu")
    assert fetched == ["model.safetensors.index.json"]
