"""The explorer's box for a prompt, whose button sends the text along with the click."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets


class PromptBox(anywidget.AnyWidget):
    """A box to type a prompt in, with a button to measure it.

    Attributes:
        disabled: Whether the button cannot be pressed.
    """

    _esm = Path(__file__).with_suffix(".js")
    disabled = traitlets.Bool(False).tag(sync=True)

    def on_sent(self, handle: Callable[[str], None]) -> None:
        """Call this with the text that was in the box, whenever the button is pressed."""

        def heard(_widget: Any, content: dict[str, Any], _buffers: Any) -> None:
            handle(content["text"])

        self.on_msg(heard)
