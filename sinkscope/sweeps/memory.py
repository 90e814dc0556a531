"""Memory of a sweep's models, estimated from their files without loading them.

weights   parameters × bytes of the dtype; the parameters are counted in the headers of the
          safetensors files
working   for one prompt of T tokens, the largest activations of a block, in fp32:
          T (10 d + 3 d_mlp), and the logits' T × vocabulary once
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkscope.models.packaged import BUILT_IN, PACKAGES, cache_dir
from sinkscope.prompts.tokens import Texts
from sinkscope.sweeps.grid import Case, Model

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SIZES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1}
_FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Memory that one worker needs for a model.

    Attributes:
        model: Its label, with the checkpoint.
        weights: Size of all weights [byte]; None without local files.
        working: Working memory for one prompt of the longest text [byte]; None for unknown sizes.
    """

    model: str
    weights: float | None
    working: float | None


def estimate(cases: Sequence[Case]) -> Estimate:
    """Estimate the memory of a model for its cases."""
    model = cases[0].model
    step = "" if model.checkpoint is None else f", step {model.checkpoint}"
    folder = _folder(model)
    weights = _weights(model, folder)
    longest = max((_length(case) for case in cases), default=0)
    return Estimate(f"{model.label}{step}", weights, _working(folder, longest))


def _folder(model: Model) -> Path | None:
    """Return the folder of the files, if they are local."""
    if model.in_memory:
        return None
    spec = str(model.spec)
    if spec in PACKAGES:
        return cache_dir() / spec
    if spec in BUILT_IN:
        return None
    path = Path(spec).expanduser()
    if path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(spec, "config.json", revision=model.options.get("revision"))
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _weights(model: Model, folder: Path | None) -> float | None:
    if model.in_memory:
        return float(sum(p.numel() * p.element_size() for p in model.spec.parameters()))
    if folder is None:
        return None
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        return None
    size = _BYTES.get(str(model.options.get("dtype", "float32")))
    tensors = [one for file in files for one in _tensors(file)]
    return float(sum(math.prod(shape) * (size or own) for shape, own in tensors))


def _tensors(file: Path) -> list[tuple[list[int], int]]:
    """Return shape and bytes per number of each tensor in a safetensors file, from its header."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length))
    except (OSError, ValueError, struct.error):
        return []
    return [
        (entry["shape"], _SIZES.get(entry["dtype"], _FP32))
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _working(folder: Path | None, length: int) -> float | None:
    if folder is None or not folder.is_dir() or not length:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = config.get("text_config", config)
    width, inner = config.get("hidden_size"), config.get("intermediate_size")
    vocabulary = config.get("vocab_size", 0)
    if not isinstance(width, int):
        return None
    inner = inner if isinstance(inner, int) else 4 * width
    return float(_FP32 * length * (10 * width + 3 * inner + vocabulary))


def _length(case: Case) -> int:
    if isinstance(case.texts, Texts):
        return case.texts.tokens.shape[1]
    return case.texts.length or 0
