"""Launching Triton kernels where the tensors lie."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Launch = TypeVar("Launch", bound=Callable[..., Any])


def on_its_device(launch: Launch) -> Launch:
    """Run a function on the GPU of its first tensor: Triton launches on the current one.

    The layers of one model may lie on several.
    """

    @functools.wraps(launch)
    def run(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launch(x, *args, **options)
        with torch.cuda.device(x.device):
            return launch(x, *args, **options)

    return run  # type: ignore[return-value]
