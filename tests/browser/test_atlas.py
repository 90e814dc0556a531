"""The atlas of a sweep as people see it: 200 rows, sorted, filtered, opened, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinkscope.html.atlas_page import to_html
from tests.report.factory import synthetic_report

ROWS = 200


@pytest.fixture(scope="module")
def rows() -> list:
    made = []
    for index in range(ROWS):
        report = synthetic_report(
            seed=index, layers=3 + index % 4, settings=dict(n_layers=3 + index % 4)
        )
        columns = dict(
            model=f"model <{index // 20}>", checkpoint=index % 20 * 1000,
            texts=("prose", "code")[index % 2], length=64, intervention="none", experiment="scan",
        )  # fmt: skip
        made.append((columns, report, f"reports/{index}.html" if index == 7 else None))
    return made


@pytest.fixture(scope="module")
def html(rows) -> str:
    return to_html(rows, "10 models · T = 64 · prose, code")


def numbers(page, column: str) -> list[float]:
    titles = page.locator("#atlas thead th").all_inner_texts()
    at = next(i for i, title in enumerate(titles) if title.startswith(column))
    cells = page.locator(f"#atlas tbody tr.link td:nth-child({at + 1})").all_inner_texts()
    return [float(cell.replace(",", "")) for cell in cells]


def test_rows_sort_and_filter(open_page, html: str, rows) -> None:
    opened = open_page(html)
    page = opened.page
    assert opened.said == [] and opened.requests == []
    assert page.locator("#atlas tbody tr.link").count() == ROWS
    assert page.locator("#count").inner_text() == "200 of 200 reports"
    titles = page.locator("#atlas thead th").all_inner_texts()
    assert titles[:4] == ["heads", "model", "checkpoint", "texts"]  # what does not vary is left out
    page.locator("#atlas thead button", has_text="sink attention").click()
    values = numbers(page, "sink attention [")
    expected = sorted((float(r.sink_attention.double().mean()) for _, r, _ in rows), reverse=True)
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(expected, abs=1e-3)
    page.locator("#atlas thead button", has_text="sink attention").click()
    assert numbers(page, "sink attention [") == sorted(values)
    page.get_by_label("texts").select_option("code")
    assert page.locator("#count").inner_text() == "100 of 200 reports"
    page.get_by_label("Filter").fill("<3>")
    assert page.locator("#count").inner_text() == "10 of 200 reports"
    assert set(numbers(page, "checkpoint")) == {1000.0 * step for step in range(1, 20, 2)}
    assert opened.said == [] and opened.requests == []


def test_a_row_opens_with_its_head_map_and_the_way_to_its_report(open_page, html, rows) -> None:
    opened = open_page(html)
    page = opened.page
    page.locator("#atlas tbody tr.link").nth(7).click()
    box = page.locator(".open")
    assert "synthetic has a" in box.inner_text()
    assert box.get_by_role("link").get_attribute("href") == "reports/7.html"
    canvas = box.locator("canvas")
    mean = rows[7][1].mean("sink_attention")
    size = canvas.bounding_box()
    layers, heads = mean.shape
    canvas.hover(position={"x": size["width"] * 2.5 / heads, "y": size["height"] * 1.5 / layers})
    said = box.locator(".about").inner_text()
    assert said == f"layer 1, head 2: sink attention {float(mean[1, 2]):.2f}"
    page.locator("#atlas tbody tr.link button").nth(7).press("Enter")
    assert page.locator(".open").count() == 0
    page.locator("#atlas tbody tr.link").nth(8).click()
    assert page.locator(".open").get_by_role("link").count() == 0
    assert opened.said == [] and opened.requests == []


def test_an_opened_row_is_read_on_a_phone_without_scrolling(open_page, html, tmp_path) -> None:
    opened = open_page(html, width=390, height=844)
    page = opened.page
    page.locator("#atlas tbody tr.link").nth(7).click()
    box = page.locator(".open").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.locator(".atlas .scroll").evaluate("place => place.scrollLeft = 300")
    assert page.locator(".open p").first.bounding_box()["x"] >= 0
    page.screenshot(path=tmp_path / "atlas-phone.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page, html: str, scheme: str, tmp_path: Path) -> None:
    opened = open_page(html, color_scheme=scheme)
    page = opened.page
    seen = page.evaluate(
        "[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]"
    )
    assert seen == [scheme, "rgb(244, 245, 247)" if scheme == "light" else "rgb(13, 16, 20)"]
    page.locator("#atlas tbody tr.link").nth(3).click()
    page.screenshot(path=tmp_path / f"atlas-{scheme}.png")
    page.get_by_role("button", name="Dark" if scheme == "light" else "Light").click()
    assert page.locator("#atlas tbody tr.link").count() == ROWS
    assert opened.said == [] and opened.requests == []


def test_what_is_undefined_is_a_dash(open_page) -> None:
    report = synthetic_report(sink_attention=torch.full((3, 4, 6), torch.nan))
    columns = dict(model="one", checkpoint=None, texts="prose", length=8)
    opened = open_page(to_html([(columns, report, None), (columns, synthetic_report(), None)], ""))
    first, second = opened.page.locator("#atlas tbody tr.link").all_inner_texts()
    assert "–" in first and "–" not in second.split("one")[1].split("\t")[1]
    assert opened.said == []
