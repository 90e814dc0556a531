"""The one-file report in a real browser, from disk, with the network off."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.plot import to_html
from sinkscope.report import SinkReport
from tests.browser.conftest import Opened
from tests.unit.report_factory import only, synthetic_report

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


@functools.cache
def plain_report() -> SinkReport:
    return synthetic_report(prompts=4)


@functools.cache
def plain_html() -> str:
    return to_html(plain_report())


@pytest.fixture
def opened(open_page) -> Opened:
    page = open_page(plain_html())
    page.page.wait_for_selector("html[data-ready]")
    return page


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


def test_opens_quietly_and_starts_at_the_strongest_head(opened, record_property):
    quiet(opened)
    milliseconds = opened.ready_after()
    record_property("ready_milliseconds", milliseconds)
    print(f"ready after {milliseconds:.0f} ms")
    mean = plain_report().sink_attention.mean(0)
    layer, head = divmod(int(mean.argmax()), 6)
    assert opened.text("#chosen").startswith(f"Layer {layer}, head {head}: sink attention")
    sink, others, _ = opened.data("received")
    received = plain_report().received_attention[layer, head].tolist()
    assert sink["y"] + others["y"] == pytest.approx(received)


def test_click_on_the_map_changes_every_linked_figure(opened):
    report = plain_report()
    opened.page.locator('[data-view="map"]').scroll_into_view_if_needed()
    click_cell(opened, 3, 2)
    opened.page.wait_for_function("document.getElementById('layer').value === '3'")
    assert opened.page.input_value("#head") == "2"
    drawn = {name: opened.data(name) for name in ("received", "values", "residual", "queries")}
    for name, expected in {
        "received": report.received_attention[3, 2],
        "values": report.value_norm[3, 0],  # heads 0 to 2 share KV head 0
        "residual": report.residual_norm[3],
    }.items():
        sink, others = drawn[name][:2]
        assert sink["y"] + others["y"] == pytest.approx(expected.tolist()), name
    assert drawn["queries"][0]["y"] == pytest.approx(report.received_by_distance[3, 2].tolist())
    headings = opened.page.locator("h3 [data-where]").all_inner_texts()
    assert headings == [
        "layer 3, head 2", "layer 3, KV head 0", "layer 3", "layer 3, head 2",
    ]  # fmt: skip
    quiet(opened)


def test_value_norms_follow_the_head_within_a_layer(opened):
    report = plain_report()
    opened.page.fill("#layer", "2")
    for head in ("1", "5"):
        opened.page.fill("#head", head)
        opened.page.keyboard.press("Tab")
        sink, others = opened.data("values")[:2]
        expected = report.value_norm[2, int(head) // 3].tolist()
        assert sink["y"] + others["y"] == pytest.approx(expected), head


def test_hover_shows_value_unit_and_interval(opened):
    opened.page.locator('[data-view="map"]').scroll_into_view_if_needed()
    click_cell(opened, 1, 4)
    hover = opened.page.locator('[data-view="map"] .hoverlayer').text_content()
    low, high = (float(end[1, 4]) for end in plain_report().interval("sink_attention")[1:])
    found = re.search(
        r"layer 1, head 4.*sink attention: ([\d.]+) probability"
        r".*95 % interval: ([\d.]+) to ([\d.]+)",
        hover,
    )
    mean = float(plain_report().sink_attention[:, 1, 4].mean())
    assert float(found[1]) == pytest.approx(mean, rel=1e-3)
    assert float(found[2]) == pytest.approx(low, abs=0.02)  # the page draws fewer resamples
    assert float(found[3]) == pytest.approx(high, abs=0.02)


def test_threshold_counts_heads_and_empties_the_others(opened):
    mean = plain_report().sink_attention.double().mean(0).numpy()
    assert opened.text("#count").startswith(f"{(mean > 0.3).sum()} of 24 heads")
    opened.page.locator("#epsilon").fill("0.62")
    assert opened.text("#count").startswith(f"{(mean > 0.62).sum()} of 24 heads")
    empty = opened.data("map")[1]["z"]
    below = np.array([[cell == 1 for cell in row] for row in empty])
    np.testing.assert_array_equal(below, mean <= 0.62)
    quiet(opened)


def test_a_figure_without_a_threshold_says_so(opened):
    opened.page.select_option("#metric", "attention_entropy")
    assert opened.text("#count") == "24 heads, no threshold"
    opened.page.locator("#epsilon").fill("2")
    entropy = plain_report().attention_entropy.double().mean(0)
    assert opened.text("#count").startswith(f"{int((entropy > 2).sum())} of 24 heads")
    opened.page.select_option("#metric", "value_drain_out")
    assert "_" not in opened.text("#metric-about").replace("W_O", "")


def test_screen_readers_are_told_what_each_figure_is(opened):
    names = opened.page.locator(".figure").evaluate_all(
        """all => all.map(one => [one.getAttribute("role"), one.getAttribute("aria-label")
            ?? document.getElementById(one.getAttribute("aria-labelledby")).textContent])"""
    )
    assert len(names) > 8 and all(role in ("img", "application") and name for role, name in names)
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
        page.page.select_option("#quantity", "1")
        assert page.page.text_content("#few") == ""


def test_every_metric_can_be_chosen(opened):
    report = plain_report()
    names = opened.page.locator("#metric option").evaluate_all("all => all.map(one => one.value)")
    assert names[0] == "sink_attention" and "value_drain" in names
    for name in names:
        opened.page.select_option("#metric", name)
        drawn = np.array(opened.data("map")[0]["z"])
        np.testing.assert_allclose(drawn, report.mean(name).numpy(), rtol=1e-5, err_msg=name)
    quiet(opened)


def test_arrow_keys_move_over_the_map_and_stop_at_its_edge(opened):
    opened.page.fill("#layer", "0")
    opened.page.fill("#head", "5")
    opened.page.focus('[data-view="map"]')
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        opened.page.keyboard.press(key)
    assert opened.text("#chosen").startswith("Layer 2, head 3:")
    quiet(opened)


def test_number_fields_are_kept_within_the_model(opened):
    opened.page.fill("#layer", "99")
    opened.page.keyboard.press("Tab")
    assert opened.text("#chosen").startswith("Layer 3,")


def test_token_choice_marks_the_position_in_the_figures(opened):
    opened.page.select_option("#prompt", "2")
    token = opened.page.locator('#strip span[data-position="5"]')
    assert token.inner_text() == plain_report().token_text[2][5]
    token.click()
    assert token.get_attribute("aria-selected") == "true"
    assert opened.text("#token-chosen").startswith("Position 5, ")
    shapes = opened.page.evaluate(
        """document.querySelector('[data-view="received"]').layout.shapes.map(one => one.x0)"""
    )
    assert shapes == [11.5, 5], "the last quarter, which few queries see, and the position"
    opened.page.keyboard.press("Escape")
    opened.page.focus("#strip")
    opened.page.keyboard.press("ArrowRight")
    assert opened.text("#token-chosen").startswith("Position 6, ")
    quiet(opened)


def test_log_scale_is_kept_from_head_to_head(opened):
    opened.page.locator('[data-log="received"]').check()
    opened.page.fill("#layer", "1")
    opened.page.keyboard.press("Tab")
    axis = """document.querySelector('[data-view="received"]')._fullLayout.yaxis.type"""
    assert opened.page.evaluate(axis) == "log"


def test_table_sorts_and_its_rows_choose_heads(opened):
    report = plain_report()
    table = opened.page.locator('[data-table="heads"]')
    entropy = report.attention_entropy.double().mean(0).numpy()
    column = table.locator("th").all_inner_texts().index("attention entropy [nat]")
    table.locator("th button").nth(column).click()
    shown = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
    assert len(shown) == 20
    largest = sorted(entropy.ravel(), reverse=True)[:20]
    assert [float(x) for x in shown] == pytest.approx(largest, rel=6e-3)
    table.locator("th button").nth(column).click()
    assert table.locator("th").nth(column).get_attribute("aria-sort") == "ascending"
    table.get_by_role("button", name="Show all 24").click()
    assert table.locator("tbody tr").count() == 24
    table.locator("tbody tr").first.click()
    layer, head = divmod(int(entropy.argmin()), 6)
    assert opened.text("#chosen").startswith(f"Layer {layer}, head {head}:")


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
    assert key.inner_text() == "Prompt 0, mean received attention [probability], logarithmic:"
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
    assert len(on_paper) > 5 and all(500 < width <= 680 for width in on_paper), "A4 and Letter"
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.page.get_attribute("html", "data-theme") == "dark"
    assert max(page.page.evaluate(widths)) > 1000, "as wide as the window again"
    assert len(page.page.pdf()) > 50_000


def test_no_figure_can_be_uploaded(opened):
    titles = opened.page.locator(".modebar-btn").evaluate_all(
        "all => all.map(one => one.getAttribute('data-title') || one.dataset.name)"
    )
    assert titles
    assert not [title for title in titles if re.search("chart|cloud|share", title, re.I)]


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
    assert page.page.locator("h2").first.inner_text() == "Summary"


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
    for row, prompt in ((0, 140), (1, 7)):  # the first is not held: nothing to show of it
        assert rows.nth(row).locator("td").first.inner_text() == str(prompt)
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
