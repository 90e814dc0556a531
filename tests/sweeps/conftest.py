"""Three tiny models of two families as folders, and sweeps over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.prompts.tiny_tokenizers import byte_level


def tiny(family: str = "llama", seed: int = 0) -> Any:
    """A seeded model whose attention is far from uniform."""
    torch.manual_seed(seed)
    common = dict(vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **common,
        )
    ).eval()


def saved(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Such a model with a byte-level tokenizer, in a folder."""
    tiny(family, seed).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of files are not remembered beyond a test."""
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints step-100 and step-200 of a Llama."""
    folder = tmp_path_factory.mktemp("models") / "run"
    for seed, step in enumerate((100, 200)):
        saved(folder / f"step-{step}", seed=seed)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")
