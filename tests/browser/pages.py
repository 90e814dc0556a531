"""A page of a synthetic report, and how to click on its figures."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from sinkscope.html.report_page import to_html
from sinkscope.report.report import SinkReport
from tests.report.factory import synthetic_report

if TYPE_CHECKING:
    from tests.browser.conftest import Opened


@functools.cache
def plain_report() -> SinkReport:
    return synthetic_report(prompts=4)


@functools.cache
def plain_html() -> str:
    return to_html(plain_report())


def quiet(opened: Opened) -> None:
    """No message, no error, nothing fetched."""
    assert opened.said == []
    assert opened.requests == []


def click_cell(opened: Opened, layer: int, head: int) -> None:
    """Click the middle of a cell of the head map."""
    click_at(opened, "map", head, layer)


def click_at(opened: Opened, view: str, x: float, y: float) -> None:
    """Click a place of a figure, in the figures of its axes."""
    opened.page.locator(f'[data-view="{view}"]').scroll_into_view_if_needed()
    place = opened.page.evaluate(
        """([view, x, y]) => {
            const map = document.querySelector(`[data-view="${view}"]`);
            const {xaxis, yaxis} = map._fullLayout;
            const {left, top} = map.getBoundingClientRect();
            return [left + xaxis._offset + xaxis.d2p(x), top + yaxis._offset + yaxis.d2p(y)];
        }""",
        [view, x, y],
    )
    opened.page.mouse.move(*place)
    opened.page.wait_for_timeout(80)  # Plotly rate-limits hovering, and clicks what is hovered
    opened.page.mouse.click(*place)
