"""What every experiment hands back: labelled tensors, a tidy frame, words and figures."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope._bootstrap import bootstrap
from sinkscope._labelled import Labelled
from sinkscope._width import line_width
from sinkscope.errors import ReportError
from sinkscope.models import model_source
from sinkscope.texts import Texts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(Labelled):
    """Base of the experiments' results.

    Attributes:
        about: Model, T, BOS and texts in one line, for figures.
        QUESTION: What the experiment asks; the heading of its page.
    """

    QUESTION = ""

    about: str

    def summary(self) -> str:
        """What was found, in words, with its figures."""
        raise NotImplementedError

    def frame(self) -> pd.DataFrame:
        """A tidy frame, one row an observation, as the figures take it."""
        raise NotImplementedError

    def figures(self) -> dict[str, go.Figure]:
        """The figures by name."""
        raise NotImplementedError

    def findings(self) -> dict[str, Any]:
        """The figures that the summary states, as plain values ready for JSON."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Findings and provenance, ready for JSON."""
        return {"about": self.about, "summary": self.summary(), **plain(self.findings())}

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write what was found: as JSON, as a table, and as one page with all figures.

        Args:
            folder: An existing folder.
            name: Of the files, before ``.json``, ``.csv`` and ``.html``.

        Returns:
            The files written.

        Raises:
            ReportError: If they cannot be.
        """
        contents = {
            "json": json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n",
            "csv": self.frame().to_csv(index=False),
            "html": self.to_html(),
        }
        return [
            _write(Path(folder) / f"{name}.{suffix}", text) for suffix, text in contents.items()
        ]

    def to_html(self) -> str:
        """One page with the question, the summary and every figure, which needs no network."""
        from sinkscope.experiments._page import to_html

        return to_html(self)

    def __repr__(self) -> str:
        lines = f"{self.about}\n{self.summary()}".splitlines()
        width = line_width()
        return "\n".join(line if len(line) <= width else _wrapped(line, width) for line in lines)


def _wrapped(line: str, width: int) -> str:
    """A sentence on lines that a terminal shows whole; those of a list are set in."""
    indent = " " * (len(line) - len(line.lstrip()))
    later = f"{indent}  " if indent else ""
    whole = line.strip().replace(" %", "\N{NO-BREAK SPACE}%")
    text = textwrap.fill(whole, width, initial_indent=indent, subsequent_indent=later)
    return text.replace("\N{NO-BREAK SPACE}%", " %")


def _write(path: Path, text: str) -> Path:
    """Write a whole file or none."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error.strerror}).") from error
    return path


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end; nan with fewer than two prompts.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return number(self.mean)
        return f"{number(self.mean)} [{number(self.low)}, {number(self.high)}]"

    def negated(self) -> Estimate:
        """The same difference, taken the other way round."""
        return Estimate(-self.mean, -self.high, -self.low)

    def to_decimals(self, digits: int) -> str:
        """With as many digits after the point in every figure, for columns of a table."""
        return self._written(f".{digits}f")

    def signed(self, digits: int = 3) -> str:
        """A difference: each figure with its sign."""
        return self._written(f"+.{digits}f")

    def _written(self, how: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, how)
        return f"{self.mean:{how}} [{self.low:{how}}, {self.high:{how}}]"


def estimate(x: Float[Tensor, "prompt"]) -> Estimate:
    """Mean and interval of one figure a prompt."""
    return Estimate(*(float(end) for end in bootstrap(x.float())))


def number(value: float) -> str:
    """Three digits, thin spaces between thousands."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def about(model: Any, texts: Texts, bos: str | None = None) -> str:
    """The line under a figure's title; `bos` says what stands in the place of the texts' own."""
    parts = (
        model_source(model).name,
        f"T = {texts.tokens.shape[1]:,}",
        f"BOS: {texts.bos if bos is None else bos}",
        f"{len(texts)} × {texts.source}",
    )
    return " · ".join(parts)


def plain(value: Any) -> Any:
    """Estimates, tensors and the like as what JSON knows; nan becomes None."""
    if isinstance(value, Estimate):
        value = {"mean": value.mean, "low": value.low, "high": value.high}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def counted(n: int, noun: str) -> str:
    """So many of something: 1 head, 2 heads."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def listed(items: list[str]) -> str:
    """Items as words: a; a and b; a, b and c."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def grid(**axes: Any) -> dict[str, Any]:
    """Columns of a tidy frame for every combination of the axes' values, in C order."""
    import numpy as np

    sizes = [range(len(values)) for values in axes.values()]
    index = np.stack(np.meshgrid(*sizes, indexing="ij")).reshape(len(axes), -1)
    return {
        name: np.asarray(list(values))[row]
        for (name, values), row in zip(axes.items(), index, strict=True)
    }


def flat(x: Tensor) -> Any:
    """A tensor as one column, in C order."""
    return torch.as_tensor(x).detach().cpu().double().flatten().numpy()
