"""`open_sweep`: all cells of a folder as one labelled collection, also of partial sweeps.

A cell is a row of the grid: model, checkpoint, texts, length, intervention, experiment. Its results
are read lazily from its own file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.errors import ReportError
from sinkscope.experiments.dynamics import Dynamics
from sinkscope.output import counted, listed, table_as_text, write_file
from sinkscope.report.comparison import compare
from sinkscope.report.key_numbers import key_numbers
from sinkscope.report.labelled import to_numpy
from sinkscope.report.netcdf import load
from sinkscope.report.report import SinkReport
from sinkscope.statistics import bootstrap, mean_over_prompts
from sinkscope.sweeps.folder import FAILED, PLAN, REQUEST, Folder
from sinkscope.sweeps.grid import COLUMNS, SCAN
from sinkscope.validation import fits, shown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

    from sinkscope.sweeps.cell import Run

MEASURED, MISSING, FAILED_STATE = "measured", "missing", "failed"
_HELD = 64  # most reports kept in memory


def open_sweep(folder: str | Path) -> Cells:
    """Open all cells of the sweeps and monitors in a folder, including missing ones.

    Args:
        folder: A folder, or a URL that fsspec supports, as given to `sweep`.

    Returns:
        The cells, with methods to select, compare, tabulate and plot.

    Raises:
        ReportError: If there is no such folder, or it has no cells.

    Example:
        >>> cells = open_sweep("runs")                                        # doctest: +SKIP
        >>> cells.select(texts="prose").means("sink_attention")               # doctest: +SKIP
    """
    url = isinstance(folder, str) and "://" in folder
    if not url and not (isinstance(folder, str | Path) and Path(folder).expanduser().is_dir()):
        raise ReportError(f"There is no folder {shown(folder)}; name one that a sweep wrote to.")
    place = Folder(folder)
    files = place.names()
    rows: list[dict[str, Any]] = []
    for file in sorted(name for name in files if name.startswith(PLAN)):
        rows += _rows(place, file, place.under(file, "cells", list[dict[str, Any]]))
    planned = {row["cell"] for row in rows}
    for file in sorted(name for name in files if name.endswith(REQUEST)):
        name = file.removesuffix(REQUEST)
        if name not in planned and f"{name}.nc" in files:
            columns = place.under(file, "also", dict[str, Any]).get("columns")
            if columns is not None:
                rows += _rows(place, file, [{**columns, "cell": name}])
    if not rows:
        raise ReportError(f"{folder} holds no cells of a sweep; name a folder that one wrote to.")
    return Cells.of(place, rows)


@dataclass(frozen=True, eq=False, repr=False)
class Cells:
    """Cells of a sweep, in the order of the grid.

    Attributes:
        folder: Their folder.
        rows: The grid's columns of each, with its name ("cell"), "state" ("measured", "missing" or
            "failed") and the "reason" why it failed.
        run: From `sweep`: measured and kept cells, and model loads.
    """

    folder: Folder
    rows: tuple[dict[str, Any], ...]
    run: Run | None = None
    _reports: dict[str, SinkReport] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Folder, rows: list[dict[str, Any]]) -> Cells:
        """Return the cells of a grid with their states."""
        files = folder.names()
        distinct = {tuple(row[name] for name in (*COLUMNS, "cell")): row for row in rows}
        ordered = sorted(distinct.values(), key=_order)
        return cls(folder, tuple(row | _state(folder, row, files) for row in ordered))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        counts = {
            state: sum(row["state"] == state for row in self.rows)
            for state in (MEASURED, MISSING, FAILED_STATE)
        }
        said = listed([f"{count} {state}" for state, count in counts.items() if count])
        lines = [f"{counted(len(self), 'cell')} in {self.folder.place}: {said}."]
        values = [[_cell(value) for value in self.values(name)] for name in COLUMNS]
        shown_values = [
            [name, str(len(each)), ", ".join(each[:5]) + (", …" if len(each) > 5 else "")]
            for name, each in zip(COLUMNS, values, strict=True)
        ]
        lines.append(table_as_text(("column", "values", "which"), shown_values))
        reasons = {row["reason"] for row in self.rows if row["reason"]}
        lines += [f"failed: {reason}" for reason in sorted(reasons)]
        return "\n".join(lines)

    # -- choosing cells --------------------------------------------------------------------------

    def select(self, **columns: Any) -> Cells:
        """Return the cells with these values in the grid's columns.

        Args:
            columns: A value, or a list of values, for each column; also ``state``.

        Raises:
            ReportError: If there is no such column, or no cell with these values.
        """
        rows = self.rows
        for name, wanted in columns.items():
            if name not in (*COLUMNS, "state"):
                raise ReportError(
                    f"There is no column {name!r}; the grid has {', '.join(COLUMNS)}, and state."
                )
            several = wanted if isinstance(wanted, list | tuple | set | range) else [wanted]
            kept = tuple(row for row in rows if row[name] in several)
            if not kept:
                known = ", ".join(sorted({_cell(row[name]) for row in rows}))
                raise ReportError(f"No cell has the {name} {shown(wanted)}; there are {known}.")
            rows = kept
        return replace(self, rows=rows)

    def values(self, column: str) -> list[Any]:
        """Return the distinct values of one of the grid's columns, in order."""
        return list(dict.fromkeys(row[column] for row in self.rows))

    @property
    def missing(self) -> Cells:
        """The cells that were not measured, including failed ones."""
        return replace(self, rows=tuple(row for row in self.rows if row["state"] != MEASURED))

    @property
    def frame(self) -> pd.DataFrame:
        """One row per cell: the grid's columns, cell, state and reason."""
        import pandas as pd

        columns = [*COLUMNS, "cell", "state", "reason"]
        return _whole_steps(pd.DataFrame(list(self.rows), columns=columns))

    # -- what was measured -----------------------------------------------------------------------

    def reports(self) -> Iterator[tuple[dict[str, Any], SinkReport]]:
        """Yield the grid's columns and the report of each measured scan."""
        for row in self._scans:
            yield {name: row[name] for name in COLUMNS}, self._report(row)

    def report(self, **columns: Any) -> SinkReport:
        """Return the report of one cell.

        Args:
            columns: As in `select`; enough to identify one cell.

        Raises:
            ReportError: If not exactly one measured scan has these values.
        """
        scans = self.select(**columns)._scans
        names = {row["cell"] for row in scans}
        if len(names) != 1:
            raise ReportError(
                f"{counted(len(names), 'measured scan')} of this sweep has these values; give "
                f"enough of {', '.join(COLUMNS)} to identify one."
            )
        return self._report(scans[0])

    def to_frame(self, *names: str) -> pd.DataFrame:
        """A tidy frame of any field: the grid's columns, then those of `SinkReport.to_frame`.

        Args:
            names: Fields of equal dimensions. Cells in which one was not measured are left out.

        Raises:
            ReportError: If no cell has them.
        """
        import pandas as pd

        pieces = []
        for columns, report in self.reports():
            if all(name in report.measured() or name in report.parts() for name in names):
                piece = report.to_frame(*names)
                for at, (name, value) in enumerate(columns.items()):
                    piece.insert(at, name, value)
                pieces.append(piece)
        if not pieces:
            self._refuse_unmeasured(*names)
        return _whole_steps(pd.concat(pieces, ignore_index=True))

    def means(
        self, name: str, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """One row per cell: a field's mean with its bootstrap interval over prompts.

        Args:
            name: A field; layers, heads and positions are averaged first, prompt by prompt.
            level: Probability between the ends.
            resamples: Number of bootstrap resamples.
            seed: Seed of the resamples.

        Returns:
            The grid's columns, then metric, mean, low and high; the ends are nan for one prompt,
            and for a field that is kept as a mean over prompts.

        Raises:
            ReportError: If no cell has the field.
        """
        import pandas as pd

        rows = []
        for columns, report in self.reports():
            if name not in report.measured():
                continue
            by_prompt = _by_prompt(report, name)
            if by_prompt is None:
                ends = [float(report[name].double().nanmean()), math.nan, math.nan]
            else:
                ends = [float(end) for end in bootstrap(by_prompt, level, resamples, seed)]
            rows.append({**columns, "metric": name, **dict(zip(_ENDS, ends, strict=True))})
        if not rows:
            self._refuse_unmeasured(name)
        return _whole_steps(pd.DataFrame(rows))

    def numbers(self) -> pd.DataFrame:
        """One row per measured scan: the grid's columns, its cell, and `report.key_numbers`."""
        import pandas as pd

        rows = [
            {name: row[name] for name in (*COLUMNS, "cell")} | key_numbers(self._report(row))
            for row in self._scans
        ]
        if not rows:
            raise ReportError("No scan of this sweep was measured yet.")
        return _whole_steps(pd.DataFrame(rows))

    def compare(self, column: str, baseline: Any, name: str = "sink_attention") -> pd.DataFrame:
        """Compare one value of a column with the others, all else being equal.

        Args:
            column: Column of the grid, such as "intervention".
            baseline: The value to compare with, such as "none".
            name: A field with prompts; layers and heads are averaged first, prompt by prompt.

        Returns:
            One row for each cell that has a counterpart: the grid's columns, before, after,
            difference, low and high. Prompts are paired, so the interval is that of the
            differences; if the tokens of the two differ it is nan.

        Raises:
            ReportError: If no pair of cells has the field.
        """
        import pandas as pd

        if column not in COLUMNS:
            raise ReportError(f"There is no column {column!r}; the grid has {', '.join(COLUMNS)}.")
        others = [one for one in COLUMNS if one != column]
        before = {
            tuple(columns[one] for one in others): report
            for columns, report in self.select(**{column: baseline}).reports()
        }
        rows = []
        for columns, report in self.reports():
            first = before.get(tuple(columns[one] for one in others))
            if columns[column] == baseline or first is None:
                continue
            if name not in report.measured() or name not in first.measured():
                continue
            rows.append({**columns, "metric": name, **_difference(first, report, name)})
        if not rows:
            raise ReportError(
                f"No two measured cells differ in {column} alone, one of them having the value "
                f"{shown(baseline)} and both the field {name}."
            )
        return _whole_steps(pd.DataFrame(rows))

    def to_xarray(self, *names: str) -> xr.Dataset:
        """Return fields of all measured scans as variables with a leading `cell` dimension.

        Values are read lazily, and only from the files of the selected cells.
        If a cell has fewer prompts, layers, heads or positions than another, or lacks the field,
        floating-point values are nan and others -1.

        Args:
            names: Fields; by default all that any cell has.

        Returns:
            A Dataset whose `cell` has the grid's columns as coordinates.

        Raises:
            ReportError: If no cell has such a field.
        """
        import xarray as xr

        from sinkscope.sweeps.lazily import variable

        rows = self._scans
        known = [self._fields(row) for row in rows]
        every = dict.fromkeys(name for fields in known for name in fields)
        wanted = names or tuple(every)
        if missing := [name for name in wanted if name not in every]:
            self._refuse_unmeasured(*missing)
        readers = [lambda name, row=row: to_numpy(self._report(row)[name]) for row in rows]
        made = {
            name: variable(name, [fields.get(name) for fields in known], readers) for name in wanted
        }
        coordinates = {
            name: ("cell", np.array([row[name] for row in rows], dtype=object)) for name in COLUMNS
        }
        names_of_cells = ("cell", np.array([row["cell"] for row in rows], dtype=str))
        return xr.Dataset(made, {"cell": names_of_cells, **coordinates})

    def experiments(self) -> pd.DataFrame:
        """One row per measured experiment: the grid's columns, then its numbers by name.

        Nested numbers are named with dots, such as "loss.mean".
        """
        import pandas as pd

        rows = []
        for row in self.rows:
            if row["state"] == MEASURED and row["experiment"] != SCAN:
                content = _flat(self.folder.json(f"{row['cell']}.json"))
                rows.append({name: row[name] for name in (*COLUMNS, "cell")} | content)
        if not rows:
            raise ReportError("This sweep has scans only; see .numbers() and .means(field).")
        return _whole_steps(pd.DataFrame(rows))

    def dynamics(self, sink_threshold: float = 0.5) -> Dynamics:
        """Return the checkpoints of one model as a result of the experiment `dynamics`.

        Args:
            sink_threshold: Mean sink attention above which a head counts as dormant.

        Raises:
            ReportError: If the cells are of several models, texts, lengths or interventions, or
                have no checkpoint.
        """
        rows = self._scans
        for name in ("model", "texts", "length", "intervention"):
            if len(values := {row[name] for row in rows}) > 1:
                raise ReportError(
                    f"Curves over training are of one {name}, and these cells have "
                    f"{len(values)}; choose with select({name}=…)."
                )
        reports = {row["checkpoint"]: self._report(row) for row in rows}
        if not reports or None in reports:
            raise ReportError(
                "Curves over training need cells with a checkpoint: models named by step, or what "
                "a Monitor logged."
            )
        first = next(iter(reports.values()))
        about = f"{rows[0]['model']} · T = {first.settings.length:,} · {rows[0]['texts']}"
        ordered = dict(sorted(reports.items()))
        return Dynamics(about=about, reports=ordered, loss={}, sink_threshold=sink_threshold)

    # -- figures ---------------------------------------------------------------------------------

    def curves(self, name: str, along: str = "checkpoint", theme: Any = None) -> go.Figure:
        """A field's mean with its interval against a column of the grid; see `plot.sweep_curves`.

        Args:
            name: A field.
            along: The column on the x axis: checkpoint, length, model, texts or intervention.
            theme: "light", "dark", or the default.
        """
        from sinkscope.plot import sweep_curves

        return sweep_curves(self.means(name), along, about=self.about, theme=theme)

    def head_maps(self, name: str = "sink_attention", theme: Any = None) -> go.Figure:
        """Small head maps of all measured scans; see `plot.head_maps`.

        Args:
            name: A field with one value per head.
            theme: "light", "dark", or the default.
        """
        from sinkscope.plot import head_maps

        varying = [column for column in COLUMNS if len(self.values(column)) > 1]
        drawn = {
            ", ".join(_cell(columns[column]) for column in varying) or columns["model"]: report
            for columns, report in self.reports()
        }
        return head_maps(drawn, name, about=self.about, theme=theme)

    def to_html(self, pages: dict[str, str] | None = None) -> str:
        """Return the atlas: one page with a row per cell, which needs no network.

        Args:
            pages: Relative paths of the full pages by the cells' names.
        """
        from sinkscope.html.atlas_page import to_html

        rows = [
            (
                {name: row[name] for name in COLUMNS},
                self._report(row),
                (pages or {}).get(row["cell"]),
            )
            for row in self._scans
        ]
        if not rows:
            raise ReportError("No scan of this sweep was measured yet.")
        left = len(self) - len(rows)
        return to_html(rows, self.about + (f" · {counted(left, 'cell')} not shown" if left else ""))

    def save_atlas(
        self, path: str | Path, *, reports: bool = True, progress: bool = True
    ) -> list[Path]:
        """Write the atlas, and the page of every report to a folder beside it.

        Args:
            path: Path of the page, such as "atlas.html"; the reports go to "atlas-reports".
            reports: Whether to write their pages, 5 MB each; existing ones are kept.
            progress: Whether to draw a bar.

        Returns:
            The files written, the atlas first.

        Raises:
            ReportError: If they cannot be written.
        """
        path = Path(path)
        pages: dict[str, str] = {}
        written = []
        if reports:
            beside = path.with_name(f"{path.stem}-reports")
            beside.mkdir(parents=True, exist_ok=True)
            for row in tqdm(self._scans, unit="page", disable=not progress, leave=False):
                file = beside / f"{row['cell']}.html"
                if not file.exists():
                    write_file(file, self._report(row).to_html())
                pages[row["cell"]] = f"{beside.name}/{file.name}"
                written.append(file)
        return [write_file(path, self.to_html(pages)), *written]

    @property
    def about(self) -> str:
        """The models, texts and lengths of the sweep in one line."""
        models, texts = self.values("model"), self.values("texts")
        lengths = [str(length) for length in self.values("length")]
        named = models[0] if len(models) == 1 else counted(len(models), "model")
        return f"{named} · T = {', '.join(lengths)} · {', '.join(map(str, texts))}"

    # -- reading ---------------------------------------------------------------------------------

    @cached_property
    def _scans(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["state"] == MEASURED and row["experiment"] == SCAN]

    def _report(self, row: dict[str, Any]) -> SinkReport:
        name = row["cell"]
        if name not in self._reports:
            while len(self._reports) >= _HELD:
                self._reports.pop(next(iter(self._reports)))
            self._reports[name] = load(SinkReport, self.folder.fetched(f"{name}.nc"))
        return self._reports[name]

    def _fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return dimensions, shape and kind of each field, without reading the report."""
        also = self.folder.under(row["cell"] + REQUEST, "also", dict[str, dict[str, Any]])
        return also.get("fields", {})

    def _refuse_unmeasured(self, *names: str) -> None:
        raise ReportError(
            f"{listed(names)} was measured in no cell; see .report(…).measured() for names, and "
            f"add the metric that measures it to the sweep."
        )


_ENDS = ("mean", "low", "high")


def _whole_steps(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert checkpoints to whole numbers, also if some cells have none."""
    return frame.astype({"checkpoint": "Int64", "length": "Int64"})


_KINDS: dict[str, Any] = {
    "model": str,
    "checkpoint": int | None,
    "texts": str,
    "length": int | None,
    "intervention": str,
    "experiment": str,
    "cell": str,
}
"""What the columns of a row hold."""


def _rows(folder: Folder, file: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the grid, if that is what they are; a cell's name leads to no other folder.

    Raises:
        ReportError: If they are not.
    """
    for row in rows:
        whole = all(name in row and fits(row[name], kind) for name, kind in _KINDS.items())
        if not whole or re.fullmatch(r"\w[\w.-]*", row["cell"]) is None:
            raise ReportError(
                f"{folder.place}/{file} is damaged: {shown(row)} is no cell of a sweep; delete it."
            )
    return rows


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key: checkpoints and lengths by size, the rest in the given order."""
    return (
        row["experiment"] != SCAN,
        str(row["model"]),
        -1 if row["checkpoint"] is None else row["checkpoint"],
        str(row["texts"]),
        row["length"] or 0,
        row["intervention"] != "none",
        row["intervention"],
        row["experiment"],
    )


def _state(folder: Folder, row: dict[str, Any], files: set[str]) -> dict[str, Any]:
    name = row["cell"]
    if folder.has(name, row["experiment"], files):
        return {"state": MEASURED, "reason": ""}
    if name + FAILED in files:
        return {"state": FAILED_STATE, "reason": folder.under(name + FAILED, "reason", str)}
    return {"state": MISSING, "reason": ""}


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def _by_prompt(report: SinkReport, name: str) -> Float[Tensor, "prompt"] | None:
    """Return a field's mean over everything but the prompts; None if it has no prompts."""
    if "prompt" not in report.variables()[name].dims:
        return None
    values = report[name].double().flatten(1)
    return values.nanmean(1)


def _difference(before: SinkReport, after: SinkReport, name: str) -> dict[str, float]:
    one, other = _by_prompt(before, name), _by_prompt(after, name)
    if one is None or other is None:
        raise ReportError(
            f"{name} is a mean over prompts, so prompts cannot be paired; choose a field "
            "with a prompt dimension, such as sink_attention."
        )
    means = [float(mean_over_prompts(each)) for each in (one, other)]
    try:
        compare(before, after)  # raises for reports of other tokens
    except ReportError:
        ends = [means[1] - means[0], math.nan, math.nan]
    else:
        ends = [float(end) for end in bootstrap(other - one)]
    named = dict(zip(("difference", "low", "high"), ends, strict=True))
    return {"before": means[0], "after": means[1], **named}


def _flat(nested: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten a JSON object, naming nested entries with dots."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}.")
        elif not isinstance(value, list):
            flat[before + name] = value
    return flat
