"""Gemma-4, whose heads are wider in some layers and whose last layers share keys, and GPT-1."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope import families
from sinkscope.errors import UnsupportedError

from .architectures import VOCAB

LENGTHS = np.array([20, 9, 16])
MASK = np.arange(20) < LENGTHS[:, None]
WIDER = families.OWN["Gemma4ForCausalLM"]
SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
"""The last two layers attend to the keys and values of the first two; those are equal in full
layers, which have one KV head of twice the width."""


def tokens() -> Tensor:
    return torch.randint(4, VOCAB, MASK.shape, generator=torch.Generator().manual_seed(0))


def prompts() -> ss.Texts:
    return ss.token_ids([ids[:n].tolist() for ids, n in zip(tokens(), LENGTHS, strict=True)])


def gemma4(settings: dict) -> PreTrainedModel:
    with mock.patch.dict(families.OWN, {"Gemma4ForCausalLM": settings}):
        return families.tiny_model("Gemma4ForCausalLM")


@pytest.mark.parametrize("way", ["eager", "streaming"])
@pytest.mark.parametrize(
    "settings", [families.OWN["Gemma4ForCausalLM"], SHARED], ids=["", "shared"]
)
def test_gemma4_attends_like_transformers(settings: dict, way: str) -> None:
    if settings is SHARED and way == "streaming":
        with pytest.raises(UnsupportedError, match="Streaming attention cannot be exact"):
            ss.scan(gemma4(settings), prompts(), attention=way, progress=False)
        return
    want: dict[str, list[Tensor]] = {"sink_attention": [], "attention_entropy": []}
    states = []
    with torch.no_grad():
        for ids, n in zip(tokens(), LENGTHS, strict=True):
            output = gemma4(settings)(
                ids[None, :n], output_attentions=True, output_hidden_states=True, use_cache=False
            )
            patterns = torch.stack([p[0].double() for p in output.attentions])
            want["sink_attention"].append(patterns[:, :, 1:, 0].mean(-1))
            want["attention_entropy"].append(torch.special.entr(patterns).sum(-1).mean(-1))
            states.append(torch.stack([s[0, 0].norm() for s in output.hidden_states[1:-1]]))
    for batch in (1, 3):
        bridge = ss.load_model(gemma4(settings))
        report = ss.scan(bridge, prompts(), batch=batch, attention=way, progress=False)
        for name, rows in want.items():
            found, expected_rows = report[name].double(), torch.stack(rows)
            torch.testing.assert_close(found, expected_rows, atol=1e-5, rtol=1e-4, msg=name)
        norms = report.sink_residual_norm[:, :-1]
        torch.testing.assert_close(norms, torch.stack(states), atol=1e-4, rtol=1e-5)


def test_the_residual_stream_of_gpt1_is_the_output_of_its_last_norms() -> None:
    """Its blocks return a list, at which TransformerLens fires no hook_resid_post."""
    name = "OpenAIGPTLMHeadModel"
    model, ids, states = families.tiny_model(name), tokens(), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, __, out: states.append(out[0]))
    with torch.no_grad():
        output = model(ids, output_attentions=True)
    bridge = ss.load_model(families.tiny_model(name))
    report = ss.scan(bridge, ss.token_ids(ids), batch=2, progress=False)
    norms = torch.stack([state[:, 0].norm(dim=-1) for state in states], dim=1)
    torch.testing.assert_close(report.sink_residual_norm, norms, atol=1e-5, rtol=1e-5)
    patterns = torch.stack(output.attentions, dim=1)
    torch.testing.assert_close(
        report.sink_attention, patterns[..., 1:, 0].mean(-1), atol=1e-5, rtol=0
    )
