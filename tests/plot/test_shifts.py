"""Figures of shifted rotary positions: the frame's numbers, line by line."""

from __future__ import annotations

import numpy as np
import pytest

from sinkscope import plot
from sinkscope.errors import ReportError
from tests.plot import frames

ABOUT = "m · T = 40"


def test_errors_along_the_text_are_those_of_the_largest_shift() -> None:
    frame = frames.shifted()
    frame.loc[frame["shift"] == 16, "error"] *= 3
    figure = plot.shift_errors(frame, about=ABOUT)
    lines = {t.name: t for t in figure.data if t.showlegend is not False}
    assert list(lines) == ["bfloat16", "bfloat16, float32 &lt;angles&gt;", "float32"]
    for name, line in zip(frame["arithmetic"].unique(), lines.values(), strict=True):
        rows = frame[(frame["arithmetic"] == name) & (frame["shift"] == 16384)]
        np.testing.assert_allclose(line.y, rows["error"])
        np.testing.assert_allclose(line.x, rows["query"])
    assert figure.layout.title.text == "Attention that a shift of 16,384 positions moves"


def test_errors_at_keys_are_those_of_the_shift_asked_for() -> None:
    frame = frames.shifted_keys()
    frame.loc[frame["shift"] == 16, "error"] *= 3
    figure = plot.shift_errors_by_key(frame, 16, about=ABOUT)
    assert [line.name for line in figure.data] == ["bfloat16", "float32"]
    rows = frame[(frame["arithmetic"] == "float32") & (frame["shift"] == 16)]
    np.testing.assert_allclose(figure.data[1].y, rows["error"])
    np.testing.assert_allclose(figure.data[1].x, rows["key"] + 1)


def test_an_error_of_zero_is_left_out_of_a_logarithmic_axis() -> None:
    frame = frames.shifted_keys()
    frame.loc[frame["key"] == 7, "error"] = 0.0
    figure = plot.shift_errors_by_key(frame, about=ABOUT)
    assert 8 not in figure.data[0].x and len(figure.data[0].x) == 39


def test_a_shift_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ReportError, match="shift is 17; expected one of 16, 16384"):
        plot.shift_errors(frames.shifted(), 17, about=ABOUT)
    with pytest.raises(ReportError, match="error_low is missing"):
        plot.shift_errors(frames.shifted().drop(columns="error_low"), about=ABOUT)
