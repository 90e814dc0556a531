"""Values that figures read from a report: means with intervals, sinks, checked indices."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.report.labelled import to_numpy
from sinkscope.report.report import SinkReport
from sinkscope.statistics import Interval
from sinkscope.validation import shown

_intervals: WeakKeyDictionary[SinkReport, dict[Hashable, Interval]] = WeakKeyDictionary()


def mean_of(report: SinkReport, name: str) -> np.ndarray:
    """A field's mean over prompts, without the prompt dimension."""
    return to_numpy(report.mean(name))


def interval_of(report: SinkReport, name: str, resamples: int = 2000) -> Interval:
    """A field's mean over prompts and its interval; with nan ends if the field has no prompts."""
    if "prompt" not in report.variables()[name].dims:
        middle = mean_of(report, name)
        return Interval(middle, np.full_like(middle, np.nan), np.full_like(middle, np.nan))
    return remembered(report, (name, resamples), lambda: report.interval(name, resamples=resamples))


def remembered(report: SinkReport, key: Hashable, make: Callable[[], Any]) -> Interval:
    """Cache an interval of a report, for the figures of both themes and for clicks."""
    computed = _intervals.setdefault(report, {})
    if key not in computed:
        computed[key] = Interval(*(to_numpy(end) for end in make()))
    return computed[key]


def nanmean(figures: np.ndarray, axis: int) -> np.ndarray:
    """Mean ignoring nan; nan, without a warning, if all are nan."""
    known = ~np.isnan(figures)
    counts = known.sum(axis=axis)
    sums = np.where(known, figures, 0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(figures.dtype)


def is_known(report: SinkReport, name: str) -> bool:
    """Whether a field was measured and is defined for some prompt."""
    figures = getattr(report, name)
    return figures is not None and not (isinstance(figures, Tensor) and figures.isnan().all())


def require_report(name: str, value: Any) -> None:
    """Refuse anything but a report.

    Raises:
        ReportError: If it is anything else; other results and frames have their own figures.
    """
    if not isinstance(value, SinkReport):
        raise ReportError(f"{name} is {shown(value)}; expected the SinkReport that a scan gives.")


def require_known(report: SinkReport, name: str) -> None:
    """Refuse a field that was not measured, or is undefined for every prompt.

    Raises:
        ReportError: with the reason.
    """
    report._require(name)
    if not is_known(report, name):
        raise ReportError(
            f"{name} is nan in every prompt, so there is nothing to draw: it compares the sinks "
            f"with other positions; scan prompts that have some."
        )


def sink_positions(report: SinkReport) -> list[int]:
    """Positions that are a sink in any prompt."""
    return np.flatnonzero(to_numpy(report.sink_mask).any(axis=0)).tolist()


def checked_index(report: SinkReport, dim: str, index: int | None) -> int | None:
    """An index along a dimension, checked.

    Raises:
        ReportError: If the report has no such layer, head or prompt.
    """
    size = report.sizes[dim]
    if index is not None and not 0 <= index < size:
        raise ReportError(
            f"There is no {dim} {index} in this report; its {dim}s run from 0 to {size - 1}."
        )
    return index
