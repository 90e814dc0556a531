"""Files written whole: what killed processes leave is removed, what running ones write is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sinkscope.errors import ReportError
from sinkscope.output import as_csv, locked, write_file

SLOW = """
import os, signal, sys, time
from sinkscope import output
from sinkscope.cli._common import terminal
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
output.os.fsync = wait
with terminal():
    output.write_file(sys.argv[1], "new")
"""


def start(file: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_only_the_dead_leave_orphans(tmp_path: Path) -> None:
    file, other = tmp_path / "report.nc", tmp_path / "report.nc.more"
    file.write_text("old")
    running, killed = start(file), start(file)
    beside = start(other)
    end(killed)
    end(beside)
    assert len(unfinished(tmp_path)) == 3 and file.read_text() == "old"
    write_file(file, "mine")
    left = sorted(path.name for path in unfinished(tmp_path))
    assert len(left) == 2
    assert f"-{running.pid}-" in left[0] + left[1] and f"-{beside.pid}-" in left[0] + left[1]
    end(running)
    write_file(file, "again")
    write_file(other, "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.nc", "report.nc.more"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.nc"
    file.write_text("old")
    process = start(file)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["report.nc"]
    assert file.read_text() == "old"


def test_unfinished_files_of_another_machine_are_given_a_day(tmp_path: Path) -> None:
    names = [f".a.csv.0123abcd-{process}-00000000.tmp" for process in (1, 2)]
    for name in names:
        (tmp_path / name).write_text("half")
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / names[0], (yesterday, yesterday))
    (tmp_path / ".a.csv.notes.tmp").write_text("somebody's")
    write_file(tmp_path / "a.csv", "1")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.csv", names[1], ".a.csv.notes.tmp"}


def test_a_table_holds_no_formulas() -> None:
    frame = pd.DataFrame(
        {
            "source": ["=cmd|' /C calc'!A0", "+1", "-x.txt", "@sum", "\tx", "prose", None],
            "value": [-1.5, 2, 3, 4, 5, 6, float("nan")],
            "=kind": pd.Categorical(["-a", "b", "b", "b", "b", "b", "b"]),
        }
    )
    lines = as_csv(frame).splitlines()
    assert lines[0] == "source,value,'=kind"
    assert lines[1] == "'=cmd|' /C calc'!A0,-1.5,'-a"
    assert [line[0] for line in lines[2:5]] == ["'"] * 3
    assert lines[6] == "prose,6.0,b" and lines[7] == ",,b"
    assert list(frame.columns) == ["source", "value", "=kind"]


def test_a_lock_that_is_a_link_is_refused_for_files_and_folders(tmp_path: Path) -> None:
    """A link planted at the name of a lock must not lead anywhere."""
    (tmp_path / "target").write_text("mine")
    (tmp_path / "out").mkdir()
    for lock, path in (("out/.lock", "out"), (".r.nc.lock", "r.nc")):
        (tmp_path / lock).symlink_to(tmp_path / "target")
        with pytest.raises(ReportError, match="is a link and not a lock"), locked(tmp_path / path):
            pass
    assert (tmp_path / "target").read_text() == "mine"
