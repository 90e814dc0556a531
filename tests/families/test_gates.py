"""Gates on the heads' outputs, against transformers' own modules and plain loops over queries.

AFMoE and Qwen have a sigmoid for each channel, Laguna a softplus for each head or each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope import families
from sinkscope.errors import UnsupportedError

from .architectures import VOCAB, Parts
from .oracle import expected
from .reference import reference
from .test_scan_families import MAGNITUDE, PROBABILITIES, PROBABILITY

HEADS, WIDTH = 4, 8
LENGTHS = np.array([20, 9, 16])
GATE_FIELDS = ("gate_mean", "gate_closed", "gated_sink_attention")
OUT_FIELDS = ("value_drain_out", "head_output_norm_out", "honor_out")


def _sigmoid(name: str) -> Callable[[torch.nn.Module, Tensor], Tensor]:
    return lambda attn, x: 1 / (1 + torch.exp(-getattr(attn, name)(x).double()))


def _second_half_of_queries(attn: torch.nn.Module, x: Tensor) -> Tensor:
    both = attn.q_proj(x).double().unflatten(-1, (HEADS, 2 * WIDTH))
    return (1 / (1 + torch.exp(-both[..., WIDTH:]))).flatten(-2)


def _softplus(attn: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(attn.g_proj(x).double()))


SANDWICH = Parts(
    attention="post_attention_layernorm", ffn="post_mlp_layernorm", down=None,
    output="self_attn.o_proj",
)  # fmt: skip
PRE_NORM = Parts(down=None, output="self_attn.o_proj")
GATED: dict[str, tuple[str, dict, Parts, Callable[[torch.nn.Module, Tensor], Tensor]]] = {
    "afmoe": ("AfmoeForCausalLM", {}, SANDWICH, _sigmoid("gate_proj")),
    "laguna": ("LagunaForCausalLM", {"gating": "per-head"}, PRE_NORM, _softplus),
    "laguna wide": ("LagunaForCausalLM", {"gating": "per-element"}, PRE_NORM, _softplus),
    "qwen3.5": ("Qwen3_5ForCausalLM", {}, PRE_NORM, _second_half_of_queries),
    "qwen3-next": ("Qwen3NextForCausalLM", {}, PRE_NORM, _second_half_of_queries),
}


def build(name: str) -> PreTrainedModel:
    architecture, settings, *_ = GATED[name]
    with mock.patch.dict(families.OWN, {architecture: settings}):
        return families.tiny_model(architecture)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, VOCAB, (3, 20), generator=generator)


def prompts() -> ss.Texts:
    return ss.token_ids([ids[:n].tolist() for ids, n in zip(tokens(), LENGTHS, strict=True)])


@contextmanager
def recorded_gates(model: PreTrainedModel, name: str) -> Iterator[list[Tensor]]:
    """Factors of each layer that attends [prompt position head d_gate], from its own modules."""
    *_, factors = GATED[name]
    found: list[Tensor] = []

    def record(attn, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found.append(factors(attn, hidden).unflatten(-1, (HEADS, -1)).detach())

    attentions = [module for path, module in model.named_modules() if path.endswith("self_attn")]
    handles = [one.register_forward_pre_hook(record, with_kwargs=True) for one in attentions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@cache
def oracle(name: str) -> dict[str, np.ndarray]:
    """Every prompt alone, so that nothing depends on padding."""
    rows = []
    for ids, n in zip(tokens(), LENGTHS, strict=True):
        model = build(name)
        with recorded_gates(model, name) as gates:
            ref = reference(model, ids[None, :n], parts=GATED[name][2])
        found = expected(ref, np.ones((1, n), dtype=bool), causal=True)
        projections = [
            module.weight.detach().double().numpy()
            for path, module in model.named_modules()
            if path.endswith("self_attn.o_proj")
        ]
        found |= behind(ref, [gate[0].numpy() for gate in gates], projections)
        rows.append({k: v for k, v in found.items() if _is_per_prompt(k)})
    return {field: np.concatenate([row[field] for row in rows]) for field in rows[0]}


def _is_per_prompt(field: str) -> bool:
    return ss.SinkReport.variables()[field].dims[:2] == ("prompt", "layer")


def behind(ref: dict[str, Tensor], gates: list[np.ndarray], projections: list[np.ndarray]) -> dict:
    """The fields of one prompt that a gate decides, [1 layer head]."""
    found = {field: np.zeros((1, len(gates), HEADS)) for field in (*GATE_FIELDS, *OUT_FIELDS)}
    for layer, (gate, w_o) in enumerate(zip(gates, projections, strict=True)):
        pattern, value, z = (
            ref[key][layer, 0].double().numpy() for key in ("attentions", "values", "z")
        )
        n, group = len(gate), HEADS // value.shape[1]
        for h in range(HEADS):
            w = w_o[:, h * WIDTH : (h + 1) * WIDTH].T
            g = np.broadcast_to(gate[:, h], (n, WIDTH))
            found["gate_mean"][0, layer, h] = g.mean()
            found["gate_closed"][0, layer, h] = (g < 0.1).mean()
            passed = [pattern[h, i, 0] * g[i].mean() for i in range(1, n)]
            found["gated_sink_attention"][0, layer, h] = np.mean(passed)
            mixed = pattern[h] @ value[:, h // group]
            np.testing.assert_allclose(mixed * g, z[:, h], atol=1e-5)  # the gate is this one
            size = [
                np.sqrt(np.mean([np.sum(((g[i] * v) @ w) ** 2) for i in range(n)]))
                for v in value[:, h // group]
            ]
            found["value_drain_out"][0, layer, h] = size[0] / np.mean(size[1:])
            written = np.linalg.norm(z[:, h] @ w, axis=-1).mean()
            found["head_output_norm_out"][0, layer, h] = written
    norm = found["head_output_norm_out"]
    found["honor_out"] = norm / norm.mean(axis=-1, keepdims=True)
    return found


@pytest.mark.parametrize("way", ["eager", "streaming"])
@pytest.mark.parametrize("name", GATED)
def test_every_field_is_that_of_transformers_modules(name: str, way: str) -> None:
    every = ("all", "ffn_dims")
    report = ss.scan(build(name), prompts(), metrics=every, batch=2, attention=way, progress=False)
    attending = list(report.settings.attending)
    compared = set()
    for field, want in oracle(name).items():
        got = getattr(report, field)
        if got is None:
            continue
        got = got.double().numpy()
        got = got[:, attending] if want.shape[1] != got.shape[1] else got
        tolerance = PROBABILITY if field in PROBABILITIES else MAGNITUDE
        np.testing.assert_allclose(got, want, err_msg=field, **tolerance)
        compared.add(field)
    assert {*GATE_FIELDS, *OUT_FIELDS} <= compared
    assert {"sink_attention", "value_drain", "head_output_norm", "honor"} <= compared
    assert {"residual_peak", "ffn_mixed_max"} <= compared
    spread = report.gate_mean[:, attending]
    assert spread.max() > 1.05 * spread.min(), "the case has to tell heads apart"


@pytest.mark.parametrize("name", ["afmoe", "qwen3.5"])
def test_an_edited_gate_is_the_one_that_is_measured(name: str) -> None:
    model = ss.load_model(build(name))
    can = ss.capabilities(model)
    layer = can.attending[-1]
    hook = can.hook("gate", layer), lambda x, hook: torch.full_like(x, -100.0)
    for way in ("eager", "streaming"):
        with model.hooks(fwd_hooks=[hook]):
            report = ss.scan(model, prompts(), attention=way, progress=False)
        assert report.gate_closed[:, layer].min() == 1
        assert report.gated_sink_attention[:, layer].max() < 1e-6
        assert report.head_output_norm_out[:, layer].max() < 1e-6
        assert report.sink_attention[:, layer].min() > 0


def test_capabilities_name_the_gate() -> None:
    afmoe, laguna = (ss.capabilities(ss.load_model(build(x))) for x in ("afmoe", "laguna"))
    assert (afmoe.gated, afmoe.gate) == (True, "sigmoid")
    assert (laguna.gated, laguna.gate) == (True, "softplus")
    assert "gated outputs (softplus)" in str(laguna)


def test_a_model_without_a_gate_has_none() -> None:
    model = families.tiny_model("LlamaForCausalLM")
    with pytest.raises(UnsupportedError, match="gates cannot .*: no gate stands behind the heads"):
        ss.scan(model, prompts(), metrics=["gates"], progress=False)
    assert ss.scan(model, prompts(), progress=False).gate_mean is None


def test_a_gate_that_no_pattern_proves_is_not_believed() -> None:
    """Under attention that keeps no pattern, nothing shows what the gate multiplies."""
    bridge = ss.load_model(build("afmoe"))
    bridge.original_model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="no pattern to prove what the gate multiplies"):
        ss.scan(bridge, prompts(), metrics=["through_output"], progress=False)
    report = ss.scan(bridge, prompts(), attention="streaming", progress=False)
    assert report.gate_mean is None and report.value_drain_out is None
    assert report.sink_attention is not None
