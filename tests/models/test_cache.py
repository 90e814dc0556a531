"""Cached folders are whole or not there, whatever happens while they are made."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkscope.errors import ModelError
from sinkscope.models.packaged import cache_dir, cached_folder, is_whole

RECIPE = {"sha256": "0" * 64, "conversion": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "model.bin").write_bytes(bytes(range(256)) * 40)
        (folder / "sub" / "notes.txt").write_text("made")


def test_made_once_and_reused(cache: Path) -> None:
    maker = Maker()
    first = cached_folder("m", RECIPE, maker)
    assert first == cache / "m" and (first / "sub" / "notes.txt").read_text() == "made"
    assert cached_folder("m", RECIPE, maker) == first
    assert maker.calls == 1
    assert [path.name for path in cache.glob("*")] == ["m"] or os.listdir(cache)
    assert not list(cache.glob(".m.*.part"))


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.bin").read_bytes())
    content[5000] ^= 1
    (folder / "model.bin").write_bytes(content)


def cut_short(folder: Path) -> None:
    (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1])


def lose_a_file(folder: Path) -> None:
    (folder / "sub" / "notes.txt").unlink()


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        cut_short,
        lose_a_file,
        cut_the_manifest,
        lose_the_manifest,
        empty_the_manifest,
    ],
)
def test_damage_is_noticed_and_mended(damage) -> None:
    maker = Maker()
    folder = cached_folder("m", RECIPE, maker)
    damage(folder)
    assert not is_whole(folder, RECIPE)
    assert is_whole(cached_folder("m", RECIPE, maker), RECIPE)
    assert maker.calls == 2
    assert (folder / "model.bin").read_bytes() == bytes(range(256)) * 40


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize(
    ("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_whom_the_umask_allows_may_read_the_cache(umask: int, folders: int, files: int) -> None:
    class Private(Maker):
        def __call__(self, folder: Path) -> None:
            super().__call__(folder)
            (folder / "model.bin").chmod(0o600)

    before = os.umask(umask)
    try:
        made = cached_folder("m", RECIPE, Private())
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == (made / "sub").stat().st_mode & 0o777 == folders
    for name in ("model.bin", "sub/notes.txt", "manifest.json"):
        assert (made / name).stat().st_mode & 0o777 == files


def test_a_cache_of_somebody_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached_folder("m", RECIPE, Maker())
    monkeypatch.setattr("sinkscope.models.packaged.is_whole", lambda *args, **kwargs: False)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ModelError, match="another user's and cannot be read; .* SINKSCOPE_CACHE"):
        cached_folder("m", RECIPE, Maker())
    assert (folder / "model.bin").exists()


def test_another_recipe_makes_it_anew() -> None:
    maker = Maker()
    cached_folder("m", RECIPE, maker)
    cached_folder("m", RECIPE | {"conversion": 2}, maker)
    assert maker.calls == 2


def test_failure_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.bin").write_bytes(b"half")
        raise ModelError("The weights are damaged.")

    with pytest.raises(ModelError, match="damaged"):
        cached_folder("m", RECIPE, fail)
    assert not (cache / "m").exists() and not list(cache.glob(".m.*.part"))


def test_full_disk_is_one_sentence() -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelError, match=r"cannot be written .No space left on device.*SINKSCOPE"):
        cached_folder("m", RECIPE, fail)


def test_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be written.*SINKSCOPE_CACHE"):
        cached_folder("m", RECIPE, Maker())


def test_default_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SINKSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_dir() == tmp_path / "xdg" / "sinkscope"
    assert cache_dir().name == "sinkscope" or "sinkscope" in cache_dir().parts


SLOW = """
import sys, time
from pathlib import Path
from sinkscope.models.packaged import cached_folder
def make(folder):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    (folder / "model.bin").write_bytes(b"a" * 1000)
    time.sleep(float(sys.argv[2]))
    (folder / "model.bin").write_bytes(b"b" * 1000)
print(cached_folder("m", {"conversion": 1}, make), flush=True)
"""


def start(log: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(log), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_processes_at_once_make_it_once(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    processes = [start(log, 0.5) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(cache / "m")] * 4
    assert log.read_text() == "made\n"
    assert (cache / "m" / "model.bin").read_bytes() == b"b" * 1000


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    with start(log, 60) as process:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert list(cache.glob(".m.*.part")) and not (cache / "m").exists()
    folder = cached_folder("m", RECIPE, Maker())
    assert is_whole(folder, RECIPE)
    assert not list(cache.glob(".m.*.part"))
