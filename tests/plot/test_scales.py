"""Ticks of logarithmic scales: numbers where one looks for them, and none on another."""

from __future__ import annotations

import re

import numpy as np
import pytest

import sinkscope.plot as plot
from sinkscope.plot.scales import log_bar, log_scale
from tests.report.factory import synthetic_report


def figure_of(text: str) -> float:
    """What a tick's label says."""
    found = re.fullmatch(r"(?:([\d.,]+)(?: × )?)?(?:10<sup>(-?\d+)</sup>)?", text)
    return float((found[1] or "1").replace(",", "")) * 10.0 ** int(found[2] or 0)


@pytest.mark.parametrize(
    ("low", "high", "between"),
    [
        (210, 880, [500]),  # within a decade, where powers of ten have no tick
        (21_000, 24_280, []),
        (3, 70, [5, 10, 20, 50]),
        (0.0026, 0.41, [0.01, 0.1]),
        (2.5e-6, 0.4, [1e-5, 1e-4, 1e-3, 1e-2, 0.1]),
        (3e3, 2e7, [1e4, 1e5, 1e6, 1e7]),
    ],
)
def test_a_colour_bar_names_both_its_ends_and_round_numbers_between(low, high, between):
    bar = log_bar(np.log10(low), np.log10(high))
    said = [figure_of(text) for text in bar["ticktext"]]
    assert [10**at for at in bar["tickvals"]] == pytest.approx(said, rel=0.005)
    assert said == pytest.approx([low, *between, high], rel=0.005)


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_labels_of_a_colour_bar_do_not_touch_on_a_low_figure(rows):
    report = synthetic_report(prompts=1, positions=200)
    cells, _ = plot.token_strip(report, tokens=10 * rows).data
    ends = cells.colorbar.tickvals[-1] - cells.colorbar.tickvals[0]
    apart = np.diff(cells.colorbar.tickvals) / ends * 30 * rows  # pixels
    assert len(apart) == 1 or apart.min() > 15


def test_the_map_of_massive_activations_names_its_ends():
    report = synthetic_report(prompts=3)
    bar = plot.massive_activations(report).data[0].colorbar
    sizes = report.massive.value.abs().reshape(3, 2).amax(0).tolist()
    said = [figure_of(text) for text in bar.ticktext]
    # A decade at least: what differs by a hundredth has one colour.
    assert said[-1] == pytest.approx(max(sizes), rel=0.005)
    assert said[0] == pytest.approx(min(*sizes, max(sizes) / 10), rel=0.005)


def test_an_axis_of_many_decades_has_powers_of_ten_alone():
    few, many = (log_scale(np.array([1.0, most, np.nan, 0.0])) for most in (200.0, 1e5))
    assert few["dtick"] == "D2" and few["tickformat"] == ",~g"
    assert many["dtick"] == 1 and many["exponentformat"] == "power" and "tickformat" not in many
    assert "dtick" not in log_scale(np.array([2.0, 9.0]))
