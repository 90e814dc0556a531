"""A small model with a tokenizer, under the names that the documentation uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.prompts.tiny_tokenizers import byte_level


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with random weights and a byte-level tokenizer, as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("docs") / "small"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder
