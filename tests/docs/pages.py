"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "sinkscope" / "bb" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
REAL = "<!-- needs a trained model -->"
"""Pages that begin with this show what a model with random weights does not."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of its first line."""

    language: str
    text: str
    line: int


def name(page: Path) -> str:
    """What test reports call a page."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1)
        for found in _FENCE.finditer(text)
    ]


def commands(page: Path) -> list[str]:
    """The `sinkscope` commands in a page's shell blocks, each on one line."""
    lines = []
    for block in blocks(page):
        if block.language == "sh":
            lines += block.text.replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line.startswith("sinkscope ")]
