"""Means over ragged calibration texts, and the draws of resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.errors import TextError
from sinkscope.interventions import AblateHeads, SetActivation

from ..families.architectures import BY_NAME
from ..families.reference import reference

FAMILY = BY_NAME["llama"]
LENGTHS = (9, 20, 14, 20, 6)


@pytest.fixture(scope="module")
def model() -> object:
    return ss.load_model(FAMILY.build())


@pytest.fixture(scope="module")
def ragged() -> list[list[int]]:
    tokens = FAMILY.tokens(prompts=5, length=20, seed=2)
    return [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]


def test_means_leave_padding_out(model: object, ragged: list[list[int]]) -> None:
    """Entries at a position average the prompts that reach it, and no other."""
    refs = [reference(FAMILY.build(), torch.tensor([row])) for row in ragged]
    want = [
        np.mean(
            [r["mlp_out"][1, 0, p].double().numpy() for r in refs if r["mlp_out"].shape[2] > p], 0
        )
        for p in (3, 16)
    ]
    calibration = ss.token_ids(ragged)
    edit = SetActivation(model, 1, None, [16, 3], "mean", at="mlp_out", calibration=calibration)
    np.testing.assert_allclose(edit.value.numpy(), np.stack(want), atol=1e-5)
    heads = AblateHeads(model, [(1, 2)], "mean", calibration=calibration)
    every = np.concatenate([r["z"][1, 0, :, 2].double().numpy() for r in refs])
    (typical,) = heads.replacement.values()
    np.testing.assert_allclose(typical[2].numpy(), every.mean(0), atol=1e-5)


def test_resampling_takes_one_prompt_for_all_heads(model: object) -> None:
    """Each output is that of a calibration prompt, the same one in every head and layer."""
    heads = [(0, 1), (0, 3), (2, 2)]
    other = FAMILY.tokens(prompts=4, length=30, seed=5)
    kept = reference(FAMILY.build(), other)["z"]
    tokens = FAMILY.tokens(prompts=6, length=12)
    seen: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda z, hook: seen.__setitem__(layer, z.clone())

    ablation = AblateHeads(model, heads, "resample", calibration=ss.token_ids(other), seed=1)
    draws = []
    for _ in range(2):
        with ablation, torch.no_grad():
            for _ in range(2):
                hooks = [(f"blocks.{layer}.attn.hook_z", keep(layer)) for layer in (0, 2)]
                model.run_with_hooks(tokens, fwd_hooks=hooks)
                rows = []
                for layer, head in heads:
                    got = seen[layer][:, :, head]
                    far = (got[:, None] - kept[layer][None, :, :12, head]).abs().amax((2, 3))
                    # Layer 2 differs by what was resampled below it only in heads left alone.
                    assert far.amin(1).max() < 1e-5
                    rows.append(far.argmin(1).tolist())
                assert rows[0] == rows[1] == rows[2]
                draws.append(rows[0])
    assert draws[:2] == draws[2:], "entering again should start the draws over"
    assert draws[0] != draws[1], "a second pass should draw anew"
    assert len(set(draws[0] + draws[1])) > 1


def test_resampling_refuses_what_does_not_fit(model: object, ragged: list[list[int]]) -> None:
    with pytest.raises(TextError, match="equal length"):
        AblateHeads(model, [(0, 0)], "resample", calibration=ss.token_ids(ragged))
    short = ss.token_ids(FAMILY.tokens(prompts=2, length=8))
    with pytest.raises(TextError, match="at least as long"):
        with AblateHeads(model, [(0, 0)], "resample", calibration=short), torch.no_grad():
            model(FAMILY.tokens(prompts=1, length=9))
