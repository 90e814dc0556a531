"""One training state in one file: safetensors, written whole or not at all.

Weights, optimiser state and the task's two tables are tensors; the step and the configuration are
metadata. Nothing is pickled, so a checkpoint from a stranger is data and never code.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sinkscope.bb.measurement import Phenomena
from sinkscope.bb.source import BigramSource
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd


# --- A run's measurements as tidy rows: step, metric, layer, head, value.

COLUMNS = ("step", "metric", "layer", "head", "value")


class Log:
    """Rows in the order they were measured. Layer and head are -1 where a metric has none."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str | int | float]] = []
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, step: int, metric: str, value: float) -> None:
        """Add one number that has neither layer nor head."""
        self.rows.append(dict(zip(COLUMNS, (step, metric, -1, -1, value), strict=True)))

    def extend(self, step: int, found: Phenomena) -> None:
        """Add everything measured at a step, which from then on is `in` the log."""
        self._steps.add(step)
        self.rows.extend({"step": step, **row} for row in found.rows())

    def frame(self) -> pd.DataFrame:
        """The rows as a frame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def write(self, path: Path) -> None:
        """Write as CSV, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path, until: int) -> Log:
        """Read back the rows up to a step: later ones belong to work that was lost with a kill."""
        log = cls()
        if not path.exists():
            raise ModelError(
                f"{path} is missing beside its checkpoint: put it back, or start in a new folder"
            )
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) <= until:
                    log.rows.append(
                        {
                            "step": int(row["step"]),
                            "metric": row["metric"],
                            "layer": int(row["layer"]),
                            "head": int(row["head"]),
                            "value": float(row["value"]),
                        }
                    )
        log._steps = {int(row["step"]) for row in log.rows}
        return log


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
