"""A model's weights in low precision, by torchao's own configs (github.com/pytorch/ao).

The weights of the blocks' linear layers are stored as integers with scales, and the products with
them are torchao's. Embeddings, norms and the output head stay as they are, and so does everything
outside the context manager.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sinkscope.errors import UnsupportedError
from sinkscope.validation import one_of

GROUP = 32
WEIGHTS = ("int8-channel", f"int4-group{GROUP}")
"""int8 with one scale for each output channel; int4 with one for 32 inputs of one."""


@contextmanager
def quantised_weights(model: Any, scheme: str, run: Callable[[], Any]) -> Iterator[None]:
    """Inside, the blocks' linear layers have weights that torchao has quantised.

    Args:
        model: A bridge.
        scheme: Of `WEIGHTS`.
        run: A short forward pass, in which every quantised layer has to be called.

    Raises:
        UnsupportedError: If torchao is not installed, a block has weights that are not those of a
            linear layer, or the model does not call one of these layers.
    """
    config, quantise = _torchao(one_of("weights", scheme, WEIGHTS, error=UnsupportedError))
    layers = linear_layers(model)
    called: set[str] = set()
    with ExitStack() as undo:
        for name, layer in layers.items():
            _check_groups(name, layer, scheme)
            undo.callback(_restore, layer, layer.weight, dict(vars(layer)))
            quantise(layer, config)
        with ExitStack() as watched:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                watched.callback(hook.remove)
            run()
        if idle := [name for name in layers if name not in called]:
            raise UnsupportedError(
                f"{model.cfg.architecture} reads the weights of {idle[0]} without calling it, so "
                "that torchao's would not count; leave out weights."
            )
        yield


def _torchao(scheme: str) -> tuple[Any, Callable[..., Any]]:
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )
    except ImportError as error:
        raise UnsupportedError(
            "Weights are quantised by torchao, which is not installed: pip install "
            "'sinkscope[adapters]', or leave out weights."
        ) from error
    if scheme == WEIGHTS[0]:
        return Int8WeightOnlyConfig(), quantize_
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)), quantize_


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a bridge's blocks, by name.

    Raises:
        UnsupportedError: If a block has a matrix that is not the weight of one.
    """
    layers: dict[str, nn.Linear] = {}
    known: set[int] = set()
    for index, block in enumerate(model.blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and id(module) not in known:
                known |= {id(module), id(module.weight)}
                layers[f"block {index}, {name}"] = module
        for name, x in block.named_parameters():
            if x.ndim > 1 and id(x) not in known:
                raise UnsupportedError(
                    f"{model.cfg.architecture} has weights that are not those of a linear layer "
                    f"({name} of block {index}), which torchao leaves as they are; leave out "
                    "weights."
                )
    return layers


def _check_groups(name: str, layer: nn.Linear, scheme: str) -> None:
    if scheme != WEIGHTS[0] and math.gcd(layer.in_features, GROUP) != GROUP:
        raise UnsupportedError(
            f"{scheme} takes {GROUP} inputs at a time, and {name} has {layer.in_features}; choose "
            f"{WEIGHTS[0]}."
        )


def _restore(layer: nn.Linear, weight: nn.Parameter, before: dict[str, Any]) -> None:
    """The layer's own weight, and nothing else that torchao wrote on it."""
    layer.weight = weight
    for name in set(vars(layer)) - set(before):
        del layer.__dict__[name]
