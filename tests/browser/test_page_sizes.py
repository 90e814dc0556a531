"""The one-file report of reports that lack fields, of long texts and of many prompts."""

from __future__ import annotations

import re

import pytest
import torch

import sinkscope as ss
from sinkscope.html.report_page import to_html
from tests.browser.pages import click_at, click_cell, quiet
from tests.report.factory import only, synthetic_report


@pytest.mark.parametrize(
    "kept",
    [
        ("sink_attention",),
        ("received_attention", "prompts_at"),
        ("residual_norm", "residual_outlier"),
        (),
    ],
)
def test_a_page_shows_what_there_is_and_nothing_else(open_page, kept):
    page = open_page(to_html(only(synthetic_report(), *kept)))
    page.page.wait_for_selector("html[data-ready]")
    quiet(page)
    views = page.page.locator("[data-view]").evaluate_all("all => all.map(one => one.dataset.view)")
    assert ("map" in views) == ("sink_attention" in kept)
    for view, field in (("received", "received_attention"), ("residual", "residual_norm")):
        assert (view in views) == (field in kept), "linked figures need no map"
    assert all(page.data(view) for view in views)
    assert page.page.locator("h2").last.inner_text() == "Facts, terms, settings"


def test_without_a_map_a_head_is_chosen_by_its_numbers(open_page):
    report = synthetic_report()
    page = open_page(to_html(only(report, "received_attention", "value_norm", "residual_norm")))
    page.page.wait_for_selector("html[data-ready]")
    for box, index in (("#layer", "2"), ("#head", "5")):
        page.page.fill(box, index)
        page.page.keyboard.press("Tab")
    for name, expected in {
        "received": report.received_attention[2, 5],
        "values": report.value_norm[2, 1],
        "residual": report.residual_norm[2],
    }.items():
        sink, others = page.data(name)[:2]
        assert sink["y"] + others["y"] == pytest.approx(expected.tolist()), name
    assert page.page.locator("h3 [data-where]").first.inner_text() == "layer 2, head 5"
    width = page.page.locator('[data-view="received"]').evaluate("it => it.clientWidth")
    assert width > 1000, "what stood beside the map has its room"
    quiet(page)


@pytest.mark.slow
@pytest.mark.real
def test_page_of_a_real_model_is_small_and_ready_soon(smollm2, open_page, record_property):
    html = to_html(ss.scan(smollm2, ss.texts("prose", prompts=8, length=128), progress=False))
    assert len(html.encode()) < 8_000_000
    page = open_page(html)
    waits = []
    for _ in range(4):  # the first also starts the browser's process; a busy machine delays some
        page.page.reload()
        page.page.wait_for_selector("html[data-ready]")
        waits.append(page.ready_after())
    record_property("ready_milliseconds", min(waits))
    print(f"{len(html.encode()) / 1e6:.1f} MB, ready after {[round(wait) for wait in waits]} ms")
    assert min(waits) < 3000
    quiet(page)
    page.page.locator('[data-view="map"]').scroll_into_view_if_needed()
    click_cell(page, 18, 7)
    page.page.wait_for_function("document.getElementById('layer').value === '18'")
    assert page.text("#chosen").startswith("Layer 18, head 7: sink attention [probability] 0.99")


def test_of_several_positions_drawn_as_one_the_largest_is_named_and_chosen(open_page):
    spike, length = 2002, 4096
    received = torch.full((4, 6, length), 1e-4)
    received[..., 0] = 0.5
    received[3, :, spike] = torch.linspace(0.3, 0.5, 6)
    norms = torch.ones(4, length)
    norms[3, spike + 1] = 40
    page = open_page(
        to_html(
            synthetic_report(positions=length, received_attention=received, residual_norm=norms)
        )
    )
    page.page.wait_for_selector("html[data-ready]")
    # The spike and the tick of position 2,000 are in one column.
    tick = """(({tickvals, ticktext}) => tickvals[ticktext.indexOf("2,000")])(
        document.querySelector('[data-view="positions"]').layout.xaxis)"""
    click_at(page, "positions", page.page.evaluate(tick), 3)
    assert page.text("#token-chosen").startswith(f"Position {spike}, ")
    said = page.page.locator('[data-view="positions"] .hoverlayer').text_content()
    first, last = map(int, re.search(r"layer 3, positions (\d+) to (\d+)", said).groups())
    assert first <= spike <= last and last - first < 20 and "0.4" in said
    page.page.fill("#layer", "3")
    page.page.keyboard.press("Tab")
    for view, at, height in (("received", spike, 0.2), ("residual", spike + 1, 1)):
        click_at(page, view, at, height)
        said = page.page.locator(f'[data-view="{view}"] .hoverlayer').text_content()
        first, last = map(int, re.search(r"positions (\d+) to (\d+)", said).groups())
        assert first <= at <= last
        assert page.text("#token-chosen").startswith(f"Position {at}, "), view
    quiet(page)


def test_of_many_prompts_the_page_holds_the_first_and_says_so(open_page):
    strong = 0.1 * torch.rand(150, 16, generator=torch.Generator().manual_seed(0))
    strong[140, 3], strong[7, 5] = 0.9, 0.8
    page = open_page(to_html(synthetic_report(prompts=150, received_peak=strong)))
    page.page.wait_for_selector("html[data-ready]")
    assert page.text("#prompts-held") == "The page holds the first 128 of 150 prompts."
    assert page.page.locator("#prompt option").count() == 128
    rows = page.page.locator('[data-table="tokens"] tbody tr')
    for row, place in ((0, ("3", "140")), (1, ("5", "7"))):  # prompt 140 is not held
        cells = rows.nth(row).locator("td")
        assert (cells.nth(0).inner_text(), cells.nth(2).inner_text()) == place
        rows.nth(row).click()
        assert page.page.input_value("#prompt") == ("0" if row == 0 else "7")
    assert page.text("#token-chosen").startswith("Position 5, ")
    assert "last quarter" in page.text('[data-table="tokens"]')
    quiet(page)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 32768])
def test_long_texts_open_without_freezing(open_page, length, record_property):
    report = synthetic_report(prompts=2, layers=16, heads=16, kv_heads=4, positions=length)
    html = to_html(report)
    page = open_page(html)
    page.page.wait_for_selector("html[data-ready]")
    quiet(page)
    record_property("megabytes", len(html) / 1e6)
    record_property("ready_milliseconds", page.ready_after())
    print(f"T = {length}: {len(html) / 1e6:.1f} MB, ready after {page.ready_after():.0f} ms")
    sink, others, _ = page.data("received")
    assert len(others["y"]) < 1200
    start = page.page.evaluate("[layer.value, head.value].map(Number)")
    values = report.received_attention[start[0], start[1]].numpy()
    assert sink["y"] == [pytest.approx(float(values[0]))]
    assert max(others["y"]) == pytest.approx(float(values[1:].max()))
    assert "Maxima of" in page.text('[data-view-card="received"]')
    page.page.click("#later")
    assert "positions 512 to 1023" in page.text("#span")
    page.page.locator('[data-view="map"]').scroll_into_view_if_needed()
    began = page.page.evaluate("performance.now()")
    click_cell(page, 3, 2)
    page.page.wait_for_function("document.getElementById('layer').value === '3'")
    took = page.page.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        f".then(() => performance.now() - {began})"
    )
    record_property("click_milliseconds", took)
    print(f"T = {length}: a click is drawn after {took:.0f} ms")
    assert took < 5000, "it freezes"
    assert page.data("received")[0]["y"][0] == pytest.approx(
        float(report.received_attention[3, 2, 0])
    )
