"""Save and load a training state in one safetensors file.

Weights, optimiser state and the two tables of the task are tensors; step, configuration and the
digests of the starting weights and of the log are JSON in the file's metadata. Nothing is pickled,
so loading an untrusted checkpoint runs no code; `load_checkpoint` verifies all of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sinkscope.bb.config import TrainConfig
from sinkscope.bb.model import BackcopyTransformer
from sinkscope.bb.source import BigramSource
from sinkscope.errors import ModelError, SinkscopeError
from sinkscope.output import write_file


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimiser steps.

    Attributes:
        weights: The model's weights, by parameter name.
        optimizer: The optimiser's state, named as by `Optimizers.tensors`; empty in snapshots.
        source: The bigram source of the task.
        config: The configuration of the run.
        step: Optimiser steps taken.
        start: Digest of the starting weights, if they were given.
        log: Digest of the log up to this step; None in snapshots and in files of older versions.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    source: BigramSource
    config: TrainConfig
    step: int
    start: str | None = None
    log: str | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        ReportError: If the file cannot be written; the old one is kept.
    """
    source = checkpoint.source
    tensors = {
        **{f"weights.{name}": value for name, value in checkpoint.weights.items()},
        **{f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()},
        "source.marginal": source.marginal,
        "source.transition": source.transition,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        "step": checkpoint.step,
        "config": asdict(checkpoint.config),
        "start": checkpoint.start,
        "log": checkpoint.log,
        "source": {"name": source.name, "symbols": source.symbols},
    }
    write_file(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote, onto the CPU.

    Raises:
        ModelError: If there is no such file, or it is not a checkpoint of this task: its step,
            configuration, source and weights must be there, fit each other and be finite.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"There is no checkpoint {path}; train one first.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _verified(metadata, tensors)
    except Exception as error:  # any error of a damaged or foreign file
        explained = isinstance(error, SinkscopeError) or type(error) is ValueError
        reason = str(error).rstrip(".") if explained else f"{type(error).__name__}: {error}"
        raise ModelError(
            f"{path} cannot be read as a Bigram-Backcopy checkpoint "
            f"({' '.join(reason.split())[:300]}); delete it, or name another file."
        ) from error


def _verified(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    if missing := [key for key in ("step", "config", "source") if key not in metadata]:
        raise ValueError(f"it says no {', '.join(missing)}")
    step, config = metadata["step"], TrainConfig.from_dict(metadata["config"])
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}, which is not a whole number from 0")
    for key in ("start", "log"):
        if not isinstance(metadata.get(key), str | None):
            raise ValueError(f"its {key} is {metadata[key]!r}, which is no digest")
    described = metadata["source"]
    source = BigramSource(
        tensors.pop("source.marginal"),
        tensors.pop("source.transition"),
        tuple(described["symbols"]) if described["symbols"] else None,
        described["name"],
    )
    if config.model.vocab != len(source) + 2:
        raise ValueError(f"its {len(source)} symbols do not make {config.model.vocab} token ids")
    weights = _under(tensors, "weights.")
    with torch.device("meta"):
        model = BackcopyTransformer(config.model)
    for name, expected in model.state_dict().items():
        if name not in weights:
            raise ValueError(f"its weights lack {name}")
        if weights[name].shape != expected.shape:
            raise ValueError(
                f"{name} has the shape {tuple(weights[name].shape)} and not "
                f"{tuple(expected.shape)}, as its configuration says"
            )
    if unknown := weights.keys() - model.state_dict().keys():
        raise ValueError(f"the model of its configuration has no {min(unknown)}")
    optimizer = _under(tensors, "optimizer.")
    for name, tensor in {**weights, **optimizer}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
    return Checkpoint(
        weights, optimizer, source, config, step, metadata.get("start"), metadata.get("log")
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
