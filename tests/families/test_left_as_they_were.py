"""A scan leaves no trace in a model in memory: training and saving go on as if it had not been."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkscope.capture.scan import scan
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model

from .architectures import BY_NAME, Family

FAMILIES = ["gpt2", "llama", "gpt_neox", "phi3", "bert", "opt"]


def trained(family: Family, measure: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Ten steps, with scans before and in between; hashes of the saved files, and the weights."""
    model = family.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = family.tokens()
    torch.manual_seed(3)
    for step in range(10):
        if measure and step in (0, 5):
            scan(model, tokens, progress=False)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(folder).iterdir()
        }
    return files, model.state_dict()


@pytest.mark.parametrize("name", FAMILIES)
def test_training_and_saving_with_and_without_a_scan(name: str) -> None:
    family = BY_NAME[name]
    files, weights = trained(family, measure=False)
    files_after, weights_after = trained(family, measure=True)
    assert files_after == files
    assert list(weights_after) == list(weights)
    assert all(torch.equal(weights_after[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_structure_gradients_modes_and_random_state(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    model.base_model.train()
    modules = list(model.named_modules())
    kept = {
        "keys": list(model.state_dict()),
        "own": [set(vars(module)) for _, module in modules],
        "modes": [module.training for _, module in modules],
        "attention": model.config._attn_implementation,
        "random": torch.random.get_rng_state().tolist(),
    }
    scan(model, family.tokens(), progress=False)
    capabilities(load_model(model))
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert kept == {
        "keys": list(model.state_dict()),
        "own": [set(vars(module)) for _, module in modules],
        "modes": [module.training for _, module in modules],
        "attention": model.config._attn_implementation,
        "random": torch.random.get_rng_state().tolist(),
    }
    assert all(not m._forward_hooks and not m._forward_pre_hooks for _, m in modules)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_are_loaded_or_edited_are_measured(name: str) -> None:
    """Without torch counting it, too, and in fused projections that are cut into copies."""
    family = BY_NAME[name]
    model = family.build()
    before = scan(model, family.tokens(), progress=False)
    other = {
        key: weight * 1.3 if weight.is_floating_point() else weight
        for key, weight in copy.deepcopy(model.state_dict()).items()
    }
    model.load_state_dict(other)
    assert_like_a_fresh_one(model, before, family)
    fused = next(p for n, p in model.named_parameters() if p.ndim > 1 and ".0." in n)
    fused.data.mul_(0.5)
    assert_like_a_fresh_one(model, before, family)


def assert_like_a_fresh_one(model: Any, before: Any, family: Family) -> None:
    after = scan(model, family.tokens(), progress=False)
    fresh = scan(copy.deepcopy(model), family.tokens(), progress=False)
    assert not torch.equal(after.sink_attention, before.sink_attention)
    torch.testing.assert_close(after.sink_attention, fresh.sink_attention)
    torch.testing.assert_close(after.residual_norm, fresh.residual_norm)
