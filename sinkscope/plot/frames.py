"""Checks and aggregations of the tidy frames that experiments pass to figures.

Every experiment's frame has one row per observation, with dimensions and quantities in columns of
standard names. `prompt`, `layer`, `head` and `position` are integers, -1 where a row has none.
`metric` names a field of the report (or a word such as "loss"), and `value` is its value. The
docstring of each figure describes what else it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.errors import ReportError
from sinkscope.plot.labels import in_words, with_unit
from sinkscope.statistics import bootstrap
from sinkscope.validation import shown

if TYPE_CHECKING:
    import pandas as pd

# Units of what experiments measure beside the report's own fields.
_UNITS = {
    "loss": "nat",
    "loss_change": "nat",
    "backcopy_risk": "nat",
    "bigram_risk": "nat",
    "backcopy_excess": "nat",
    "bigram_excess": "nat",
    "logit_gap": "logit",
    "trigger_attention": "probability",
    "spare_attention": "probability",
    "perplexity": None,
    "sink_share": "share",
    "share_ablated": "share",
    "dormant_share": "share",
    "residual_excess": "activation",
    "residual_others": "activation",
    "value_others": "activation",
}


def need(frame: pd.DataFrame, figure: str, *columns: str) -> pd.DataFrame:
    """Return the frame, if it has these columns and any row.

    Raises:
        ReportError: If a column or all rows are missing, or it is not a frame.
    """
    if not hasattr(frame, "columns") or not hasattr(frame, "empty"):
        raise ReportError(
            f"{figure} was given {shown(frame)}; expected a frame, such as a result's to_frame() "
            "gives."
        )
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ReportError(
            f"{figure} needs a frame with the columns {', '.join(columns)}; "
            f"{' and '.join(missing)} is missing from {', '.join(map(str, frame))}."
        )
    if frame.empty:
        raise ReportError(f"{figure} was given a frame without rows; there is nothing to draw.")
    return frame


def pick(frame: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    """Return the rows that have this value in this column.

    Raises:
        ReportError: If there are none; the message lists the existing values.
    """
    rows = frame[frame[column] == value]
    if rows.empty:
        known = ", ".join(map(str, frame[column].unique()[:12]))
        raise ReportError(f"The frame has no {column} {value!r}; it has {known}.")
    return rows


def unit_of(metric: str) -> str | None:
    """Return the unit of a report's field, or of another quantity that experiments measure."""
    from sinkscope.report.fields import SinkFields

    variable = SinkFields.variables().get(metric)
    return variable.unit if variable is not None else _UNITS.get(metric)


def label_of(metric: str) -> str:
    """Return a metric's axis title, with its unit."""
    return with_unit(in_words(metric), unit_of(metric))


def over_prompts(frame: pd.DataFrame, by: str, value: str = "value") -> pd.DataFrame:
    """Mean and 95 % bootstrap interval over prompts for each value of a column.

    Args:
        frame: with the columns prompt, `by` and `value`; several rows of one prompt are averaged.
        by: the column to group by, in rising order.
        value: the column to average.

    Returns:
        Columns `by`, mean, low, high; low and high are nan with fewer than two prompts.
    """
    import pandas as pd
    import torch

    table = frame.pivot_table(index="prompt", columns=by, values=value, aggfunc="mean")
    figures = bootstrap(torch.from_numpy(table.to_numpy(dtype="float64", copy=True)))
    return pd.DataFrame(
        {by: table.columns, "mean": figures.mean, "low": figures.low, "high": figures.high}
    )
