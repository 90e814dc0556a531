"""Hub ids: looked up before anything is downloaded, and refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sinkscope.errors import ModelError
from sinkscope.models.load import load_model
from sinkscope.models.provenance import model_source

from .files import llama_folder, logits, tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def answer(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[dict]:
    """Let the hub answer with a result or an error; collects what it is asked."""
    asked: list[dict] = []

    def model_info(self, name, **kwargs):
        asked.append({"name": name, **kwargs})
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked


def http_error(kind: type[Exception]) -> Exception:
    return kind("no", response=MagicMock(status_code=404))


def files(*names: str) -> SimpleNamespace:
    return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("error", "match"),
    [
        (http_error(RepositoryNotFoundError), "There is no model 'org/tiny'"),
        (http_error(GatedRepoError), "is a gated model: accept its terms"),
        (http_error(RevisionNotFoundError), "has no revision 'v9'"),
        (ConnectionError("unknown host"), "could not be reached .ConnectionError"),
        (TimeoutError("timed out"), "could not be reached .TimeoutError"),
    ],
)
def test_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, match: str) -> None:
    asked = answer(monkeypatch, error)
    with pytest.raises(ModelError, match=match) as caught:
        load_model("org/tiny", revision="v9")
    assert "\n" not in str(caught.value)
    assert asked == [{"name": "org/tiny", "revision": "v9", "timeout": 10.0}]


@pytest.mark.usefixtures("online")
def test_misspelt_names_get_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ConnectionError("no network"))
    for spec, meant in (("smolm2-135m", "smollm2-135m"), ("MiniLM", "minilm-l6")):
        with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
            load_model(spec)
    with pytest.raises(ModelError, match=r"give a packaged model .smollm2-135m, minilm-l6, bb-3l"):
        load_model("gpt2")


@pytest.mark.usefixtures("online")
def test_names_that_cannot_be() -> None:
    for spec in ("a b c", "a/b/c", "what?"):
        with pytest.raises(ModelError, match="cannot be the name of a model"):
            load_model(spec)


def test_offline_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = answer(monkeypatch, AssertionError("asked"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE prevents a download"):
        load_model("org/tiny")
    assert not asked


@pytest.mark.usefixtures("online")
def test_pickles_are_refused_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, files("config.json", "pytorch_model.bin", "tokenizer.json"))
    with pytest.raises(ModelError, match=r"pickle files only .pytorch_model.bin"):
        load_model("org/tiny")


def in_hub_cache(hub: Path, name: str = "org/tiny") -> None:
    """Lay a model out as a download does."""
    repo = hub / f"models--{name.replace('/', '--')}"
    llama_folder(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def test_downloaded_model_loads_offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    in_hub_cache(hub_cache)
    bridge = load_model("org/tiny", device="cpu")
    assert torch.equal(logits(bridge), logits(tiny_llama()))
    source = model_source(bridge)
    assert (source.kind, source.name, source.revision) == ("hub", "org/tiny", COMMIT)


@pytest.mark.usefixtures("online")
def test_checkpoint_becomes_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, http_error(RevisionNotFoundError))
    with pytest.raises(ModelError, match="has no revision 'step1000'"):
        load_model("EleutherAI/pythia-70m", checkpoint=1000)
    assert asked[0]["revision"] == "step1000"
    with pytest.raises(ModelError, match="either revision or checkpoint"):
        load_model("EleutherAI/pythia-70m", checkpoint=1000, revision="main")
    with pytest.raises(ModelError, match="checkpoint 5 of org/tiny"):
        load_model("org/tiny", checkpoint=5)
