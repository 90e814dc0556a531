"""Folders that are made once and trusted only while they are whole.

A folder's manifest, written last, holds the size and SHA-256 of every file and the recipe that
made it. A folder appears under its name in one step, so a process that dies half-way leaves
nothing that looks finished; a file that was damaged later no longer matches and the folder is
made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from sinkscope.errors import ModelError

_MANIFEST = "manifest.json"
Recipe = dict[str, Any]


def cache_dir() -> Path:
    """Where converted models are kept: $SINKSCOPE_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SINKSCOPE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sinkscope"))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_folder(name: str, recipe: Recipe, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the cache, made by ``make`` unless it is there and whole.

    Args:
        name: Folder name.
        recipe: What decides the contents (hashes of sources, version of the conversion); a folder
            made to another recipe is made anew. JSON values.
        make: Fills an empty folder. Called by one process at a time; others wait and share.

    Raises:
        ModelError: If the cache cannot be written.
    """
    folder = cache_dir() / name
    if is_whole(folder, recipe):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not is_whole(folder, recipe):  # another process may have been faster
                _replace(folder, recipe, make)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder.parent} cannot be written "
            f"({error.strerror or error}); set SINKSCOPE_CACHE to a folder that can."
        ) from error
    return folder


def is_whole(folder: Path, recipe: Recipe, *, deep: bool = True) -> bool:
    """Whether a cached folder is complete, undamaged and made to this recipe.

    Args:
        folder: A folder that `cached_folder` may have made.
        recipe: What it should have been made to.
        deep: Whether to compare the files' hashes and not only their sizes.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        return manifest["recipe"] == recipe and all(
            (folder / name).stat().st_size == entry["size"]
            and (not deep or sha256(folder / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _replace(folder: Path, recipe: Recipe, make: Callable[[Path], None]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        make(part)
        files = {
            path.relative_to(part).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(part.rglob("*"))
            if path.is_file()
        }
        manifest = json.dumps({"recipe": recipe, "files": files}, indent=2)
        (part / _MANIFEST).write_text(manifest, "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
