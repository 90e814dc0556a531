"""What one chooses on the one-file report: in a real browser, from disk, with the network off."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.browser.pages import click_cell, plain_report, quiet


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


def test_every_metric_can_be_chosen(opened):
    report = plain_report()
    names = opened.page.locator("#metric option").evaluate_all("all => all.map(one => one.value)")
    assert names[0] == "sink_attention" and "value_drain" in names
    for name in names:
        opened.page.select_option("#metric", name)
        drawn = np.array(opened.data("map")[0]["z"])
        if report.variables()[name].unit == "ratio":  # coloured by its logarithm
            drawn = 10**drawn
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
