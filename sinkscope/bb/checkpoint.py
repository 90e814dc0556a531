"""One training state in one file: safetensors, written whole or not at all.

Weights, optimiser state and the task's two tables are tensors; the step and the configuration are
metadata. Nothing is pickled, so a checkpoint from a stranger is data and never code.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sinkscope.bb.source import BigramSource
from sinkscope.errors import ModelError


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: weights (by parameter name), optimiser state, task tables and metadata."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    source: BigramSource
    metadata: dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a kill at any moment leaves the old file or the new one."""
    source = checkpoint.source
    tensors = {
        **{f"weights.{name}": value for name, value in checkpoint.weights.items()},
        **{f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()},
        "source.marginal": source.marginal,
        "source.transition": source.transition,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        **checkpoint.metadata,
        "source": {"name": source.name, "symbols": source.symbols},
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={k: json.dumps(v) for k, v in metadata.items()})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        ModelError: when the file is absent or is no checkpoint of the laboratory.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        described = metadata.pop("source")
        source = BigramSource(
            tensors.pop("source.marginal"),
            tensors.pop("source.transition"),
            tuple(described["symbols"]) if described["symbols"] else None,
            described["name"],
        )
    except FileNotFoundError:
        raise ModelError(f"there is no checkpoint {path}: train one first") from None
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a laboratory checkpoint ({type(error).__name__}: {error}): "
            f"delete it or name another file"
        ) from error
    return Checkpoint(_under(tensors, "weights."), _under(tensors, "optimizer."), source, metadata)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
