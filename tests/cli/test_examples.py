"""Every command's help ends with examples, and each example is a line that the command takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from sinkscope import cli
from sinkscope.cli.examples import EXAMPLES


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, inside in getattr(command, "commands", {}).items():
        yield from _commands(inside, f"{name} {child}".strip())


TREE = dict(_commands(typer.main.get_command(cli.app)))


def test_models_come_first_and_then_a_scan() -> None:
    root = typer.main.get_command(cli.app)
    names = root.list_commands(None)  # type: ignore[attr-defined]
    assert names[:2] == ["models", "scan"]
    assert sorted(names) == sorted(name for name in TREE if name and " " not in name)


@pytest.mark.parametrize("name", [name for name in TREE if name != "bb"])
def test_every_command_has_examples(name: str) -> None:
    assert EXAMPLES[name]
    for line in EXAMPLES[name]:
        assert f"- `{line}`" in TREE[name].epilog


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_can_be_typed(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "sinkscope"
    name = next(
        " ".join(words[:size])
        for size in range(len(words), -1, -1)
        if " ".join(words[:size]) in TREE
    )
    rest = words[len(name.split()) :]
    assert name or not rest
    TREE[name].make_context(name, rest, resilient_parsing=False)  # a wrong option raises
