"""Tiny model folders and files for the loading tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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


def llama_gguf(path: Path, pre: str = "default") -> Path:
    """The tiny Llama in GGUF, written tensor by tensor, with a byte-level vocabulary."""
    import gguf

    config, weights = tiny_llama().config, tiny_llama().state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    letters = ["<unk>", "<s>", "</s>", "Ġ", "ĠĠ", *map(chr, range(33, 33 + VOCAB - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in weights.items():
        writer.add_tensor(_gguf_name(name), _gguf_weight(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, ours in renamed.items():
        name = name.replace(theirs, ours)
    return name


def _gguf_weight(name: str, weight: torch.Tensor, config) -> np.ndarray:
    """GGUF stores the two halves of a rotary pair side by side, transformers apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    array = weight.float().numpy()
    for part, count in heads.items():
        if part in name:
            split = array.reshape(count, 2, array.shape[0] // count // 2, array.shape[1])
            return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)
    return array
