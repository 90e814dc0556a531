"""Where a model came from: what a report needs to say which weights it measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_KEY = "sinkscope_source"


@dataclass(frozen=True)
class ModelSource:
    """Provenance of a loaded model.

    Attributes:
        name: The name, hub id or path as the user gave it; the class for a model in memory.
        kind: "packaged", "hub", "folder", "gguf", "memory" or "bridge".
        revision: Commit of a hub model or "sha256:…" of the weights' file; "" where unknown.
        trained_head: Whether the output head was in the checkpoint, so that logits and losses mean
            something.
    """

    name: str
    kind: str
    revision: str = ""
    trained_head: bool = True


def attach_source(bridge: Any, source: ModelSource) -> None:
    """Remember ``source`` on the bridge itself, so that copies of the bridge know it too."""
    bridge.__dict__[_KEY] = source


def model_source(bridge: Any) -> ModelSource:
    """Where a bridge's weights came from; what the bridge says of itself if it was not loaded here.

    Args:
        bridge: A TransformerBridge.
    """
    known = bridge.__dict__.get(_KEY)
    return known or ModelSource(name=str(bridge.cfg.model_name), kind="bridge")
