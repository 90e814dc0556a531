"""JetMoE, whose router chooses the query and output projections of every token."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.families import tiny_model

from .architectures import VOCAB, Parts
from .oracle import expected
from .reference import reference
from .test_scan_families import compare

NAME = "JetMoeForCausalLM"
PARTS = Parts(attention="self_attention", down=None)
LENGTHS = np.array([20, 9, 16])
MASK = np.arange(20) < LENGTHS[:, None]
STREAMED = {"value_norm", "value_drain", "sink_logit_gap", "sink_query_norm", "sink_key_norm"}
"""Fields of tensors that the stock bridge does not show."""


def tokens() -> Tensor:
    return torch.randint(4, VOCAB, MASK.shape, generator=torch.Generator().manual_seed(0))


@cache
def oracle() -> dict[str, np.ndarray]:
    real = torch.tensor(MASK)
    return expected(reference(tiny_model(NAME), tokens() * real, real, PARTS), MASK, causal=True)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("way", ["eager", "streaming"])
def test_fields_are_transformers_own(way: str, batch: int) -> None:
    rows = [ids[:n].tolist() for ids, n in zip(tokens(), LENGTHS, strict=True)]
    bridge = ss.load_model(tiny_model(NAME))
    report = ss.scan(
        bridge,
        ss.token_ids(rows),
        metrics=("all", "ffn_dims"),
        batch=batch,
        attention=way,
        progress=False,
    )
    compared = compare(report, oracle())
    assert {"sink_attention", "attention_entropy", "residual_peak", "ffn_sink"} <= compared
    assert (compared >= STREAMED) == (way == "streaming")
    assert report.settings.n_kv_heads == report.settings.n_heads == 4


def test_what_it_lacks_and_why() -> None:
    bridge = ss.load_model(tiny_model(NAME))
    can = ss.capabilities(bridge)
    assert can.unavailable["head_outputs"].endswith("do not show one vector a head")
    assert "those of its own experts" in can.undefined["neurons"]
