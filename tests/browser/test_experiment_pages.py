"""Pages of experiments as people see them: on a phone, in the dark, on paper."""

from __future__ import annotations

import pandas as pd
import pytest

import sinkscope.plot as plot
from sinkscope.experiments.waiver import PositionEdit
from sinkscope.plot.theme import DARK, LIGHT
from tests.plot.found import CHANGES, conditions

DRAWN = "document.querySelectorAll('.figure .main-svg').length > 0"


@pytest.fixture(scope="module")
def found() -> PositionEdit:
    return conditions(PositionEdit, CHANGES, title="special start and end · 106: {}")


def open_drawn(open_page, html: str, **how):
    opened = open_page(html, **how)
    opened.page.wait_for_function(DRAWN)
    return opened


def red_green_blue(colour: str) -> str:
    parts = [str(int(colour[at : at + 2], 16)) for at in (1, 3, 5)]
    return f"rgb({', '.join(parts)})"


def papers(page) -> set[str]:
    """The colours that lie behind each section's text and behind each figure."""
    return set(
        page.evaluate(
            """[...[...document.querySelectorAll('.card')]
                    .map(card => getComputedStyle(card).backgroundColor),
                ...[...document.querySelectorAll('.figure .main-svg:first-of-type')]
                    .map(svg => svg.style.background || getComputedStyle(svg).backgroundColor)]"""
        )
    )


def test_a_page_asks_its_question_and_heads_every_figure(open_page, found) -> None:
    opened = open_drawn(open_page, found.to_html())
    page = opened.page
    assert opened.said == [] and opened.requests == []
    assert page.title() == "Does another position's vector make a sink?"
    assert page.locator("header .about").inner_text() == found.about
    assert page.locator("h1").all_inner_texts() == ["Does another position's vector make a sink?"]
    titles = [figure.layout.title.text for figure in found.figures().values()]
    assert page.locator("h2").all_inner_texts() == titles
    for title in titles:
        assert page.get_by_role("figure", name=title, exact=True).count() == 1
    assert page.locator(".gtitle").count() == 0, "the title is the heading"


def test_a_phone_scrolls_tables_and_figures_and_not_the_page(open_page, found) -> None:
    page = open_drawn(open_page, found.to_html(), width=390, is_mobile=True, has_touch=True).page
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    lines = found.summary().splitlines()
    table = [line for line in lines if line.startswith(" ")]
    height = page.evaluate(
        "(pre => pre.clientHeight / parseFloat(getComputedStyle(pre).lineHeight))"
        "(document.querySelector('pre'))"
    )
    assert round(height) == len(table), "no line of the table breaks"
    assert page.locator("p").all_inner_texts()[1] == lines[0]
    overlapping = page.evaluate(
        """[...document.querySelectorAll('.figure')].flatMap(figure => {
            const titles = [...figure.querySelectorAll('.annotation-text')];
            const boxes = titles.map(text => text.getBoundingClientRect());
            return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
                a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
        }).length"""
    )
    assert page.locator(".annotation-text").count() > 6 and overlapping == 0


def test_the_dark_page_is_dark_and_paper_is_white(open_page, found) -> None:
    page = open_drawn(open_page, found.to_html(), color_scheme="dark").page
    assert papers(page) == {red_green_blue(DARK.paper)}
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("document.querySelector('.figure').layout.width <= 680")
    assert papers(page) == {red_green_blue(LIGHT.paper)}
    assert (
        page.evaluate("getComputedStyle(document.querySelector('section')).breakInside") == "avoid"
    )
    page.emulate_media(media="screen", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert papers(page) == {red_green_blue(DARK.paper)}
    page.emulate_media(color_scheme="light")
    for _ in range(100):  # figures are drawn one after the other, slowly on a busy machine
        if papers(page) == {red_green_blue(LIGHT.paper)}:
            break
        page.wait_for_timeout(100)
    assert papers(page) == {red_green_blue(LIGHT.paper)}


def test_drawing_both_themes_leaves_the_one_that_was_set(found) -> None:
    plot.set_theme("dark")
    try:
        found.to_html()
        assert plot.theme.palette() is DARK
    finally:
        plot.set_theme("light")
    found.to_html()
    assert plot.theme.palette() is LIGHT


def test_a_long_legend_does_not_lie_on_the_line_of_settings(open_page) -> None:
    """Eight entries at the width that `plot.save` writes, as the command's defaults give them."""
    sinks = [f"{n} sinks" for n in (0, 1, 2, 4, 8)]
    kept = [*sinks, "255 as it is", "designated 255", "everything"]
    rows = [(name, window, 12.0) for name in kept for window in (256, 512)]
    about = "smollm2-135m · T = 4,096 · BOS: auto (none) · positions counted in the cache"
    frame = pd.DataFrame(rows, columns=["kept", "window", "perplexity"])
    figure = plot.perplexity_by_window(frame, about=about)
    page = open_page(figure.to_html(), width=900).page
    page.wait_for_selector(".legend .legendtext >> nth=7")
    names = (".gtitle-subtitle", ".xtitle", ".legend", ".plotly-graph-div")
    line, title, legend, whole = (page.locator(name).bounding_box() for name in names)
    assert legend["y"] >= line["y"] + line["height"]
    assert legend["y"] >= title["y"] + title["height"] - 1
    assert legend["y"] + legend["height"] <= whole["y"] + whole["height"] + 1
