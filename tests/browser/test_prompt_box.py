"""The explorer's prompt box in a browser: what a click sends."""

from __future__ import annotations

import base64
from typing import Any

import pytest

pytest.importorskip("anywidget", reason="pip install 'sinkscope[notebook]'")

RENDER = """async (source) => {
    const {default: widget} = await import(`data:text/javascript;base64,${source}`);
    const heard = {};
    window.sent = [];
    window.state = {disabled: false};
    window.changed = () => heard["change:disabled"]();
    const model = {
        get: (name) => state[name],
        on: (event, handle) => { heard[event] = handle; },
        off: () => {},
        send: (message) => sent.push(message),
    };
    widget.render({model, el: document.body});
}"""


def test_a_click_sends_what_is_in_the_box(chromium: Any) -> None:
    from sinkscope.explorer.widgets import PromptBox

    page = chromium.new_page()
    page.goto("about:blank")
    page.evaluate(RENDER, base64.b64encode(str(PromptBox._esm).encode()).decode())
    page.fill("textarea", "first")
    page.click("button")
    page.focus("textarea")
    page.keyboard.type(" and more")
    page.click("button")
    assert page.evaluate("sent") == [{"text": "first"}, {"text": "first and more"}]
    page.evaluate("state.disabled = true; changed()")
    assert page.is_disabled("button")
    page.close()
