"""What the page's address holds, what leaves it, its colours, its numbers and its patterns."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch

from sinkscope.html.page import page, twins
from sinkscope.html.report_page import to_html
from sinkscope.output import number
from sinkscope.plot.theme import DARK, LIGHT
from sinkscope.report.headline import headline
from sinkscope.report.patterns import HeadPatterns
from tests.browser.pages import click_cell, plain_html, plain_report, quiet
from tests.browser.test_figures import all_figures


@functools.cache
def patterned() -> tuple[HeadPatterns, str]:
    """Patterns of two prompts in 16 cells, and the page that carries them."""
    draw = torch.Generator().manual_seed(3)
    kept = HeadPatterns(
        prompts=(0, 1),
        first=torch.arange(16),
        cells=torch.randint(0, 256, (2, 4, 6, 16, 16), generator=draw, dtype=torch.uint8),
        received=torch.rand(2, 4, 6, 16, generator=draw),
    )
    return kept, to_html(plain_report(), kept)


def test_it_opens_with_the_headline_and_large_numbers_and_folds_the_facts(opened):
    assert opened.text(".headline") == headline(plain_report())
    assert opened.page.locator(".numbers dd").count() == 4
    assert opened.page.locator("details[open]").count() == 0


def test_the_address_holds_head_prompt_metric_and_theme(opened):
    page = opened.page
    click_cell(opened, 3, 2)
    page.select_option("#metric", "honor")
    page.select_option("#prompt", "2")
    page.click("#theme")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert (page.input_value("#layer"), page.input_value("#head")) == ("3", "2")
    assert (page.input_value("#metric"), page.input_value("#prompt")) == ("honor", "2")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.evaluate("location.hash = '#layer=99&head=1&metric=nothing'")
    page.wait_for_function("document.getElementById('layer').value === '3'")
    assert (page.input_value("#head"), page.input_value("#metric")) == ("1", "honor")
    quiet(opened)


def test_a_row_brings_its_head_into_view_and_a_table_can_be_saved(opened):
    table = opened.page.locator('[data-table="heads"]')
    table.locator("tbody tr").nth(3).click()
    opened.page.wait_for_timeout(1500)  # it scrolls smoothly
    top = "document.getElementById('heads-title').getBoundingClientRect().top"
    assert abs(opened.page.evaluate(top)) < 40
    with opened.page.expect_download() as download:
        table.get_by_role("button", name="CSV").click()
    rows = download.value.path().read_text(encoding="utf-8").splitlines()
    assert rows[0].startswith("layer,head,sink attention [probability],")
    assert len(rows) == 25
    mean = plain_report().sink_attention.double().mean(0)
    for row in rows[1:]:
        layer, head, value = row.split(",")[:3]
        assert float(value) == pytest.approx(float(mean[int(layer), int(head)]), rel=1e-5)


def test_the_pattern_and_the_strip_are_the_chosen_heads(open_page):
    kept, html = patterned()
    opened = open_page(html)
    opened.page.wait_for_selector("html[data-ready]")
    click_cell(opened, 2, 5)
    drawn = np.array(opened.data("pattern")[0]["z"], dtype=float)
    seen = np.tril_indices(16)
    np.testing.assert_allclose(drawn[seen], kept.cells[0, 2, 5].numpy()[seen] / 255, atol=1e-6)
    assert np.isnan(drawn[np.triu_indices(16, 1)]).all()
    opened.page.select_option("#prompt", "1")
    opened.page.locator('#strip span[data-position="7"]').click()
    received = number(float(kept.received[1, 2, 5, 7]))
    assert f"attention received in the chosen head {received}," in opened.text("#token-chosen")
    small = opened.page.locator("#strongest button")
    assert small.count() == 12
    small.nth(4).click()
    order = np.argsort(-plain_report().sink_attention.double().mean(0).numpy().ravel())
    layer, head = divmod(int(order[4]), 6)
    assert (opened.page.input_value("#layer"), opened.page.input_value("#head")) == (
        str(layer),
        str(head),
    )
    quiet(opened)


def test_the_dark_twin_of_every_figure_is_the_figure_drawn_dark(open_page):
    """Figures are sent once: their colours, changed on the page, are those of the dark theme."""
    light, dark = (all_figures(theme) for theme in ("light", "dark"))
    specs = {}
    for name in light:
        pair = [json.loads(figure.to_json()) for figure in (light[name], dark[name])]
        for spec in pair:
            for gone in ("template", "sliders", "updatemenus"):  # none of a page's figures
                spec["layout"].pop(gone, None)
        specs[name] = pair
    opened = open_page(
        page("t", "a", "", {"figures": []}, ("experiment.js",)).replace(
            "startTheme();\ndrawAll", "globalThis.coloured = coloured;\nstartTheme();\ndrawAll"
        )
    )
    opened.page.wait_for_selector("html[data-ready]")
    for name, (one, other) in specs.items():
        assert opened.page.evaluate("spec => coloured(spec, 'dark')", one) == other, name


def test_each_light_colour_has_one_twin():
    assert twins()[LIGHT.sink] == DARK.sink and twins()[LIGHT.paper] == DARK.paper
    assert twins()[LIGHT.ink] == DARK.ink and twins()[LIGHT.grid] == DARK.grid


def test_the_page_writes_numbers_as_the_package_does(open_page):
    values = [0, 1.5, 0.30000001, 999.7, 1234.5, 123456, 1e-4, 0.000123456, 1.23e-5, -2.5e-7, -0.5]
    html = plain_html().replace("\nstart();", "\nglobalThis.number = number;\nstart();")
    opened = open_page(html)
    opened.page.wait_for_selector("html[data-ready]")
    for value in values:
        assert opened.page.evaluate("x => number(x)", value) == number(value)
    assert opened.page.evaluate("number(NaN)") == number(math.nan)
