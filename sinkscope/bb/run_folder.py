"""The folder of one training run: checkpoint, log and snapshots, with one writer at a time.

checkpoint.safetensors    the last saved state
log.csv                   the measurements
step-000500.safetensors   a snapshot: the weights after 500 steps
.lock                     held by the process that trains here
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinkscope.bb.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sinkscope.bb.log import Log
from sinkscope.errors import ModelError, ReportError
from sinkscope.output import locked

CHECKPOINT, LOG = "checkpoint.safetensors", "log.csv"

_UNFINISHED = re.compile(
    r"\.(checkpoint|step-\d+|log|runs|summary)\.\w+\.[0-9a-f]{8}\.tmp"
    r"|(checkpoint\.safetensors|step-\d+\.safetensors|log\.csv)\.partial"
)
"""Unfinished files of older versions; `output.write_file` removes its own on the next write."""


class RunFolder:
    """Reads and writes the files of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> tuple[Checkpoint, Log] | None:
        """Return the last saved state with the log up to its step, or None if no run was saved.

        Raises:
            ModelError: If a file is damaged, or the log is not the one of the checkpoint.
        """
        if not (self.path / CHECKPOINT).exists():
            return None
        saved = load_checkpoint(self.path / CHECKPOINT)
        log = Log.read(self.path / LOG, until=saved.step)
        if saved.log is not None and log.digest() != saved.log:
            raise ModelError(
                f"{self.path / LOG} is not the log that its checkpoint was saved with; put that "
                "one back, or start in a new folder."
            )
        return saved, log

    def save(self, state: Checkpoint, log: Log) -> None:
        """Save the log, the snapshot if this step is one of the configuration's, and the state.

        Raises:
            ReportError: If a file cannot be written; the last saved state is kept.
        """
        log.write(self.path / LOG)
        if state.step in state.config.snapshots:
            save_checkpoint(
                self.snapshot(state.step), dataclasses.replace(state, optimizer={}, log=None)
            )
        save_checkpoint(self.path / CHECKPOINT, state)

    def snapshot(self, step: int) -> Path:
        """Return the file with the weights after a step."""
        return self.path / f"step-{step:06d}.safetensors"


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Create the folder, and lock it for training until the context ends.

    Temporary files that a killed run left in the folder are removed.

    Raises:
        ModelError: If another process trains there.
        ReportError: If the folder cannot be created or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReportError(f"{folder} cannot be used for a run: {reason}.") from error
    busy = ModelError(
        f"Another process is training in {folder}; wait until it has ended, or give another folder."
    )
    with locked(folder, busy):
        for file in folder.iterdir():
            if _UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)
        yield
