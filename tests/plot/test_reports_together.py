"""Figures of two reports, and figures for papers."""

from __future__ import annotations

import numpy as np
import pytest

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from tests.report.factory import synthetic_report


def test_by_layer_draws_two_reports_with_their_names():
    one, other = synthetic_report(seed=1), synthetic_report(seed=2)
    figure = plot.by_layer({"before": one, "after <b>": other}, "sink_attention")
    lines = [trace for trace in figure.data if trace.hoverinfo != "skip"]
    assert [line.name for line in lines] == ["before", "after &lt;b&gt;"]
    for line, report in zip(lines, (one, other), strict=True):
        expected = report.sink_attention.double().mean((0, 2)).numpy()
        np.testing.assert_allclose(line.y, expected, rtol=1e-5)
    both = plot.by_layer({"a": one, "b": other}, "sink_cosine", "other_cosine")
    names = [trace.name for trace in both.data if trace.hoverinfo != "skip"]
    assert names == ["a, sink cosine", "a, other cosine", "b, sink cosine", "b, other cosine"]


def test_before_after_draws_two_reports_position_by_position():
    one, other = synthetic_report(seed=1), synthetic_report(seed=2)
    figure = plot.before_after({"as it is": one, "masked": other}, "received_attention")
    assert [note.text for note in figure.layout.annotations[:2]] == ["as it is", "masked"]
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    for trace, report in zip(dots, (one, other), strict=True):
        expected = report.received_attention.double().mean((0, 1)).numpy()
        np.testing.assert_allclose(trace.y, expected, rtol=1e-5)
    with pytest.raises(ReportError, match="by_layer draws those with prompt and layer"):
        plot.before_after({"a": one, "b": other}, "sink_attention")


def test_paper_has_its_size_its_type_and_neither_title_nor_controls():
    figure = plot.head_map(synthetic_report())
    column, page = plot.paper(figure), plot.paper(figure, 6.8)
    assert (column.layout.width, page.layout.width) == (317, 653)  # 96 pixels to the inch
    for made in (column, page):
        assert made.layout.font.size == pytest.approx(8 * 96 / 72)
        assert made.layout.xaxis.title.font.size == made.layout.xaxis.tickfont.size
        assert made.layout.title.text is None
        assert len(made.layout.sliders) == 0 and len(made.layout.updatemenus) == 0
    assert len(figure.layout.sliders) == 1 and figure.layout.title.text, "the figure stays"


def test_pictures_carry_no_sliders_and_no_buttons(tmp_path, monkeypatch):
    sent = []

    def picture(self, **options):
        sent.append((self, options))
        return b"%PDF"

    for figure in (
        plot.head_map(synthetic_report()),
        plot.by_position(synthetic_report(), layer=1),
    ):
        monkeypatch.setattr(type(figure), "to_image", picture)
        path = plot.save(figure, tmp_path / "x.pdf")
        assert path.read_bytes() == b"%PDF"
        shown, options = sent.pop()
        assert len(shown.layout.sliders) == 0 and len(shown.layout.updatemenus) == 0
        assert options["width"] == 900
    plot.save(plot.paper(figure), tmp_path / "x.svg")
    assert sent.pop()[1]["width"] == 317
