"""Which hooks somebody has put on a model."""

from __future__ import annotations

from typing import Any


def hooked(model: Any) -> set[str]:
    """Names of the hook points with hooks on them, permanent ones (the model's own) left out.

    Every intervention shows here but one that edits weights (`PositionEmbeddingEdit`), which
    `_partial.weights_of` tells apart.
    """
    return {
        name
        for name, point in model.hook_dict.items()
        if any(not handle.is_permanent for handle in point.fwd_hooks)
    }
