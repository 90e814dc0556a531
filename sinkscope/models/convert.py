"""Conversions of packaged weights into folders that transformers loads in about a second."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForMaskedLM

from sinkscope.models.checkpoint import quiet, seeded_weights
from sinkscope.models.gguf import read_gguf


def convert_gguf(weights: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors, with its tokenizer."""
    model, tokenizer = read_gguf(weights, torch.float32)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_headless_bert(weights: Path, folder: Path) -> None:
    """Add an untrained masked-LM head to a BERT encoder, as a bridge requires one.

    The head is seeded; no measurement inside the blocks depends on it.
    """
    source = weights.parent
    with quiet(), seeded_weights():
        model = BertForMaskedLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    # The tokenizer is set to truncate and pad to 128 tokens; the model has 512 positions.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
