"""Models in GGUF files, loaded by transformers and dequantised.

transformers dequantises a GGUF file on loading but still marks the model as quantised, which
prevents saving it. The weights are moved to a model with the same config without that mark.

transformers also ignores parts of some files without a warning: biases that the architecture's
config turns off by default, scaled rotary positions, the experts of some families. The file's
header is therefore compared with the resulting model.

Nor does it follow every file's rules for splitting text, and before version 5.18 it ignored whether
a BOS token belongs in front. A tokenizer is therefore used only if its rules are among those known
to be followed.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.checkpoint import quiet

_MAGIC = b"GGUF"


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a GGUF file, dequantised to ``dtype``, on the CPU.

    Raises:
        ModelError: If the file is truncated, damaged or not GGUF.
        UnsupportedError: If transformers cannot read GGUF files of this architecture, or ignores
            part of this file.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not start with {_MAGIC!r}.")
    folder, name = str(path.parent), path.name
    try:
        header = read_header(path)
        with quiet(), _one_bar(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, with output_loading_info
                folder,
                gguf_file=name,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            model, loading = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            if header.metadata.get("tokenizer.ggml.pre") in _DIGITS_APART:
                _split_digits(tokenizer)
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
    reason = _what_differs(header, model, loading) or _misread(header, tokenizer)
    if reason is not None:
        raise UnsupportedError(
            f"transformers does not read {path} as it is: {reason}. Use the model's safetensors "
            "checkpoint instead."
        )
    return _without_quantization(model), tokenizer


@contextmanager
def _one_bar(name: str) -> Iterator[None]:
    """A progress bar with the file's name that goes away, in place of transformers' own.

    That one is not under transformers' switch for progress bars.
    """

    def bar(tensors: Iterable[Any], **_: Any) -> Iterable[Any]:
        return tqdm(tensors, desc=f"Reading {name}", unit="tensor", leave=False)

    theirs = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = bar
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = theirs


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with quiet():
        return type(model).from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=model.dtype
        )


# -- tokenizers ------------------------------------------------------------------------------------

_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
"""Names that GGUF files have for the way GPT-2 splits text, which transformers' converter uses."""

_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Names for the same with each digit by itself, which transformers omits."""


def _split_digits(tokenizer: Any) -> None:
    """Split digits individually, then as GPT-2 does.

    Without this, "  12" becomes two single spaces and digits instead of a double space and digits.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _misread(header: Header, tokenizer: Any) -> str | None:
    """How the tokenizer differs from what the file states, in a few words; None if it does not."""
    kind = header.metadata.get("tokenizer.ggml.model")
    split = header.metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _AS_GPT2 | _DIGITS_APART:
        try:
            from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

            followed = mapping.GGUF_PRE_TOKENIZER_SPLITS
        except (ImportError, AttributeError):
            return f"its tokenizer needs version 5.18 or later (this is {transformers.__version__})"
        if kind == "gpt2" and split not in followed:
            return f"it splits text as GPT-2 does, whereas the file states {split!r}"
    if kind == "gemma4":  # its chat template writes the BOS token, whatever the file states
        return None
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if begins != header.metadata.get("tokenizer.ggml.add_bos_token", begins):
        which = "a" if begins else "no"
        return f"it puts {which} BOS token before a text, against what the file states"
    return None


# -- comparing the file's header with the loaded model ---------------------------------------------

_CLAIMS = {
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
}
"""Metadata that change what a model computes, and their names in transformers' configs."""


def _what_differs(
    header: Header, model: PreTrainedModel, loading: dict[str, set[Any]]
) -> str | None:
    """How the loaded model differs from the file, in a few words; None if it does not."""
    for name, in_file, in_model in sorted(loading["mismatched_keys"]):
        return f"it makes {name} {list(in_model)} where the file has {list(in_file)}"
    kind = header.metadata["general.architecture"]
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=model.config.to_dict())
    read = get_gguf_hf_weights_map(model, processor).keys()  # experts without ".weight"
    unread = {x for x in header.tensors if x not in read and x.removesuffix(".weight") not in read}
    if "rope_freqs.weight" in unread:
        return "it leaves out the scaling of the rotary frequencies (rope_freqs.weight)"
    for names, said in ((unread, "leaves out"), (loading["missing_keys"], "finds no")):
        if names:
            name, *others = sorted(names)
            return f"it {said} {name}" + (f" and {len(others)} more" if others else "")
    scaling = header.metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        return f"it leaves out the scaling of rotary positions ({scaling})"
    for key, name in _CLAIMS.items():
        claimed, read = header.metadata.get(f"{kind}.{key}"), getattr(model.config, name, None)
        if claimed and read is not None and abs(claimed - read) > 1e-6 * abs(claimed):
            return f"the file states {key} = {claimed:g}, and the model has {read:g}"
    return None


class Header(NamedTuple):
    """The header of a GGUF file: its scalar metadata (arrays are skipped) and its tensor names."""

    metadata: dict[str, Any]
    tensors: set[str]


_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}


def read_header(path: Path) -> Header:
    """Read the header only; gguf's own reader takes seconds to parse the vocabulary.

    Raises:
        struct.error: If the file ends inside the header.
    """
    with path.open("rb") as file:
        _, _, n_tensors, n_values = _unpack(file, "IIQQ")
        metadata = {}
        for _ in range(n_values):
            key, (kind,) = _text(file), _unpack(file, "I")
            metadata[key] = _value(file, kind)
        tensors = set()
        for _ in range(n_tensors):
            tensors.add(_text(file))
            (n_dims,) = _unpack(file, "I")
            _unpack(file, f"{n_dims}QIQ")
    return Header({key: value for key, value in metadata.items() if value is not None}, tensors)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    of, count = _unpack(file, "IQ")
    if of in _SCALARS:
        file.seek(count * struct.calcsize("<" + _SCALARS[of]), 1)
    else:
        for _ in range(count):
            _value(file, of)
    return None


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return file.read(length).decode("utf-8", "replace")


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))
