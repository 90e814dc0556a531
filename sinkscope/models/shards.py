"""What the index of a checkpoint in several files may name: safetensors files beside it, no others.

An index maps each weight to the file that holds it, and transformers opens whatever it names. A
file that is no safetensors file is unpickled, which can run code, and a path may lead anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

from sinkscope.errors import ModelError

INDEX = ".safetensors.index.json"
"""How the names of such indices end."""


def check_indices(folder: Path, name: str) -> None:
    """Check every index of safetensors files in a folder.

    Args:
        folder: A model folder.
        name: What to call the checkpoint.

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
