"""Weights quantised by torchao, where it is installed, against plain models with dense weights."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import UnsupportedError
from sinkscope.experiments.precision import precision
from sinkscope.experiments.quantised_weights import WEIGHTS, quantised_weights

from ..families.architectures import BY_NAME, Family
from ..models.test_adapters import library
from .test_precision import predictions

# What torchao warns of is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def wide(name: str) -> Family:
    """A tiny family whose inner widths are multiples of 32."""
    family = BY_NAME[name]
    return dataclasses.replace(family, settings=dict(family.settings) | {"intermediate_size": 64})


def dense(family: Family) -> dict[str, torch.nn.Module]:
    """A plain model whose blocks have the weights that the integers stand for, by torchao alone."""
    torchao = library("torchao.quantization")
    configs = {
        "int8-channel": torchao.Int8WeightOnlyConfig(),
        "int4-group32": torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(32)
        ),
    }
    models = {}
    for name, config in configs.items():
        plain = family.build()
        other = copy.deepcopy(plain)
        torchao.quantize_(other, config)
        stored = dict(other.named_modules())
        with torch.no_grad():
            for where, module in plain.named_modules():
                if isinstance(module, torch.nn.Linear) and ".layers." in where:
                    module.weight.copy_(stored[where].weight.dequantize())
        models[name] = plain
    return models


def test_the_losses_are_those_of_the_weights_that_torchao_stores() -> None:
    family = wide("llama")
    models = dense(family)
    tokens = family.tokens(prompts=2, length=10)
    bridge = ss.load_model(family.build())
    before = {name: x.clone() for name, x in bridge.original_model.named_parameters()}
    found = precision(
        bridge, ss.token_ids(tokens), schemes="int8-token", tensors="value", sinks=0, first=[],
        mapped=None, weights=WEIGHTS, progress=False,
    )  # fmt: skip
    assert found.weights == list(WEIGHTS)
    full, _ = predictions(family.build(), tokens)
    for at, scheme in enumerate(WEIGHTS):
        now, loss = predictions(models[scheme], tokens)
        kl = (full.exp() * (full - now)).sum(-1).mean(1)
        assert kl.min() > 1e-6
        torch.testing.assert_close(found["weight_loss"][at].double(), loss, atol=1e-4, rtol=0)
        got = found["weight_divergence"][at].double()
        torch.testing.assert_close(got, kl, atol=1e-5, rtol=1e-2)
        assert f"{scheme} perplexity" in found.summary()
    frame = found.to_frame()
    assert sorted(frame.loc[frame["what"] == "weights", "scheme"].unique()) == sorted(WEIGHTS)
    after = dict(bridge.original_model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items()), "the model is as it was"


def test_weights_that_torchao_leaves_as_they_are_are_refused() -> None:
    library("torchao.quantization")
    bridge = ss.load_model(BY_NAME["gpt2"].build())
    with (
        pytest.raises(UnsupportedError, match="not those of a linear layer"),
        quantised_weights(bridge, "int8-channel", lambda: None),
    ):
        pass
    fused = BY_NAME["gpt_neox"]  # the bridge reads its fused projection in three parts
    with pytest.raises(UnsupportedError, match="qkv.* without calling it"):
        precision(
            fused.build(), ss.token_ids(fused.tokens(prompts=2, length=6)), schemes="int8-token",
            tensors="value", sinks=0, first=[], mapped=None, weights=WEIGHTS[0], progress=False,
        )  # fmt: skip
    bridge = ss.load_model(BY_NAME["llama"].build())
    with (
        pytest.raises(UnsupportedError, match="takes 32 inputs at a time, and block 0, .* has 48"),
        quantised_weights(bridge, "int4-group32", lambda: None),
    ):
        pass
    weights = bridge.blocks[0].attn.q.original_component.weight
    assert type(weights.data) is torch.Tensor, "and the model is as it was"


def test_without_torchao_weights_are_refused_or_left_alone(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    family = BY_NAME["llama"]
    texts = ss.token_ids(family.tokens(prompts=2, length=6))
    measure = dict(
        schemes="int8-token", tensors="value", sinks=0, first=[], mapped=None, progress=False
    )
    with pytest.raises(UnsupportedError, match="torchao, which is not installed"):
        precision(family.build(), texts, weights="int8-channel", **measure)
    with pytest.raises(UnsupportedError, match="weights is 'int3'"):
        precision(family.build(), texts, weights="int3", **measure)
    found = precision(family.build(), texts, **measure)
    assert found.weights is None and "Weights are not quantised." in found.summary()
