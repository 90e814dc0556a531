"""How the one-file report looks: themes, phones, paper, hostile tokens, what is said of it."""

from __future__ import annotations

import re

import pytest
import torch

from sinkscope.html.report_page import to_html
from tests.browser.pages import plain_html, quiet
from tests.report.factory import synthetic_report

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "\"'`&lt;${1}",
    "\u202eright to left",
    "שלום",
    "\x00\x07",
    "]]>{{style}}",
    "\u2028line",
]


def test_screen_readers_are_told_what_each_figure_is(opened):
    names = opened.page.locator(".figure").evaluate_all(
        """all => all.map(one => [one.getAttribute("role"), one.getAttribute("aria-label")
            ?? document.getElementById(one.getAttribute("aria-labelledby")).textContent])"""
    )
    assert len(names) > 8 and all(
        role in ("figure", "application") and name for role, name in names
    )
    assert len({name for _, name in names}) == len(names)


def test_log_bars_stand_on_a_decade_of_their_own(open_page):
    norms = torch.full((4, 16), 12.0)
    norms[:, 0] = 8.0
    page = open_page(to_html(synthetic_report(residual_norm=norms)))
    page.page.wait_for_selector("html[data-ready]")
    axis = """document.querySelector('[data-view="residual"]')._fullLayout.yaxis"""
    assert not page.page.locator('[data-log="residual"]').is_checked(), "8 and 12 differ little"
    assert page.page.evaluate(f"{axis}.type") == "linear"
    assert page.page.evaluate(f"{axis}.range")[0] == 0
    page.page.locator('[data-log="residual"]').check()
    low, high = page.page.evaluate(f"{axis}.range")
    assert 10**low == pytest.approx(0.8, rel=1e-3) and 10**high > 12
    assert page.page.locator('[data-view="residual"] .ytick').count() >= 2
    norms[2, 0] = 800.0
    wide = open_page(to_html(synthetic_report(residual_norm=norms)))
    wide.page.wait_for_selector("html[data-ready]")
    assert wide.page.locator('[data-log="residual"]').is_checked()


def test_the_tokens_that_few_queries_see_are_named(open_page):
    for causal, expected in (
        (True, "From position 9 on, keys are seen by few queries"),
        (False, ""),
    ):
        report = synthetic_report(prompts=2, lengths=[16, 12], settings={"causal": causal})
        page = open_page(to_html(report))
        page.page.wait_for_selector("html[data-ready]")
        page.page.select_option("#prompt", "1")
        assert page.page.text_content("#few").startswith(expected)
        assert causal or page.page.text_content("#few") == ""
        page.page.select_option("#quantity", label="residual outlier [ratio]")
        assert page.page.text_content("#few") == ""


def test_theme_follows_the_system_and_the_switch(open_page):
    page = open_page(plain_html(), color_scheme="dark")
    page.page.wait_for_selector("html[data-ready]")
    paper = """document.querySelector('[data-view="map"]')._fullLayout.paper_bgcolor"""
    assert page.page.evaluate(paper) == "#14171c"
    page.page.click("#theme")
    assert page.page.evaluate(paper) == "#ffffff"
    assert page.page.get_attribute("html", "data-theme") == "light"
    page.page.emulate_media(color_scheme="light")
    page.page.emulate_media(color_scheme="dark")  # the hand's choice stays
    assert page.page.get_attribute("html", "data-theme") == "light"
    quiet(page)


def test_hostile_tokens_stay_text(open_page):
    rows = [HOSTILE, HOSTILE]
    report = synthetic_report(
        prompts=2,
        positions=len(HOSTILE),
        token_text=rows,
        settings={"model": "<script>document.title='owned'</script>", "bos": "</title><b>"},
    )
    page = open_page(to_html(report))
    page.page.wait_for_selector("html[data-ready]")
    quiet(page)
    assert page.page.title().startswith("Attention sinks of <script>")
    shown = page.page.locator("#strip span").all_inner_texts()
    assert shown[0] == HOSTILE[0][:31] + "…"
    assert shown[3] == HOSTILE[3] and shown[5] == HOSTILE[5]
    assert shown[6] == "␀␇" and shown[4].startswith("⟨U+202E⟩")
    assert page.page.locator("main img, main b").count() == 0
    # Hovering puts the first token's text into a figure.
    bar = page.data("received")[0]["text"][0]
    assert "&lt;script&gt;" in bar
    assert not re.search(r"document\.title='owned'", page.page.title()[40:])


def test_phone_has_no_sideways_scroll_and_can_choose_heads(open_page):
    page = open_page(plain_html(), width=390, height=800, has_touch=True, is_mobile=True)
    page.page.wait_for_selector("html[data-ready]")
    width = page.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    page.page.locator('[data-view="map"]').scroll_into_view_if_needed()
    assert page.page.locator('[data-view="map"] .modebar-btn').count() == 0
    page.page.locator('[data-view="dims"]').scroll_into_view_if_needed()
    panels = page.page.locator('[data-view="dims"] .barlayer').evaluate_all(
        "all => all.map(it => it.getBoundingClientRect()).map(({top, bottom}) => [top, bottom])"
    )
    assert panels[0][1] < panels[1][0], "one above the other"
    named = page.page.locator('[data-view="dims"] .x2tick text').count()
    assert named == 10, "every bar bears its dim"
    page.page.select_option("#metric", "honor")
    assert "honor" in page.text("#chosen").lower()
    quiet(page)


def test_print_is_light_and_without_controls(open_page):
    page = open_page(plain_html(), color_scheme="dark")
    page.page.wait_for_selector("html[data-ready]")
    page.page.emulate_media(media="print")
    assert not page.page.locator("#metric").is_visible()
    key = page.page.locator("#key")
    assert key.is_visible() and page.page.locator("#scale-bar").is_visible()
    said = r"Prompt 0, attention received in layer \d, head \d, mean over prompts, linear:"
    assert re.fullmatch(said, key.inner_text())
    assert page.page.locator('[data-view="rate"] .annotation-text').text_content() == "ε = 0.3"
    page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.page.get_attribute("html", "data-theme") == "light"
    widths = (
        """[...document.querySelectorAll('.js-plotly-plot')].map(one => one._fullLayout.width)"""
    )
    on_paper = page.page.evaluate(widths)
    for card in page.page.locator(".scroll").all():
        cut = card.evaluate("it => it.scrollWidth > it.parentElement.clientWidth")
        assert not cut, "paper does not scroll"
    assert not page.page.locator(".head label").first.is_visible()
    left = """one => document.querySelector(one).getBoundingClientRect().left"""
    assert page.page.evaluate(left, "h1") == page.page.evaluate(left, "main .card")
    assert page.page.locator("details:not([open])").count() == 0, "paper does not unfold"
    assert len(on_paper) > 5 and all(250 < width <= 680 for width in on_paper), "A4 and Letter"
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.page.get_attribute("html", "data-theme") == "dark"
    assert max(page.page.evaluate(widths)) > 1000, "as wide as the window again"
    assert len(page.page.pdf()) > 50_000


def test_the_map_of_a_deep_model_ends_the_first_printed_sheet(open_page):
    page = open_page(to_html(synthetic_report(prompts=2, layers=48)))
    page.page.wait_for_selector("html[data-ready]")
    height = """document.querySelector('[data-view="map"]')._fullLayout.height"""
    on_screen = page.page.evaluate(height)
    page.page.emulate_media(media="print")
    page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    end = """document.querySelector('.map').getBoundingClientRect().bottom"""
    assert page.page.evaluate(end) < (11 * 25.4 - 2 * 12) / 25.4 * 96, "Letter, less its margins"
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.page.evaluate(height) == on_screen


def test_no_figure_can_be_uploaded(opened):
    titles = opened.page.locator(".modebar-btn").evaluate_all(
        "all => all.map(one => one.getAttribute('data-title') || one.dataset.name)"
    )
    assert titles
    assert not [title for title in titles if re.search("chart|cloud|share", title, re.I)]
