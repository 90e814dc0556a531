"""Where a model came from: what a report needs to say which weights it measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sinkscope.models.packaged import sha256
from sinkscope.prompts.tokens import Texts

_COLUMNS = 4


def dtype_of(model: Any) -> str:
    """The weights' dtype, as `Settings.dtype` says it."""
    return str(next(model.original_model.parameters()).dtype).removeprefix("torch.")


def weights_of(model: Any) -> str:
    """A hash of a few numbers of every row of every weight."""
    content = hashlib.sha256()
    for weight in getattr(model, "original_model", model).parameters():
        content.update(repr(tuple(weight.shape)).encode())
        if not weight.is_meta:
            rows = weight.detach() if weight.ndim < 2 else weight.detach().flatten(1)[:, :_COLUMNS]
            content.update(digest_of(rows).encode())
    return content.hexdigest()[:16]


def digest(texts: Texts) -> str:
    """A hash of exact token ids and mask."""
    return digest_of(texts.tokens.long(), texts.mask.long())


def digest_of(*tensors: Tensor) -> str:
    """A hash of exact numbers and of their shapes."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(repr(tuple(tensor.shape)).encode())
        content.update(tensor.double().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


_KEY = "sinkscope_source"


@dataclass(frozen=True)
class ModelSource:
    """Provenance of a loaded model.

    Attributes:
        name: The name, hub id or path as the user gave it; the class for a model in memory.
        kind: "packaged", "hub", "folder", "gguf", "memory" or "bridge".
        known_revision: Commit of a hub model, or the known hash of a packaged one.
        trained_head: Whether the output head was in the checkpoint, so that logits and losses mean
            something.
        weights: The files that `revision` hashes if no revision is known.
    """

    name: str
    kind: str
    known_revision: str = ""
    trained_head: bool = True
    weights: tuple[Path, ...] = ()

    @cached_property
    def revision(self) -> str:
        """Commit, or "sha256:…" of the weights; "" where there is neither.

        The files are hashed when this is first asked for. Of several files it is the hash of their
        names and hashes.
        """
        if self.known_revision or not self.weights:
            return self.known_revision
        if len(self.weights) == 1:
            return f"sha256:{sha256(self.weights[0])}"
        lines = "".join(f"{sha256(path)}  {path.name}\n" for path in self.weights)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


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
