"""What a checkpoint's report is made of, told before the checkpoint is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from sinkscope._settings import library_versions
from sinkscope.experiments._partial import digest, weights_of
from sinkscope.texts import Texts, TextSource

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def asked_of(
    model: str | Path | None,
    checkpoint: Any,
    source: TextSource | Texts,
    sinks: Any,
    options: dict[str, Any],
) -> dict[str, str]:
    """Everything that decides the figures: only a report that was asked for alike is taken up.

    Args:
        model: The Hub model that steps and revisions are of.
        checkpoint: As `dynamics` takes it. What a function will give is not known.
        source: The prompts.
        sinks: The sink positions.
        options: Of `load_model`.
    """
    tokenizer = options.get("tokenizer")
    return {
        "checkpoint": _checkpoint(model, checkpoint, options),
        "dtype": _dtype(checkpoint, options),
        "tokenizer": "" if tokenizer is None else str(getattr(tokenizer, "name_or_path", "given")),
        "texts": _texts(source),
        "sinks": sinks if isinstance(sinks, str) else _listed(sinks),
        "version of sinkscope": library_versions()["sinkscope"],
    }


def _checkpoint(model: str | Path | None, checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        return f"{type(checkpoint).__name__} with weights {weights_of(checkpoint)}"
    if isinstance(checkpoint, int):
        return f"step {checkpoint} of {model}"
    if callable(checkpoint):
        return "what a function gives"
    path = Path(checkpoint).expanduser()
    if path.exists():
        return _on_disk(path.resolve())
    if model is not None:
        return f"revision {checkpoint} of {model}"
    revision = options.get("revision")
    return str(checkpoint) if revision is None else f"revision {revision} of {checkpoint}"


def _on_disk(path: Path) -> str:
    """A path, and what changes when the weights there are written anew."""
    files = [path] if path.is_file() else [f for glob in _WEIGHTS for f in path.glob(glob)]
    found = [file.stat() for file in files]
    size = sum(each.st_size for each in found)
    written = datetime.fromtimestamp(max((each.st_mtime for each in found), default=0))
    return f"{path}, {size:,} bytes of {written:%Y-%m-%d %H:%M:%S.%f}"


def _dtype(checkpoint: Any, options: dict[str, Any]) -> str:
    if isinstance(checkpoint, nn.Module):
        dtype: Any = next(checkpoint.parameters()).dtype
    else:
        dtype = options.get("dtype") or "float32"
    return str(dtype).removeprefix("torch.")


def _texts(source: TextSource | Texts) -> str:
    """Exact ids by their hash; a recipe by its settings and the hash of its text."""
    if isinstance(source, Texts):
        return f"{source.source}, tokens {digest(source.right_padded())}"
    settings = {
        field.name: getattr(source, field.name)
        for field in dataclasses.fields(source)
        if field.name not in ("name", "documents") and getattr(source, field.name) is not None
    }
    documents = getattr(source, "documents", None)
    if documents is not None:
        content = hashlib.sha256()
        for document in islice(documents(), source.prompts):
            content.update(document.encode() + b"\0")
        settings["text"] = content.hexdigest()[:16]
    return ", ".join([source.name, *(f"{name} {value}" for name, value in settings.items())])


def _listed(sinks: Any) -> str:
    return ",".join(map(str, sinks)) if isinstance(sinks, Iterable) else str(sinks)
