"""Heads removed partway equal heads removed by hand in whole passes of transformers' own model.

By hand: transformers' eager attention function is replaced by one that edits what it returns, and
losses are worked out from the logits in numpy. Nothing of TransformerLens or sinkscope takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope.errors import UnsupportedError
from sinkscope.experiments import partial_forward as _partway
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.partial_forward import Partway
from tests.families.architectures import FAMILIES, N_HEADS, N_LAYERS, Family
from tests.families.reference import reference

CAUSAL = [family for family in FAMILIES if family.causal]

Edit = Callable[[int, Tensor], None]
"""Changes what the heads of a layer put out [prompt position head d_head], in place."""


@pytest.fixture(params=CAUSAL, ids=[family.name for family in CAUSAL])
def causal(request: pytest.FixtureRequest) -> Family:
    """Every family that has a next-token loss."""
    return request.param


@contextmanager
def edited(model: PreTrainedModel, family: Family, edit: Edit) -> Iterator[None]:
    """A plain model whose heads' outputs are edited."""
    home = sys.modules[type(model).__module__]
    eager = home.eager_attention_forward
    blocks = list(model.get_submodule(family.parts.blocks))

    def attend(module, *args, **kwargs):
        z, pattern = eager(module, *args, **kwargs)
        z = z.clone()
        edit(next(i for i, block in enumerate(blocks) if module in set(block.modules())), z)
        return z, pattern

    with mock.patch.object(home, "eager_attention_forward", attend):
        yield


def losses(model: PreTrainedModel, tokens: Tensor) -> np.ndarray:
    """Mean next-token loss of each prompt, in float64 by the definition."""
    with torch.no_grad():
        logits = model(tokens).logits.double().numpy()
    found = []
    for prompt, row in enumerate(tokens.tolist()):
        nll = []
        for i in range(len(row) - 1):
            at = logits[prompt, i]
            top = at.max()
            nll.append(np.log(np.exp(at - top).sum()) + top - at[row[i + 1]])
        found.append(np.mean(nll))
    return np.array(found)


def by_hand(
    family: Family, tokens: Tensor, new: Callable[[int, int, Tensor], Tensor]
) -> np.ndarray:
    """[prompt layer head]: losses when one head after the other puts out new(layer, head, z)."""
    model = family.build()
    found = np.zeros((len(tokens), N_LAYERS, N_HEADS))
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):

            def edit(index: int, z: Tensor, layer: int = layer, head: int = head) -> None:
                if index == layer:
                    z[:, :, head] = new(layer, head, z[:, :, head])

            with edited(model, family, edit):
                found[:, layer, head] = losses(model, tokens)
    return found


def test_zero(causal: Family) -> None:
    tokens = causal.tokens()
    want = by_hand(causal, tokens, lambda layer, head, z: torch.zeros_like(z))
    got = ablate_heads(ss.load_model(causal.build()), ss.token_ids(tokens), "zero", progress=False)
    np.testing.assert_allclose(got.loss.numpy(), losses(causal.build(), tokens), atol=1e-5)
    np.testing.assert_allclose(got.ablated_loss.numpy(), want, atol=1e-5)
    change = want - losses(causal.build(), tokens)[:, None, None]
    assert np.abs(change).max() > 1e-2, "no head does anything"
    np.testing.assert_allclose(got.loss_change.numpy(), change, atol=2e-5)


def test_mean(causal: Family) -> None:
    tokens, other = causal.tokens(), causal.tokens(prompts=4, length=16, seed=1)
    z = reference(causal.build(), other, parts=causal.parts)["z"].double().numpy()
    typical = torch.tensor(z.mean(axis=(1, 2))).float()
    want = by_hand(causal, tokens, lambda layer, head, z: typical[layer, head].expand_as(z))
    got = ablate_heads(
        ss.load_model(causal.build()),
        ss.token_ids(tokens),
        "mean",
        calibration=ss.token_ids(other),
        progress=False,
    )
    np.testing.assert_allclose(got.ablated_loss.numpy(), want, atol=1e-5)


def test_resample_from_one_prompt(causal: Family) -> None:
    """With a single calibration prompt there is nothing to draw."""
    tokens, other = causal.tokens(), causal.tokens(prompts=1, length=30, seed=1)
    z = reference(causal.build(), other, parts=causal.parts)["z"]
    want = by_hand(
        causal, tokens, lambda layer, head, own: z[layer, :, : own.shape[1], head].expand_as(own)
    )
    got = ablate_heads(
        ss.load_model(causal.build()),
        ss.token_ids(tokens),
        "resample",
        calibration=ss.token_ids(other),
        progress=False,
    )
    np.testing.assert_allclose(got.ablated_loss.numpy(), want, atol=1e-5)


@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_both_paths_start_at_any_block(causal: Family, path: str) -> None:
    """The residual stream after the last block is transformers' own, wherever the model starts."""
    tokens = causal.tokens()
    stream = reference(causal.build(), tokens, parts=causal.parts)["hidden_states"]
    partway = Partway(ss.load_model(causal.build()), path)
    with partway.opened():
        for layer in range(N_LAYERS):
            mask = torch.ones_like(tokens, dtype=torch.bool)
            got = partway.final(tokens, mask, layer, stream[layer])
            torch.testing.assert_close(got, stream[-1], atol=1e-4, rtol=1e-4)


def test_losses_do_not_depend_on_how_logits_are_cut(causal: Family, monkeypatch) -> None:
    """Rows and positions of the output head, a few at a time; shorter prompts count their own."""
    tokens = causal.tokens()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 15:] = False
    want = losses(causal.build(), tokens)
    want[1] = losses(causal.build(), tokens[1:2, :15])[0]
    partway = Partway(ss.load_model(causal.build()))
    with partway.opened():
        final = partway.track(tokens, mask).final
        for room in (1, 5 * 97, 30 * 97, 10**6):
            monkeypatch.setitem(_partway._LOGITS, "cpu", room)
            np.testing.assert_allclose(partway.losses(tokens, mask, final), want, atol=1e-5)


def test_a_bidirectional_model_is_refused() -> None:
    bert = next(family for family in FAMILIES if not family.causal)
    with pytest.raises(UnsupportedError, match="predicts no next token"):
        ablate_heads(ss.load_model(bert.build()), ss.token_ids(bert.tokens()), progress=False)


TUPLES = {
    "GPTJForCausalLM": (dict(rotary_dim=4), "transformer.h", "attn.out_proj"),
    "BloomForCausalLM": (dict(), "transformer.h", "self_attention.dense"),
}


def _length_of_output(model: nn.Module, block: nn.Module, tokens: Any) -> int | None:
    """Of the tuple that a block returns, or None: GPT-J's returned one before transformers 5.24."""
    found: list[int | None] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else None)

    handle = block.register_forward_hook(look)
    losses(model, tokens)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("model_class", TUPLES)
def test_blocks_that_return_tuples(model_class: str) -> None:
    """Heads removed by hand in front of the output projection of each block."""
    more, blocks, projection = TUPLES[model_class]
    settings = dict(vocab_size=97, n_embd=32, hidden_size=32, n_layer=2, n_head=4, n_inner=48)
    family = Family(model_class, model_class, dict(settings, n_positions=64, **more))
    tokens, plain = family.tokens(), family.build()
    want = np.zeros((len(tokens), 2, 4))
    returned = [_length_of_output(plain, block, tokens) for block in plain.get_submodule(blocks)]
    for layer, block in enumerate(plain.get_submodule(blocks)):
        for head in range(4):

            def silence(module: object, args: tuple, head: int = head) -> tuple:
                z = args[0].clone()
                z[..., 8 * head : 8 * head + 8] = 0
                return (z, *args[1:])

            handle = block.get_submodule(projection).register_forward_pre_hook(silence)
            want[:, layer, head] = losses(plain, tokens)
            handle.remove()
    model = ss.load_model(family.build())
    assert Partway(model)._outputs == returned
    got = ablate_heads(model, ss.token_ids(tokens), progress=False)
    np.testing.assert_allclose(got.ablated_loss.numpy(), want, atol=1e-5)
