"""What every experiment hands back: labelled tensors, a tidy frame, words and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.models.provenance import model_source
from sinkscope.output import as_json, plain, wrapped, write_file
from sinkscope.prompts.tokens import Texts
from sinkscope.report.labelled import Labelled

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
            "json": as_json(self.to_dict(), indent=1) + "\n",
            "csv": self.frame().to_csv(index=False),
            "html": self.to_html(),
        }
        return [
            write_file(Path(folder) / f"{name}.{suffix}", text) for suffix, text in contents.items()
        ]

    def to_html(self) -> str:
        """One page with the question, the summary and every figure, which needs no network."""
        from sinkscope.html.experiment_page import to_html

        return to_html(self)

    def __repr__(self) -> str:
        lines = f"{self.about}\n{self.summary()}".splitlines()
        return "\n".join(map(wrapped, lines))


def about(model: Any, texts: Texts, bos: str | None = None) -> str:
    """The line under a figure's title; `bos` says what stands in the place of the texts' own."""
    parts = (
        model_source(model).name,
        f"T = {texts.tokens.shape[1]:,}",
        f"BOS: {texts.bos if bos is None else bos}",
        f"{len(texts)} × {texts.source}",
    )
    return " · ".join(parts)


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
