"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

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


def test_other_systems_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkscope import devices as _heap

    monkeypatch.setattr("sys.platform", "win32")
    _heap._trimmer.cache_clear()
    assert _heap._trimmer() is None
    trim()
    _heap._trimmer.cache_clear()
