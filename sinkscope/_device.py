"""The device that was asked for, if it is there."""

from __future__ import annotations

import torch

from sinkscope.errors import ModelError


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device; a GPU if there is one and none is named.

    Raises:
        ModelError: If it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # "meta" exists only in name
    except (RuntimeError, AssertionError) as error:  # torch says "no CUDA" with an assertion
        # A GPU may be there and only torch not see it; of other names torch lists all it knows.
        why = f" ({str(error).splitlines()[0]})" if str(device).startswith("cuda") else ""
        raise ModelError(f"There is no device {str(device)!r} here{why}; try 'cpu'.") from error
    return chosen
