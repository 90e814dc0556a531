"""What the command prints is as wide as the terminal; what it writes is not."""

from __future__ import annotations

import torch

from sinkscope.output import as_wide_as_the_terminal, line_width, table_as_text
from sinkscope.report.summary import as_text
from tests.report.factory import synthetic_report


def printed(columns: int, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with as_wide_as_the_terminal():
        return as_text(synthetic_report())


def test_a_summary_fits_the_terminal_without_losing_a_figure(monkeypatch) -> None:
    wide = as_text(synthetic_report())
    assert 80 < max(map(len, wide.splitlines())) <= 100
    narrow = printed(80, monkeypatch)
    assert max(map(len, narrow.splitlines())) <= 80
    assert sorted(wide.replace("─", "").split()) == sorted(narrow.replace("─", "").split())
    rows = [" ".join(line.split()) for line in wide.splitlines() if " to " in line]
    assert rows == [" ".join(line.split()) for line in narrow.splitlines() if " to " in line]
    assert printed(200, monkeypatch) == printed(100, monkeypatch) == wide
    assert printed(30, monkeypatch) == narrow, "figures would be cut"
    assert line_width() == 100, "and files keep their width"


def test_no_line_begins_with_a_unit(monkeypatch) -> None:
    """The rate stands where 80 columns end, so that only its unit would go to the next line."""
    report = synthetic_report(sink_importance=torch.full((3, 4, 6), 0.4))
    fact = f"{'all heads':<54} 100.0 %"
    assert len(f"{'Sink heads':18}{fact}") == 80
    monkeypatch.setattr("sinkscope.report.summary.sink_heads", lambda _: f"x{fact}")
    monkeypatch.setenv("COLUMNS", "80")
    with as_wide_as_the_terminal():
        lines = [line.strip() for line in as_text(report).splitlines()]
    assert "100.0 %" in lines and not any(line.startswith(("%", "×")) for line in lines)


def test_a_table_breaks_titles_only_if_it_has_to(monkeypatch) -> None:
    columns, rows = ["head", *["95 % long title"] * 5], [["0", *["0.123"] * 5]]
    monkeypatch.setenv("COLUMNS", "80")
    assert "95 % long title" in table_as_text(columns, rows)
    with as_wide_as_the_terminal():
        titles = table_as_text(columns, rows).splitlines()[:3]
    assert [line.split() for line in titles] == [
        ["95", "%"] * 5,
        ["long"] * 5,
        ["head", *["title"] * 5],
    ]


def test_what_is_undefined_is_a_dash() -> None:
    """One prompt has no interval, two tokens have no other key: no nan, and no empty cell."""
    alone = synthetic_report(1, sink_logit_gap=torch.full((1, 4, 6), float("nan")))
    rows = as_text(alone).partition("HONOR")[2].splitlines()[2:]
    assert len(rows) == 8
    for row in rows:
        assert row.split()[3:5] == ["–", "–"] and "nan" not in row
    assert as_text(alone).count("–") == 16 and alone._repr_html_().count(">–<") == 16
