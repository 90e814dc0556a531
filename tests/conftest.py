"""Fixtures for all tests: packaged models, offline, or a skip that says how to get them."""

from __future__ import annotations

import os
import signal

# Before anything imports a hub client: tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

from tests import checked

checked.install()


def packaged(name: str):
    """A packaged model, or a skip; in CI its absence is a failure."""
    from sinkscope.errors import ModelError
    from sinkscope.models.load import load_model

    try:
        return load_model(name)
    except ModelError as error:
        if os.environ.get("SINKSCOPE_REQUIRE_MODELS"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct on the CPU; treat as read-only."""
    return packaged("smollm2-135m")


@pytest.fixture(scope="session")
def minilm():
    """MiniLM-L6 on the CPU; treat as read-only."""
    return packaged("minilm-l6")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C interrupts also in a run that a script put into the background, as it would not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip themselves where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
