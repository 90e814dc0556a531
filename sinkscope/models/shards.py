"""Checks of the indices of sharded checkpoints, which may name only safetensors files next to them.

An index maps each weight to the file that contains it, and transformers opens any file named there.
Files other than safetensors are unpickled, which can run code, and a path may lead anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

from sinkscope.errors import ModelError

INDEX = ".safetensors.index.json"
"""Suffix of the names of indices."""


def check_indices(folder: Path, name: str) -> None:
    """Check every index of safetensors files in a folder.

    Args:
        folder: A model folder.
        name: Name of the checkpoint in errors.

    Raises:
        ModelError: If an index cannot be read, or names a file that is not a safetensors file
            inside the checkpoint.
    """
    for index in sorted(folder.glob(f"*{INDEX}")):
        check_index(index, name)


def check_index(index: Path, name: str) -> None:
    """Check one index.

    Raises:
        ModelError: If it cannot be read, or names a file that is not a safetensors file inside the
            checkpoint.
    """
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index.name} of {name} is damaged: it lists no weights.") from error
    for file in files:
        if not _is_inside(file):
            raise ModelError(
                f"{index.name} of {name} names {file!r}, which is not a safetensors file inside "
                "the checkpoint; it is not read."
            )


def _is_inside(file: object) -> bool:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    paths = PurePosixPath(file), PureWindowsPath(file)
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
