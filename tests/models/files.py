"""Tiny model folders and files for the loading tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.families.architectures import BY_NAME, VOCAB

TOKENS = torch.arange(4, 28).reshape(2, 12)


def tiny_llama(**settings) -> LlamaForCausalLM:
    family = BY_NAME["llama"]
    return type(family)(family.name, family.model_class, family.settings | settings).build()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        output = model(TOKENS)
    return getattr(output, "logits", output)


def tokenizer() -> PreTrainedTokenizerFast:
    """Made in memory: it was never read from a folder. Word "w5" has the id 5."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = special | {f"w{i}": i for i in range(4, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def llama_folder(folder: Path, *, with_tokenizer: bool = True, **save) -> Path:
    tiny_llama().save_pretrained(folder, **save)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def llama_gguf(path: Path, pre: str = "gpt-2", **changes) -> Path:
    """The tiny Llama in GGUF, with a byte-level vocabulary; see `write_gguf`."""
    return write_gguf(path, tiny_llama(), "llama", pre, **changes)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    pre: str = "gpt-2",
    metadata: dict | None = None,
    tensors: dict | None = None,
    add_bos: bool | None = None,
) -> Path:
    """A model in GGUF under llama.cpp's names, as its converters write it, with a tiny vocabulary.

    `metadata` (without the architecture's prefix) and `tensors` are written besides, None leaves
    one out.
    """
    import gguf

    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    weights: dict[str, np.ndarray] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for theirs, array in _as_converted(name, weight.float().numpy(), config, architecture):
            ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            assert ours is not None, theirs
            weights[ours] = np.ascontiguousarray(array)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (values | (metadata or {})).items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
            str: writer.add_string,
        }
        add[type(value)](f"{architecture}.{key}", value)
    letters = ["<unk>", "<s>", "</s>", "Ġ", "ĠĠ", *map(chr, range(33, 28 + config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for name, array in (weights | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_converted(
    name: str, array: np.ndarray, config, architecture: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays that llama.cpp's converter makes of one weight."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = next((part for part in heads if part in name), None)
    if architecture == "llama" and part is not None:
        # The two halves of a rotary pair side by side, which transformers keeps apart.
        split = array.reshape(heads[part], 2, -1, *array.shape[1:])
        yield name, split.swapaxes(1, 2).reshape(array.shape)
    elif name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        yield from ((f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up))
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", array
    elif architecture == "lfm2" and name.endswith("conv.conv.weight"):
        yield name, array.squeeze(1)
    else:
        yield name, array
