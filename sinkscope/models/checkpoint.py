"""Reading checkpoints from folders or the hub: safetensors only, complete, finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import PreTrainedModel
from transformers.utils import logging

from sinkscope.errors import ModelError, SinkscopeError, UnsupportedError
from sinkscope.models.sharing import shared_copy

# -- silencing transformers' progress bars and load reports ----------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Limit transformers' logging to errors within the context.

    The caller checks and reports the content of its load reports (missing weights).
    """
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


# -- reproducible initialisation of weights that a checkpoint lacks --------------------------------


@contextmanager
def seeded_weights(seed: int = 0) -> Iterator[None]:
    """Seed torch's CPU generator within the context; its state is restored afterwards."""
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "vocab.txt",
    }
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointReader:
    """Replacement for a transformers Auto class that refuses unsafe or incomplete checkpoints.

    TransformerLens calls `from_pretrained` on it as on any model class.

    Attributes:
        allow_pickle: Whether weights may come from pickle files, which can run code.
        trained_head: Whether the checkpoint contains an output head.
        reference: A `shared_copy` of the model that is not part of any bridge.
    """

    def __init__(self, allow_pickle: bool = False) -> None:
        self.allow_pickle = allow_pickle
        self.trained_head = True
        self.reference: PreTrainedModel | None = None

    def from_pretrained(self, name: str, **kwargs: Any) -> PreTrainedModel:
        """Read a model as the Auto class of its architecture does.

        Raises:
            ModelError: If shapes of weights do not match the config, or weights other than the
                output head are missing.
        """
        architecture = determine_architecture_from_hf_config(kwargs["config"])
        auto_class: Any = get_hf_model_class_for_architecture(architecture)
        if not self.allow_pickle:
            kwargs["use_safetensors"] = True
        # transformers would only say "see the report above"; the shapes are reported below.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet(), seeded_weights():
            model, info = auto_class.from_pretrained(name, **kwargs)
        if info["mismatched_keys"]:  # a set: always report the same one
            key, shape, expected = min(info["mismatched_keys"])
            raise ModelError(
                f"The weights of {name} do not fit its config: {key} has the shape "
                f"{list(shape)} where {list(expected)} was expected."
            )
        _refuse_wrapped(info["unexpected_keys"], name)
        self.trained_head = has_trained_head(model, info["missing_keys"], name)
        self.reference = shared_copy(model.eval())
        return model


def _refuse_wrapped(unexpected: Iterable[str], name: str) -> None:
    """Refuse weights that were saved with a wrapper of torch around the model.

    Raises:
        ModelError: If the names of weights have the prefix of a wrapper.
    """
    for prefix, wrapper in (("_orig_mod.", "torch.compile"), ("module.", "DataParallel")):
        if any(key.startswith(prefix) for key in unexpected):
            raise ModelError(
                f"The names of the weights of {name} begin with {prefix!r}: the model was saved "
                f"inside a wrapper ({wrapper}); save the model itself (.{prefix.rstrip('.')})."
            )


def has_trained_head(model: PreTrainedModel, missing: Iterable[str], name: str) -> bool:
    """Whether the checkpoint includes the output head.

    Raises:
        ModelError: If weights other than the head are missing.
    """
    missing = sorted(missing)
    body = [key for key in missing if key.startswith(model.base_model_prefix + ".")]
    if body:
        raise ModelError(
            f"The checkpoint {name} lacks {len(body)} of the weights of {type(model).__name__} "
            f"({body[0]}, …); it is incomplete or of another architecture."
        )
    return not missing


def check_files(name: str, files: Iterable[str], allow_pickle: bool) -> None:
    """Check the file names of a checkpoint before anything is read.

    Raises:
        ModelError: If there are no safetensors weights (or, where allowed, no weights at all).
    """
    files = list(files)
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith(_PICKLES)]
    if pickles and allow_pickle:
        return
    if pickles:
        raise ModelError(
            f"{name} has its weights in pickle files only ({pickles[0]}), which can run code when "
            "loaded; convert them to safetensors, or pass allow_pickle=True if you trust them."
        )
    gguf = [file for file in files if file.endswith(".gguf")]
    hint = f"; give the path of the GGUF file itself ({gguf[0]})" if gguf else ""
    raise ModelError(f"{name} holds no .safetensors weights{hint}.")


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether the files of a checkpoint include a tokenizer."""
    return any(file in _TOKENIZER_FILES or file.endswith(".tiktoken") for file in files)


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse weights that contain NaN or infinity.

    Raises:
        ModelError: With the number of affected tensors and the name of the first.
    """
    broken = [
        key.replace("._original_component", "")
        for key, weight in model.named_parameters()
        if weight.is_floating_point() and not _is_finite(weight.detach())
    ]
    if broken:
        raise ModelError(
            f"The weights of {name} contain NaN or infinite values in {len(broken)} tensors "
            f"(first {broken[0]}), so every result would be NaN; the checkpoint is damaged."
        )


_PIECE = 2**24


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a weight, or every component of a quantised one, is finite."""
    if hasattr(weight, "__tensor_flatten__"):  # torchao: a wrapper of integers and scales
        names, _ = weight.__tensor_flatten__()
        return all(_is_finite(getattr(weight, name)) for name in names)
    if weight.is_meta or not weight.numel() or not weight.is_floating_point():
        return True
    if weight.element_size() > 1:
        # aminmax propagates NaN and infinity without a temporary of the weight's size.
        return bool(torch.stack(weight.aminmax()).isfinite().all())
    pieces = weight.flatten().split(_PIECE)  # torch cannot compare 8-bit floats
    return all(bool(piece.float().isfinite().all()) for piece in pieces)


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Convert errors of transformers and TransformerLens on a bad checkpoint into one sentence.

    Raises:
        ModelError: If the checkpoint cannot be read.
        UnsupportedError: If transformers or TransformerLens does not support its architecture.
    """
    try:
        yield
    except SinkscopeError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name} does not fit into the device's memory; try dtype='bfloat16' or "
            "device_map='auto'."
        ) from error
    except SafetensorError as error:
        raise ModelError(
            f"The weights of {name} are truncated or damaged ({error}); fetch them again."
        ) from error
    except Exception as error:  # on malformed files the libraries may raise anything
        raise _in_one_sentence(name, error) from error


def _in_one_sentence(name: str, error: Exception) -> SinkscopeError:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AttributeError | KeyError | TypeError):  # unclear without its class
        said = f"{type(error).__name__}: {said}"
    if "trust_remote_code" in said:
        return ModelError(
            f"{name} comes with its own Python code, which is not run unless you pass "
            "trust_remote_code=True."
        )
    if "supported architecture" in said or "does not recognize this architecture" in said:
        return UnsupportedError(
            f"{name} is of an architecture that TransformerLens cannot bridge "
            f"({_model_type(said)}), so sinkscope cannot measure it."
        )
    return ModelError(
        f"{name} cannot be read by transformers and TransformerLens: {_shortened(said)}."
    )


def _model_type(said: str) -> str:
    for mark in ("Model type: ", "model type "):
        if mark in said:
            return said.rpartition(mark)[2].split()[0].strip("`'\".,")
    return "unknown"


def _shortened(said: str, limit: int = 240) -> str:
    said = said.rstrip(".!")
    return said if len(said) <= limit else said[: limit - 1].rstrip() + "…"
