"""Comparison of two reports of the same prompts, such as before and after an intervention."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.errors import ReportError
from sinkscope.output import number, printable
from sinkscope.report.labelled import coordinate, to_numpy
from sinkscope.report.report import SinkReport
from sinkscope.statistics import Interval, bootstrap, mean_over_prompts
from sinkscope.validation import shown

if TYPE_CHECKING:
    import pandas as pd

_PAGE = "sinkscope.html.comparison_page"
"""The module that renders the page, imported by name, because it is in a higher layer."""
_UNCHANGED = "No value changed."


def compare(before: SinkReport, after: SinkReport) -> Comparison:
    """Compare two reports of the same tokens, prompt by prompt.

    Args:
        before: the baseline.
        after: the same prompts under an intervention, in another dtype, or in another model. If the
            models differ in layers or heads, only fields without these dimensions are compared.

    Returns:
        The comparison: `difference` and `to_frame` return one field; printing it shows all fields
        that changed.

    Raises:
        ReportError: if one is not a report, or the tokens differ, so that prompts cannot be paired.
    """
    for report in (before, after):
        if not isinstance(report, SinkReport):
            raise ReportError(
                f"compare() takes two reports of a scan, not {shown(report)}; load_report opens a "
                "file."
            )
    same = before.tokens.shape == after.tokens.shape and bool(
        (before.mask == after.mask.to(before.mask.device)).all()
        and (before.tokens == after.tokens.to(before.tokens.device))[before.mask].all()
    )
    if not same:
        raise ReportError(
            "These reports cannot be compared prompt by prompt because their tokens differ; scan "
            "the same texts twice."
        )
    return Comparison(before, after)


def _words(value: Any) -> str:
    """A setting as text."""
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _place(coordinate: Any) -> str:
    """A coordinate as text; thresholds are rounded, as float32 does not store them exactly."""
    rounded = hasattr(coordinate, "dtype") and coordinate.dtype.kind == "f"
    return f"{coordinate:g}" if rounded else printable(str(coordinate))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Differences between two reports of the same prompts, as returned by `compare`.

    Example:
        >>> with SelfOnlyMask(model, position=255):                     # doctest: +SKIP
        ...     after = scan(model, texts)
        >>> compare(report, after).difference("sink_attention").low     # [layer head]
    """

    before: SinkReport
    after: SinkReport

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that both reports have with equal sizes."""
        return tuple(
            name
            for name, variable in self.before.variables().items()
            if variable.dims != (name,)
            and name in self.after.measured()
            and name in self.before.measured()
            and self.before[name].is_floating_point()
            and self.before[name].shape == self.after[name].shape
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """The fields that both reports have with different sizes."""
        return tuple(
            name
            for name in self.before.measured()
            if name in self.after.measured() and self.before[name].shape != self.after[name].shape
        )

    @property
    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ, with their values before and after."""
        before, after = self.before.settings.to_dict(), self.after.settings.to_dict()
        return {k: (before[k], after[k]) for k in before if before[k] != after[k]}

    def difference(
        self, name: str, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Interval:
        """After minus before: mean over prompts with its bootstrap interval over paired prompts.

        Returns:
            (mean, low, high) with the field's dimensions except the prompt. For fields stored as
            means over prompts, low and high are nan.

        Raises:
            ReportError: if one of the reports lacks the field, or their sizes differ.
        """
        before, after = self._pair(name)
        if "prompt" in self.before.variables()[name].dims:
            return bootstrap(after - before, level, resamples, seed)
        nothing = torch.full_like(before, torch.nan)
        return Interval(after - before, nothing, nothing)

    def to_frame(self, name: str, level: float = 0.95) -> pd.DataFrame:
        """A tidy frame of one field: before, after and difference, averaged over prompts.

        Returns:
            The field's other dimensions, then "before [unit]", "after [unit]", "difference
            [unit]", and "low [unit]" and "high [unit]", the ends of the difference's interval.
        """
        import numpy as np
        import pandas as pd

        difference = self.difference(name, level)
        variable = self.before.variables()[name]
        dims = [dim for dim in variable.dims if dim != "prompt"]
        grid = np.indices(tuple(difference.mean.shape))
        columns = {
            dim: coordinate(self.before, dim)[index.ravel()]
            for dim, index in zip(dims, grid, strict=True)
        }
        figures = {
            "before": self.before.mean(name),
            "after": self.after.mean(name),
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
        }
        for title, figure in figures.items():
            columns[f"{title} [{variable.unit}]"] = to_numpy(figure).ravel()
        return pd.DataFrame(columns)

    def to_html(self) -> str:
        """Render the comparison as one self-contained HTML page."""
        return importlib.import_module(_PAGE).to_html(self)

    def __repr__(self) -> str:
        from sinkscope.output import table_as_text

        columns, rows = self._table()
        table = table_as_text(columns, rows) if rows else _UNCHANGED
        return "\n".join(filter(None, [self._title(), table, self._note()]))

    def _repr_html_(self) -> str:
        import html

        from sinkscope.output import table_as_html

        columns, rows = self._table()
        table = table_as_html(columns, rows) if rows else f"<div>{_UNCHANGED}</div>"
        note = f"<div>{html.escape(self._note())}</div>" if self._note() else ""
        return f"<strong>{html.escape(self._title())}</strong>{table}{note}"

    def _title(self) -> str:
        model = printable(self.before.settings.model)
        changed = ", ".join(
            f"{name}: {printable(_words(old))} → {printable(_words(new))}"
            for name, (old, new) in self.changed_settings.items()
            if name != "weights"
        )
        return f"Before and after, {model}" + (f" ({changed})" if changed else "")

    def _note(self) -> str:
        """A sentence on the fields left out of the table, or ""."""
        names = ", ".join(self.left_out)
        return f"Left out, since their sizes differ: {names}." if names else ""

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Rows for the fields that changed: overall means, and where the change is largest."""
        rows = []
        for name in self.names:
            before, after = self._pair(name)
            change = after - before
            if "prompt" in self.before.variables()[name].dims:
                change = mean_over_prompts(change)
            defined = change.isfinite()
            if not (change[defined] != 0).any():
                continue
            top = int(torch.where(defined, change.abs(), -1).argmax())
            place = torch.unravel_index(torch.tensor(top), change.shape)
            dims = [dim for dim in self.before.variables()[name].dims if dim != "prompt"]
            where = ", ".join(
                f"{dim} {_place(coordinate(self.before, dim)[int(i)])}"
                for dim, i in zip(dims, place, strict=True)
            )
            rows.append(
                [
                    self.before.variables()[name].label,
                    number(float(before[before.isfinite()].mean())),
                    number(float(after[after.isfinite()].mean())),
                    f"{number(float(change.flatten()[top]))} at {where}",
                ]
            )
        return ["field", "mean before", "mean after", "largest change"], rows

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        before, after = self.before[name], self.after[name]
        if before.shape != after.shape:
            raise ReportError(
                f"{name} cannot be compared: it has the shape {tuple(before.shape)} before and "
                f"{tuple(after.shape)} after."
            )
        return before.float(), after.float().to(before.device)
