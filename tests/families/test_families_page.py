"""docs/families.md says what running the tiny models says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkscope.errors import SinkscopeError
from sinkscope.families import HEADER, architectures, cells, row, run

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CHEAP = ["LlamaForCausalLM", "BloomForCausalLM", "GPTNeoForCausalLM", "MambaForCausalLM"]


def written() -> dict[str, tuple[str, ...]]:
    """Cells by architecture, as they stand on the page."""
    lines = PAGE.read_text().removeprefix(HEADER).splitlines()
    found = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines]
    return {one[0]: one for one in found}


def test_every_architecture_has_a_row() -> None:
    assert PAGE.read_text().startswith(HEADER)
    assert list(written()) == architectures()


def test_what_is_measured_is_exact() -> None:
    for name, _, ways, difference, *_ in written().values():
        if ways != "–":
            assert difference == "–" or float(difference) <= 1e-5, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CHEAP else pytest.mark.slow)
        for name in architectures()
    ],
)
def test_a_new_run_says_the_same(name: str) -> None:
    """All but the digits of the differences, which vary with the machine."""
    found, page = cells(row(name)), written()[name]
    assert [*found[:3], found[6]] == [*page[:3], page[6] if len(page) > 6 else ""]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(SinkscopeError, match="There is no architecture 'Nosuch'; name classes"):
        next(run(["GPT2LMHeadModel", "Nosuch"]))
