"""Headless Chromium for the tests of pages and figures as people see them.

Debian: ``apt install chromium``; the driver: ``pip install playwright``. It is not downloaded by
the tests. Where it is missing they skip with that hint; SINKSCOPE_REQUIRE_BROWSER=1 makes it a
failure, as in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import plain_html

ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = (
    "headless Chromium is missing: apt install chromium (or set SINKSCOPE_CHROMIUM to a Chrome), "
    "and pip install playwright"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


def missing() -> None:
    if os.environ.get("SINKSCOPE_REQUIRE_BROWSER") == "1":
        pytest.fail(HINT, pytrace=False)
    pytest.skip(HINT)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = os.environ.get("SINKSCOPE_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if path is None:
        missing()
    return str(path)


@pytest.fixture(scope="session")
def chromium(chromium_path: str) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium_path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page with everything it said and asked for.

    Attributes:
        page: Playwright's page.
        said: Console messages and uncaught errors.
        requests: What it tried to fetch beside the file itself.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def data(self, view: str) -> list[dict[str, Any]]:
        """Traces that Plotly drew in a view; typed arrays as lists."""
        script = """name => document.querySelector(`[data-view="${name}"]`).data.map(trace =>
            JSON.parse(JSON.stringify(trace, (_, x) =>
                ArrayBuffer.isView(x) ? Array.from(x, v => Number.isNaN(v) ? null : v) : x)))"""
        return self.page.evaluate(script, view)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def ready_after(self) -> float:
        """Milliseconds from the start of the navigation until everything was drawn."""
        return float(self.page.get_attribute("html", "data-ready"))


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens HTML from disk with the network off."""
    contexts = []

    def opener(html: str, *, width: int = 1280, height: int = 900, **options: Any) -> Opened:
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = chromium.new_context(
            offline=True, viewport={"width": width, "height": height}, **options
        )
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on(
            "request",
            lambda request: (
                None if request.url == path.as_uri() else opened.requests.append(request.url)
            ),
        )
        opened.page.goto(path.as_uri())
        return opened

    yield opener
    for context in contexts:
        context.close()


@pytest.fixture
def opened(open_page: Callable[..., Opened]) -> Opened:
    """The page of a plain report, drawn."""
    page = open_page(plain_html())
    page.page.wait_for_selector("html[data-ready]")
    return page
