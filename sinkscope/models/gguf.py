"""Models in GGUF files, loaded by transformers and dequantised.

transformers dequantises a GGUF file on loading but still marks the model as quantised, which
prevents saving it. The weights are moved to a model with the same config without that mark.
"""

from __future__ import annotations

import copy
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.checkpoint import quiet

_MAGIC = b"GGUF"


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a GGUF file, dequantised to ``dtype``, on the CPU.

    Raises:
        ModelError: If the file is truncated, damaged or not GGUF.
        UnsupportedError: If transformers cannot read GGUF files of this architecture.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not start with {_MAGIC!r}.")
    folder, name = str(path.parent), path.name
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            _repair_digits(tokenizer, path)
            # It names a folder from which the tokenizer cannot be reloaded.
            tokenizer.init_kwargs.pop("name_or_path", None)
    except ImportError as error:
        raise ModelError(f"Reading {path} needs a package: {error}") from error
    except Exception as error:  # a damaged file may fail anywhere
        said = str(error).partition("\n")[0]
        if "not supported" in said:
            raise UnsupportedError(f"transformers cannot read {path}: {said}") from error
        raise ModelError(
            f"{path} is truncated or damaged ({said or type(error).__name__}); fetch it again."
        ) from error
    return _without_quantization(model), tokenizer


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with quiet():
        return type(model).from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=model.dtype
        )


def _repair_digits(tokenizer: Any, path: Path) -> None:
    """Split digits individually where the file requires it, a setting that transformers ignores.

    Without this, "  12" becomes two single spaces and digits instead of a double space and digits.
    """
    from tokenizers import pre_tokenizers

    if _pre_tokenizer(path) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _pre_tokenizer(path: Path) -> str:
    """The file's "tokenizer.ggml.pre", or "".

    Read directly from the bytes, because gguf's reader takes seconds to parse the vocabulary first.
    In GGUF a key is followed by its type (8 is a string), the string's length and its bytes.
    """
    key = b"tokenizer.ggml.pre"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(key)
        if at < 0:
            return ""
        kind, length = struct.unpack_from("<IQ", data, at + len(key))
        start = at + len(key) + struct.calcsize("<IQ")
        return data[start : start + length].decode("utf-8", "replace") if kind == 8 else ""
