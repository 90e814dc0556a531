"""The base process of the Bigram-Backcopy task: a marginal and a transition matrix.

A source is two tables of numbers, so that runs, checkpoints and tests can include theirs. The
default one was counted on the help texts that come with Python, and is stored as counts beside this
file, since those texts change between Python versions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.errors import TextError
from sinkscope.prompts.documents import read_text
from sinkscope.validation import shown

ENGLISH = "bigrams-english.json"
PAPER_SYMBOLS = 65  # distinct characters of the corpus that Guo et al. used


@dataclass(frozen=True)
class BigramSource:
    """A first-order Markov chain over symbols (Guo et al. 2024, §2: the base process).

    Attributes:
        marginal: how often each symbol occurs [probability].
        transition: P(next | symbol), one row per symbol [probability].
        symbols: the text of each symbol, when the chain was counted on a text.
        name: a readable name that reports print.

    Raises:
        TextError: when the tables do not match or are not probabilities.
    """

    marginal: Float[Tensor, "symbol"]
    transition: Float[Tensor, "symbol next"]
    symbols: tuple[str, ...] | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "marginal", self.marginal.double().cpu())
        object.__setattr__(self, "transition", self.transition.double().cpu())
        count = self.marginal.numel()
        if self.marginal.ndim != 1 or tuple(self.transition.shape) != (count, count):
            raise TextError(
                f"a bigram source needs a marginal of V entries and a V x V transition matrix, "
                f"got {tuple(self.marginal.shape)} and {tuple(self.transition.shape)}"
            )
        if self.symbols is not None and len(self.symbols) != count:
            raise TextError(f"{len(self.symbols)} symbol texts were given for {count} symbols")
        for label, table in (("marginal", self.marginal), ("transition", self.transition)):
            sums = table.sum(-1)
            if (table < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
                raise TextError(
                    f"every row of the {label} must be non-negative and sum to 1, "
                    f"sums run from {sums.min():.6f} to {sums.max():.6f}: normalise it first"
                )

    def __len__(self) -> int:
        return self.marginal.numel()

    @classmethod
    def from_counts(
        cls,
        counts: Int[Tensor, "symbol next"] | Float[Tensor, "symbol next"],
        symbols: Sequence[str] | None = None,
        name: str = "custom",
    ) -> BigramSource:
        """Normalise a table of bigram counts; symbols without a successor get the marginal."""
        counts = counts.double()
        followed = counts.sum(1)
        if followed.sum() == 0:
            raise TextError("the table of bigram counts is empty: give a longer text")
        marginal = followed / followed.sum()
        rows = counts / followed.clamp(min=1)[:, None]
        rows = torch.where(followed[:, None] > 0, rows, marginal)
        return cls(marginal, rows, tuple(symbols) if symbols is not None else None, name)

    @classmethod
    def from_text(cls, text: str, symbols: int = PAPER_SYMBOLS, name: str = "text") -> BigramSource:
        """Count character bigrams; characters beyond the `symbols` most frequent are dropped."""
        kept, counts = count_bigrams(text, symbols)
        return cls.from_counts(counts, kept, name)

    @classmethod
    def from_file(cls, path: str | Path, symbols: int = PAPER_SYMBOLS) -> BigramSource:
        """Count character bigrams in a text file; the source is named after the file.

        The file is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Line breaks of any system
        count as one character, and the byte-order mark is ignored.

        Raises:
            TextError: If the file cannot be read, or has fewer than two distinct characters.
        """
        return cls.from_text(read_text(Path(path)), symbols, Path(path).name)

    @classmethod
    def english(cls) -> BigramSource:
        """Return the counts of English prose about Python that come with sinkscope."""
        stored = json.loads(files("sinkscope.bb").joinpath("data", ENGLISH).read_text("utf-8"))
        return cls.from_counts(torch.tensor(stored["counts"]), stored["symbols"], "english")

    @classmethod
    def synthetic(
        cls, symbols: int = PAPER_SYMBOLS, seed: int = 0, concentration: float = 0.1
    ) -> BigramSource:
        """Random rows from a Dirichlet: small `concentration` means peaked, predictable rows."""
        shape = torch.full((symbols, symbols), concentration, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rows = torch.distributions.Gamma(shape, torch.ones_like(shape)).sample() + 1e-12
        transition = rows / rows.sum(1, keepdim=True)
        marginal = torch.full((symbols,), 1.0 / symbols, dtype=torch.float64)
        for _ in range(1000):  # the chain's stationary distribution
            marginal = marginal @ transition
        return cls(marginal / marginal.sum(), transition, None, f"synthetic(seed={seed})")


def count_bigrams(text: str, symbols: int) -> tuple[str, Int[Tensor, "symbol next"]]:
    """Count bigrams of the most frequent characters.

    Returns:
        the kept characters, most frequent first, and the counts [symbol next].
    """
    frequency = Counter(text)
    kept = "".join(sorted(frequency, key=lambda c: (-frequency[c], c))[:symbols])
    if len(kept) < 2:
        raise TextError(
            f"The text is {shown(text)}; expected one of two distinct characters or more."
        )
    index = {character: i for i, character in enumerate(kept)}
    ids = [index[character] for character in text if character in index]
    counts = torch.zeros(len(kept), len(kept), dtype=torch.int64)
    for (before, after), times in Counter(pairwise(ids)).items():
        counts[before, after] = times
    return kept, counts


def python_prose() -> str:
    """Return the prose of the running Python's help topics, without markup and code examples.

    The packaged English counts were made from it; it differs slightly between Python versions.
    """
    from pydoc_data.topics import topics

    lines = (line for key in sorted(topics) for line in topics[key].split("\n"))
    # Examples and grammar are indented by three spaces or more; tables are drawn in ASCII.
    drawn = re.compile(r'\s*[|+]|[\s*=~\-+|^#"]*$')
    prose = (line for line in lines if not re.match(r"\s{3,}\S", line) and not drawn.match(line))
    return "\n".join(re.sub(r"\s+", " ", line.strip()) for line in prose)
