"""Perplexity along a text: lines, their order and what is dashed."""

from __future__ import annotations

import pandas as pd
import pytest

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from tests.plot.frames import ABOUT


def blocks() -> pd.DataFrame:
    rows = [
        (kept, 64.0 + 128 * block, level + block)
        for kept, level in (("everything", 10.0), ("0 sinks", 30.0), ("<4> sinks", 11.0))
        for block in range(3)
    ]
    return pd.DataFrame(rows, columns=["kept", "position", "perplexity"])


def test_a_line_a_setting_and_a_dashed_one_for_everything() -> None:
    figure = plot.perplexity_along(blocks(), about=ABOUT)
    everything, none, four = figure.data
    assert [line.name for line in figure.data] == ["everything", "0 sinks", "&lt;4&gt; sinks"]
    assert list(none.x) == [64.0, 192.0, 320.0] and list(none.y) == [30.0, 31.0, 32.0]
    assert everything.line.dash == "dash" and none.line.dash is None
    assert none.line.width > four.line.width, "a line that lies on another could not be seen"
    assert none.line.color != four.line.color
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.subtitle.text == ABOUT.replace("<s>", "&lt;s&gt;")


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ReportError, match="position is missing"):
        plot.perplexity_along(blocks().drop(columns="position"), about=ABOUT)
