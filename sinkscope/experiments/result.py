"""The base of the experiments' results: labelled tensors, a tidy table, words, figures, files.

Every experiment returns a subclass of `Result`, which implements four methods: `summary`,
`statistics`, `to_frame` and `figures`. The rest follows from them: `to_dict`, `to_html`, `save`,
and how a result shows on a terminal and in a notebook. `tidy` makes the tables.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.models.provenance import model_source
from sinkscope.output import as_csv, as_json, plain, wrapped, write_file
from sinkscope.prompts.tokens import Texts
from sinkscope.renamed import warn
from sinkscope.report.labelled import Labelled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(Labelled):
    """Base of the experiments' results.

    Attributes:
        about: Model, T, BOS and texts in one line, for figures.
        QUESTION: The question of the experiment, the heading of its page.
    """

    QUESTION = ""

    about: str

    def summary(self) -> str:
        """The result in words and a table, with its statistics."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """The values in the summary, by name, as plain numbers and `Interval`."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A tidy frame, one row per observation, as the figures take it.

        The tensors themselves are available by name, such as ``result["loss"]``, and all of them
        with `to_xarray`.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, go.Figure]:
        """The figures by name."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the setting, the summary and the statistics, ready for JSON."""
        return {"about": self.about, "summary": self.summary(), **plain(self.statistics())}

    def save(self, path: str | Path, name: str | None = None) -> list[Path]:
        """Write the result as JSON, as a table, and as one page with all figures.

        Args:
            path: Of the files, without suffix: ``.json``, ``.csv`` and ``.html`` are added. The
                folder has to exist.
            name: Deprecated: name of the files, with `path` as their folder.

        Returns:
            The files written.

        Raises:
            ReportError: If the path has a suffix of its own, or they cannot be written.
        """
        if name is not None:
            warn("Result.save(folder, name)", "save(path)")
            path = Path(path) / name
        if Path(path).suffix in {".json", ".csv", ".html", ".nc"}:
            raise ReportError(
                "save writes three files and adds the suffixes .json, .csv and .html itself; pass "
                f"{str(Path(path).with_suffix(''))!r} in place of {str(path)!r}."
            )
        contents = {
            "json": as_json(self.to_dict(), indent=1) + "\n",
            "csv": as_csv(self.to_frame()),
            "html": self.to_html(),
        }
        return [write_file(f"{path}.{suffix}", text) for suffix, text in contents.items()]

    def to_html(self) -> str:
        """One page with the question, the summary and every figure, which needs no network."""
        from sinkscope.html.experiment_page import to_html

        return to_html(self)

    def frame(self) -> pd.DataFrame:
        """Deprecated: the old name of `to_frame`."""
        warn("Result.frame()", "to_frame()")
        return self.to_frame()

    def findings(self) -> dict[str, Any]:
        """Deprecated: the old name of `statistics`."""
        warn("Result.findings()", "statistics()")
        return self.statistics()

    def __repr__(self) -> str:
        lines = f"{self.about}\n{self.summary()}".splitlines()
        return "\n".join(map(wrapped, lines))

    def _repr_html_(self) -> str:
        """Return the question and the summary for a notebook, with aligned tables."""
        words = html.escape(repr(self))
        return (
            f"<strong>{html.escape(self.QUESTION)}</strong>"
            f'<pre style="background:transparent;color:inherit;overflow-x:auto">{words}</pre>'
        )


def about(model: Any, texts: Texts, bos: str | None = None) -> str:
    """The line under a figure's title.

    Args:
        model: A bridge.
        texts: The prompts.
        bos: The BOS policy to state; that of the texts by default.
    """
    parts = (
        model_source(model).name,
        f"T = {texts.tokens.shape[1]:,}",
        f"BOS: {texts.bos if bos is None else bos}",
        f"{len(texts)} × {texts.source}",
    )
    return " · ".join(parts)


def tidy(axes: Mapping[str, Sequence[Any] | range], **columns: Any) -> pd.DataFrame:
    """A tidy frame with one row for every combination of the axes' values.

    Args:
        axes: Values along each axis, in the order of the tensors' dimensions.
        columns: Tensors that broadcast to these axes, or one value for all rows.
    """
    import pandas as pd

    frame = pd.MultiIndex.from_product(axes.values(), names=list(axes)).to_frame(index=False)
    shape = [len(values) for values in axes.values()]
    values = {
        name: x.detach().cpu().double().expand(shape).flatten().numpy() if torch.is_tensor(x) else x
        for name, x in columns.items()
    }
    return frame.assign(**values)


def stacked(pieces: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tidy frames below each other."""
    import pandas as pd

    return pd.concat(pieces, ignore_index=True)


def column(x: Tensor) -> Any:
    """A tensor as one column, in C order."""
    return x.detach().cpu().double().flatten().numpy()
