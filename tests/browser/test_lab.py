"""The explorer in JupyterLab: a click on the head map runs Python and moves the linked figures."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinkscope.models.packaged import packaged_models
from tests.report.factory import synthetic_report

pytestmark = pytest.mark.slow

LESSON = Path(__file__).parents[2] / "notebooks" / "01_what_is_an_attention_sink.ipynb"

CODE = """
import sinkscope as ss
report = ss.load_report("report.nc")
explorer = ss.explore(report)
explorer
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_notebook(path: Path) -> None:
    cell = dict(
        cell_type="code", id="one", metadata={}, execution_count=None, outputs=[], source=CODE
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """Address of a JupyterLab in a folder with a report, a notebook and a lesson."""
    pytest.importorskip("jupyterlab", reason="pip install 'sinkscope[notebook]'")
    synthetic_report(prompts=3).save(tmp_path / "report.nc")
    write_notebook(tmp_path / "explore.ipynb")
    shutil.copy(LESSON, tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    settings = {
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "IdentityProvider.token": "",
        "ServerApp.root_dir": tmp_path,
        "LabApp.news_url": "",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    command += [f"--{name}={value}" for name, value in settings.items()]
    own = {name: str(tmp_path / ".jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **own, "PYTHONPATH": path}, stdout=log, stderr=log
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}/lab/tree"
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:  # it waits for its kernel
                server.kill()
                server.wait()
    shutil.rmtree(tmp_path / ".jupyter", ignore_errors=True)


def wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, "JupyterLab ended before it answered"
            time.sleep(0.5)
    raise AssertionError("JupyterLab did not answer within two minutes")


def wait_for_kernel(page: Any) -> None:
    page.wait_for_selector(".jp-CodeCell .jp-InputArea-editor", timeout=240_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=240_000)


def run_first_cell(page: Any) -> None:
    """Run it, again if JupyterLab let the first try fall: it says idle before it is connected."""
    from playwright.sync_api import TimeoutError

    wait_for_kernel(page)
    for _ in range(40):
        if page.locator(".jp-Dialog").count():  # it asks for a kernel if that was slow to start
            page.keyboard.press("Enter")
            page.wait_for_timeout(500)
        try:
            page.click(".jp-CodeCell .jp-InputArea-editor", timeout=3_000)
        except TimeoutError:
            continue
        page.keyboard.press("Control+Enter")
        for _ in range(10):
            if page.text_content(".jp-CodeCell .jp-InputPrompt").strip() not in ("", "[ ]:"):
                return
            page.wait_for_timeout(500)
    raise AssertionError("JupyterLab did not begin to run the cell")


def titles(page: Any) -> list[str]:
    return page.evaluate(
        """[...document.querySelectorAll(".js-plotly-plot")]
            .map(one => one._fullLayout.title.text)"""
    )


def opened(chromium: Any, address: str, height: int) -> tuple[Any, list[str]]:
    """A page of JupyterLab, and what it fetched from elsewhere."""
    page = chromium.new_context(viewport={"width": 1500, "height": height}).new_page()
    elsewhere: list[str] = []
    own = (address.split("/lab")[0], "data:", "blob:")
    page.on(
        "request",
        lambda request: None if request.url.startswith(own) else elsewhere.append(request.url),
    )
    page.goto(address)
    return page, elsewhere


@pytest.mark.real
def test_a_lesson_runs_and_shows_its_figures(lab, chromium):
    if not any(model.name == "smollm2-135m" and model.ready for model in packaged_models()):
        pytest.skip("sinkscope models install smollm2-135m")
    # All cells must be in sight: JupyterLab draws no others.
    page, elsewhere = opened(chromium, f"{lab}/{LESSON.name}", height=12_000)
    run_first_cell(page)
    for key in ("Escape", "Control+a", "Control+Enter"):  # all cells
        page.keyboard.press(key)
    last = "text=Exercise 5: put your answer in the place of None."
    page.wait_for_selector(last, timeout=600_000)
    page.wait_for_function(
        "document.querySelectorAll('.js-plotly-plot .gtitle').length === 9", timeout=60_000
    )
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert elsewhere == []
    page.context.close()


def test_click_on_the_map_moves_the_linked_figures(lab, chromium):
    page, elsewhere = opened(chromium, f"{lab}/explore.ipynb", height=1400)
    run_first_cell(page)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=300_000)
    page.wait_for_function(
        "document.querySelectorAll('.js-plotly-plot .gtitle').length === 5", timeout=240_000
    )
    assert page.locator(".jp-OutputArea-output[data-mime-type*='stderr']").count() == 0

    place = page.evaluate(
        """() => {
            const map = document.querySelector('.js-plotly-plot');
            const {xaxis, yaxis} = map._fullLayout;
            const {left, top} = map.getBoundingClientRect();
            return [left + xaxis._offset + xaxis.d2p(4), top + yaxis._offset + yaxis.d2p(2)];
        }"""
    )
    page.mouse.move(*place)
    page.wait_for_timeout(300)  # Plotly rate-limits hovering, and clicks what is hovered
    page.mouse.click(*place)
    page.wait_for_function(
        """[...document.querySelectorAll('.js-plotly-plot')].some(
            one => one._fullLayout.title.text === 'Received attention: layer 2, head 4')""",
        timeout=60_000,
    )
    page.wait_for_function(
        """[...document.querySelectorAll('.js-plotly-plot')].some(
            one => one._fullLayout.title.text === 'Residual norm: layer 2')""",
        timeout=60_000,
    )
    assert "Value norm: layer 2, KV head 1" in titles(page)
    assert elsewhere == []
    page.context.close()
