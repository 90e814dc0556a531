"""Lines with intervals, and long series thinned so that they open without freezing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from sinkscope.plot.theme import LIGHT, SEQUENTIAL, Palette, faded

LONGEST = 1024
"""Points of a line or bars of a figure; beyond that, only the maximum of each bin is drawn."""


class Thinned(NamedTuple):
    """A series after thinning.

    Attributes:
        x: where each bin's largest value was found [position].
        y: that value.
        first, last: the positions a bin covers, both ends included.
    """

    x: np.ndarray
    y: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @property
    def thinned(self) -> bool:
        """Whether any bin covers more than one position."""
        return bool((self.first != self.last).any())


def thin(
    x: np.ndarray, y: np.ndarray, *, keep: Sequence[int] = (), longest: int = LONGEST
) -> Thinned:
    """A series with at most about `longest` points: bins by position, the maximum of each.

    The first sixteen points and those in `keep` have bins of their own, so that a sink is where it
    is and its height is exact. Values that are not a number lose against any that is.

    Args:
        x: positions in rising order [point].
        y: values [point].
        keep: positions that stay alone.
        longest: how many points may be drawn.
    """
    if len(x) <= longest:
        return Thinned(x, y, x, x)
    starts = bin_starts(len(x), longest, [int(np.searchsorted(x, k)) for k in keep])
    largest = bin_argmax(y, starts)
    ends = np.append(starts[1:], len(x)) - 1
    return Thinned(x[largest], y[largest], x[starts], x[ends])


def bin_starts(size: int, longest: int, keep: Sequence[int] = ()) -> np.ndarray:
    """First index of each of about `longest` bins; the first sixteen and `keep` are alone."""
    if size <= longest:
        return np.arange(size)
    single = np.unique([*range(16), *(k for k in keep if 0 <= k < size)])[: longest // 2]
    regular = np.linspace(0, size, max(2, longest - 2 * len(single)), endpoint=False).astype(int)
    starts = np.unique(np.concatenate([regular, single, single + 1]))
    return starts[starts < size]


def bin_argmax(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Index of each bin's largest value along the last axis [... bin]."""
    filled = np.where(np.isnan(values), -np.inf, values)
    ends = np.append(starts[1:], values.shape[-1])
    return np.stack(
        [
            start + filled[..., start:end].argmax(-1)
            for start, end in zip(starts, ends, strict=True)
        ],
        axis=-1,
    )


def bin_max(values: np.ndarray, starts: np.ndarray, axis: int = -1) -> np.ndarray:
    """Maximum of each bin along an axis; nan only where a bin holds nothing else."""
    return np.fmax.reduceat(values, starts, axis=axis)


def band(
    figure: go.Figure,
    x: Any,
    interval: tuple[Any, Any, Any],
    *,
    name: str,
    colour: str,
    label: str,
    along: str,
    showlegend: bool = True,
    dash: str | None = None,
    entry: str | None = None,
    **place: int,
) -> None:
    """Add a line with its 95 % interval as a band behind it.

    Args:
        figure: to add to.
        x: where [point].
        interval: (mean, low, high) over prompts [point]; nan ends draw no band.
        name: of the line, for legend and hover; Plotly text.
        colour: "#rrggbb".
        label: of y, with its unit, for the hover.
        along: word for x in the hover.
        showlegend: whether the line is in the legend.
        dash: Plotly's name of a dash.
        entry: name in the legend, where it is not the hover's.
        place: row and col of a subplot.
    """
    entry = name if entry is None else entry
    x = np.asarray(x)
    middle, low, high = (np.asarray(end, dtype=float) for end in interval)
    known = np.isfinite(low) & np.isfinite(high)
    hover = f"{name}, {along} %{{x}}<br>{label}: %{{y:.4~g}}"
    shown: dict[str, Any] = dict(hovertemplate=f"{hover}<extra></extra>")
    if known.any():
        figure.add_scatter(
            x=np.concatenate([x[known], x[known][::-1]]),
            y=np.concatenate([high[known], low[known][::-1]]),
            fill="toself", fillcolor=faded(colour, 0.18), mode="lines", line_width=0,
            hoverinfo="skip", showlegend=False, legendgroup=entry, **place,
        )  # fmt: skip
        ends = "<br>95 % interval: %{customdata[0]:.4~g} to %{customdata[1]:.4~g}"
        shown = dict(
            customdata=np.stack([low, high], axis=-1), hovertemplate=f"{hover}{ends}<extra></extra>"
        )
    figure.add_scatter(
        x=x, y=middle, mode="lines+markers" if len(x) <= 80 else "lines", name=entry,
        legendgroup=entry, showlegend=showlegend, marker_size=5,
        line=dict(color=colour, width=2, dash=dash), **shown, **place,
    )  # fmt: skip


def graded(size: int, colours: Palette) -> list[str]:
    """Colours of as many lines in an order, first to last: viridis without the paper's end."""
    ends = (0.0, 0.9) if colours is LIGHT else (0.25, 1.0)
    points = np.linspace(*ends, max(size, 2)).tolist()
    return plotly.colors.sample_colorscale(plotly.colors.get_colorscale(SEQUENTIAL), points)[:size]
