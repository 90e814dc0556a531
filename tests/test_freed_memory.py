"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from sinkscope import devices
from sinkscope.devices import trim


def resident() -> int:
    """Memory that this process really has [MB]."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")
def test_holes_between_what_is_kept_are_handed_back() -> None:
    pieces = [bytearray(b"\x01" * 100_000) for _ in range(2_000)]
    kept = pieces[::2]
    del pieces
    before = resident()
    trim()
    assert before - resident() > 50, "half of 200 MB was free"
    assert len(kept) == 1_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")
def test_large_tensors_go_back_as_they_are_freed() -> None:
    torch.ones(7_000_000)  # its size is that from which glibc maps blocks one by one, once freed
    with devices.large_tensors_apart(), devices.large_tensors_apart():
        pieces = [torch.ones(2_000_000) for _ in range(20)]
        kept = pieces[::2]
        before = resident()
        del pieces
        assert before - resident() > 60, "half of 160 MB was free"
    assert len(kept) == 10


def test_sizes_that_the_user_set_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    devices._settings_of_malloc.cache_clear()
    assert devices._settings_of_malloc() is None
    with devices.large_tensors_apart():
        pass
    monkeypatch.undo()
    devices._settings_of_malloc.cache_clear()


def test_other_systems_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    devices._trimmer.cache_clear()
    devices._settings_of_malloc.cache_clear()
    assert devices._trimmer() is None
    trim()
    with devices.large_tensors_apart():
        pass
    devices._trimmer.cache_clear()
    devices._settings_of_malloc.cache_clear()
