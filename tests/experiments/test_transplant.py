"""Absorbing and adding apart, against plain transformers and on a prompt that is its own donor."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import sinkscope as ss
from sinkscope.experiments.transplant import transplant

from ..families.architectures import BY_NAME


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_loss_and_attention_are_those_of_transformers(name: str) -> None:
    """Untouched, erased and key-only, prompt by prompt on the plain model."""
    family = BY_NAME[name]
    tokens, plain = family.tokens(prompts=2, length=12), family.build()
    found = transplant(
        family.build(),
        ss.token_ids(tokens),
        erase=False,
        conditions=["both", "key"],
        progress=False,
    )
    with torch.no_grad():
        out = plain(tokens, output_attentions=True)
    nll = torch.nn.functional.cross_entropy(
        out.logits[:, 1:-1].transpose(1, 2), tokens[:, 2:], reduction="none"
    )
    torch.testing.assert_close(found.loss[0], nll.mean(1), atol=1e-5, rtol=1e-5)
    paid = torch.stack([a[:, :, 1:, 0].mean(-1) for a in out.attentions], dim=1)
    torch.testing.assert_close(found.attention[0], paid, atol=1e-5, rtol=1e-4)
    replaced: list[tuple[torch.nn.Module, torch.Tensor | float]] = []
    # Own donor, nothing erased: the identity; the key alone is not.
    torch.testing.assert_close(found.loss[1], found.loss[0], atol=1e-5, rtol=1e-5)
    assert found.divergence[:2].abs().max() < 1e-5
    # Its own key with value zero, by forward hooks on transformers' projections.
    for block in plain.model.layers:
        keys: list[torch.Tensor] = []
        handle = block.self_attn.k_proj.register_forward_hook(lambda m, x, k, to=keys: to.append(k))
        with torch.no_grad():
            plain(tokens)
        handle.remove()
        replaced.append((block.self_attn.k_proj, keys[0][:, 0]))
        replaced.append((block.self_attn.v_proj, 0.0))
    for projection, first in replaced:
        projection.register_forward_hook(partial(with_first, first))
    with torch.no_grad():
        edited = plain(tokens).logits[:, 1:].log_softmax(-1)
    before = out.logits[:, 1:].log_softmax(-1)
    want = torch.nn.functional.kl_div(edited, before, reduction="none", log_target=True)
    assert (want.sum(-1).mean(1) > 1e-7).all()
    torch.testing.assert_close(found.divergence[2], want.sum(-1).mean(1), atol=1e-6, rtol=1e-3)


def with_first(
    first: torch.Tensor | float, module: torch.nn.Module, args: tuple, x: torch.Tensor
) -> torch.Tensor:
    """A projection's output with another one at position 0."""
    x = x.clone()
    x[:, 0] = first
    return x


def test_own_sinks_undo_the_erasure() -> None:
    """Later tokens read the sink through keys and values alone, so "both" is the untouched run."""
    family = BY_NAME["llama"]
    found = transplant(
        family.build(), ss.token_ids(family.tokens(prompts=2, length=12)), erase=0, progress=False
    )
    at = found.conditions.index
    assert (found.divergence[at("host")] > 1e-3).all()
    assert found.divergence[at("both")].abs().max() < 1e-5
    torch.testing.assert_close(found.attention[at("both")], found.attention[0])
    assert "block 0" in found.summary()
