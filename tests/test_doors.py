"""Every public door refuses what it cannot take in one sentence of sinkscope's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, list | None]]:
    """What each door said to each wrong value, in a process that checks no annotations."""
    command = [sys.executable, "-m", "tests.doors_script"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_wrong_is_taken(said) -> None:
    taken = [
        f"{door}: {name}" for door, values in said.items() for name in values if not values[name]
    ]
    assert not taken
    assert sum(map(len, said.values())) > 1500


def test_every_refusal_is_ours(said) -> None:
    raw = [
        f"{door}: {name}: {answer[0]}: {answer[2][:80]}"
        for door, values in said.items()
        for name, answer in values.items()
        if answer and "SinkscopeError" not in answer[1]
    ]
    assert not raw


def test_every_refusal_is_one_sentence(said) -> None:
    odd = [
        (door, name, answer[2])
        for door, values in said.items()
        for name, answer in values.items()
        if answer and (not answer[2].endswith(".") or "\n" in answer[2] or len(answer[2]) > 500)
    ]
    assert not odd
