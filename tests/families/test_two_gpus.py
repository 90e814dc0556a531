"""A model that lies on two GPUs gives the figures that it gives on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sinkscope as ss
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.experiments.mixing import mixing
from sinkscope.experiments.nonmixture import nonmixture
from sinkscope.experiments.streaming_context import streaming_context
from sinkscope.experiments.trace_peak import trace_peak
from sinkscope.experiments.waiver import position_embeddings, structured_mask
from sinkscope.experiments.which_part import which_part
from sinkscope.prompts.tokens import Texts
from tests.prompts.tiny_tokenizers import words

from .architectures import BY_NAME, N_LAYERS, Family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FIRST, SECOND = "cuda:0", "cuda:1"
P = 13
LLAMA = BY_NAME["llama"]


def places(family: Family, model: torch.nn.Module) -> dict[str, str]:
    """Every other block on the second GPU; the first holds the rest."""
    modules = model.named_modules()
    weighty = [name for name, module in modules if module._parameters or module._buffers]
    found = {name: FIRST for name in weighty if not name.startswith(f"{family.parts.blocks}.")}
    for layer in range(N_LAYERS):
        found[f"{family.parts.blocks}.{layer}"] = (FIRST, SECOND)[layer % 2]
    return found


def on_both(family: Family, **options: Any) -> TransformerBridge:
    model = family.build()
    model = dispatch_model(model, places(family, model), main_device=FIRST, force_hooks=True)
    assert {str(weight.device) for weight in model.parameters()} == {FIRST, SECOND}
    return ss.load_model(model, **options)


def on_one(family: Family, **options: Any) -> TransformerBridge:
    return ss.load_model(family.build(), device=FIRST, **options)


def assert_same_figures(got: Any, want: Any, besides: tuple[str, ...] = ()) -> None:
    """Every tensor of two results of one kind."""
    fields = [field.name for field in dataclasses.fields(want) if field.name not in besides]
    tensors = [name for name in fields if isinstance(getattr(want, name), Tensor)]
    assert tensors
    for name in tensors:
        torch.testing.assert_close(
            getattr(got, name).cpu(),
            getattr(want, name).cpu(),
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=lambda words, name=name: f"{name}: {words}",
        )


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_scan(name: str, path: str) -> None:
    family = BY_NAME[name]
    rows = zip(family.tokens().tolist(), (24, 9, 17), strict=True)
    ragged = ss.token_ids([row[:length] for row, length in rows])
    got, want = (
        ss.scan(model, ragged, attention=path, progress=False)
        for model in (on_both(family), on_one(family))
    )
    assert got.measured() == want.measured()
    assert_same_figures(got, want)


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_scan_divided_between_replicas(name: str, path: str) -> None:
    family = BY_NAME[name]
    rows = zip(family.tokens(prompts=6).tolist(), (24, 9, 17, 24, 5, 12), strict=True)
    ragged = ss.token_ids([row[:length] for row, length in rows])
    model = on_one(family)
    ask = dict(metrics=["all", "ffn_dims"], attention=path, batch=1, progress=False)
    want = ss.scan(model, ragged, **ask)
    got = ss.scan(model, ragged, devices=[FIRST, SECOND], **ask)
    assert got.settings.device == f"{FIRST}, {SECOND}"
    assert_same_figures(got, want)
    summed_atomically = {"attention_entropy", "value_weighted_sink_share"}
    for field in set(want.measured()) - summed_atomically:  # same batches, devices of one kind
        assert torch.equal(got[field].nan_to_num(9e9), want[field].nan_to_num(9e9)), field


@pytest.mark.parametrize("device_map", ["auto", "sequential", "by hand"])
def test_what_load_model_spreads_out(device_map: str, tmp_path: Path) -> None:
    family = BY_NAME["qwen3"]
    original = family.build()
    original.save_pretrained(tmp_path)
    asked = places(family, original) if device_map == "by hand" else device_map
    model = ss.load_model(tmp_path, device_map=asked)
    if device_map == "by hand":
        assert {str(weight.device) for weight in model.parameters()} == {FIRST, SECOND}
    got, want = (ss.scan(one, family.tokens(), progress=False) for one in (model, on_one(family)))
    assert_same_figures(got, want)


def calibration() -> Texts:
    return ss.token_ids(LLAMA.tokens(seed=3))


INTERVENTIONS: dict[str, Callable[[Any], Any]] = {
    "SelfOnlyMask": lambda model: ss.SelfOnlyMask(model, P),
    "ShiftSinkLogit": lambda model: ss.ShiftSinkLogit(model, -2.0),
    "ZeroValue": lambda model: ss.ZeroValue(model, 0),
    "AblateHeads": lambda model: ss.AblateHeads(model, [(0, 1), (1, 2)]),
    "AblateHeads mean": lambda model: ss.AblateHeads(
        model, [(0, 1), (1, 2)], "mean", calibration=calibration()
    ),
    "AblateHeads resample": lambda model: ss.AblateHeads(
        model, [(0, 1), (1, 2)], "resample", calibration=calibration()
    ),
    "RemoveOutput": lambda model: ss.RemoveOutput(model, 1, "mlp", 0),
    "SetActivation": lambda model: ss.SetActivation(
        model, 1, [2, 3], 0, "mean", calibration=calibration()
    ),
    "ScaleActivation": lambda model: ss.ScaleActivation(model, 1, 0, norm=3.0),
    "ReplaceSoftmax": lambda model: ss.ReplaceSoftmax(model, "relu"),
    "PositionIdEdit": lambda model: ss.PositionIdEdit(model, 0, P),
}


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("what", INTERVENTIONS)
def test_an_intervention(what: str, path: str) -> None:
    tokens = LLAMA.tokens()
    found = []
    for model in (on_both(LLAMA), on_one(LLAMA)):
        before = model(tokens.to(FIRST), return_type="logits")
        with INTERVENTIONS[what](model):
            found.append(ss.scan(model, tokens, metrics="core", attention=path, progress=False))
        assert torch.equal(model(tokens.to(FIRST), return_type="logits"), before)
    assert_same_figures(*found)


def moved(model: Any, family: Family) -> Any:
    return position_embeddings(
        model, ss.token_ids(family.tokens()), P, starts=["given"], progress=False
    )


def streamed(model: Any, family: Family) -> Any:
    text = ss.token_ids(family.tokens(prompts=1, length=40))
    return streaming_context(
        model,
        text,
        tokens=40,
        windows=[8],
        sinks=[0, 2],
        designated=5,
        counted=["cache", "absolute"] if family is LLAMA else ["absolute"],
        chunk=16,
        progress=False,
    )


EXPERIMENTS: dict[str, Callable[[Any, Family], Any]] = {
    "removal": lambda model, family: ablate_heads(model, family.tokens(), progress=False),
    "removal resample": lambda model, family: ablate_heads(
        model, family.tokens(), "resample", progress=False
    ),
    "sleep": lambda model, family: ablate_inactive(model, family.tokens(), progress=False),
    "trace_peak": lambda model, family: trace_peak(model, family.tokens(), progress=False),
    "nonmixture": lambda model, family: nonmixture(
        model, family.tokens(), over_median=1.0, over_mixed=0.5, progress=False
    ),
    "structured_mask": lambda model, family: structured_mask(
        model, family.tokens(), P, starts=["given"], progress=False
    ),
    "which_part": lambda model, family: which_part(
        model, family.tokens(), P, start="given", progress=False
    ),
    "position_embeddings": moved,
    "mixing": lambda model, family: mixing(model, family.tokens(), progress=False),
    "streaming_context": streamed,
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("what", EXPERIMENTS)
def test_an_experiment(what: str, name: str) -> None:
    family, tokenizer = BY_NAME[name], words(bos=True)
    got, want = (
        EXPERIMENTS[what](build(family, tokenizer=tokenizer), family) for build in (on_both, on_one)
    )
    assert_same_figures(got, want, besides=("seconds",))
