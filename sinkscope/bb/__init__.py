"""The Bigram-Backcopy laboratory: grow an attention sink from nothing (Guo et al. 2024).

`train` a small transformer on the exact task, watch sink, drain and peak appear (`dynamics`), hold
one of them still (`reinforcement`), try the cures (`compare`), and measure any of these models with
the rest of sinkscope (`to_bridge`). See README.md beside this file for what was found.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BigramSource": "source",
    "BigramBackcopy": "task",
    "Batches": "task",
    "ATTENTIONS": "operators",
    "ModelConfig": "config",
    "BackcopyTransformer": "model",
    "OPTIMIZERS": "config",
    "TrainConfig": "config",
    "Run": "training",
    "train": "training",
    "load_model": "training",
    "Phenomena": "measurement",
    "measure": "measurement",
    "knockouts": "knockout",
    "dynamics": "curves",
    "reinforcement": "curves",
    "fit_growth": "growth",
    "growth_laws": "growth",
    "compare": "comparison",
    "summarise": "comparison",
    "to_bridge": "bridge",
    "load_packaged": "packaged",
    "packaged_task": "packaged",
    "packaged_recipe": "packaged",
    "task_texts": "packaged",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
