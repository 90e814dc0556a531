"""Absorbing and adding apart, against plain transformers and on a prompt that is its own donor."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import sinkscope as ss
from sinkscope.experiments.transplant import transplant
from sinkscope.families import tiny_model

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
    """Later tokens read the sink through keys and values alone, so "both" is the baseline run."""
    family = BY_NAME["llama"]
    found = transplant(
        family.build(), ss.token_ids(family.tokens(prompts=2, length=12)), erase=0, progress=False
    )
    at = found.conditions.index
    assert (found.divergence[at("host")] > 1e-3).all()
    assert found.divergence[at("both")].abs().max() < 1e-5
    torch.testing.assert_close(found.attention[at("both")], found.attention[0])
    assert "block 0" in found.summary()


def routed_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """transformers' modules of stacked experts, block after block."""
    return [m for m in model.modules() if getattr(m._parameters.get("down_proj"), "ndim", 0) == 3]


def choices(model: torch.nn.Module, tokens: torch.Tensor) -> list[list[dict[int, float]]]:
    """Weight of each expert that each token is sent to, by block and token, from the modules."""
    found: list[list[dict[int, float]]] = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        _, expert, weight = (*args, *kwargs.values())
        rows = zip(expert.tolist(), weight.tolist(), strict=True)
        found.append([dict(zip(e, w, strict=True)) for e, w in rows])

    handles = [m.register_forward_hook(keep, with_kwargs=True) for m in routed_modules(model)]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Glm4MoeForCausalLM"])
def test_routing_of_the_sink_is_that_of_transformers_modules(name: str) -> None:
    """Untouched, with the sink erased, and with its own keys and values given back."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, 97, (2, 12), generator=generator)
    found = transplant(
        tiny_model(name),
        ss.token_ids(tokens),
        erase=1,
        conditions=["host", "both", "slot"],
        progress=False,
    )
    assert found.sink_weight is not None and found.same_experts is not None
    for row in range(2):
        plain = tiny_model(name)
        before = choices(plain, tokens[row : row + 1])
        plain.model.layers[1].mlp.register_forward_hook(partial(with_first, 0.0))
        erased = choices(plain, tokens[row : row + 1])
        assert len(before) == len(found.routed_layers)
        for layer, (own, host) in enumerate(zip(before, erased, strict=True)):
            for at, given in ((0, own), (1, host)):
                weight = found.sink_weight[at, row, layer]
                want = [given[0].get(expert, 0.0) for expert in range(len(weight))]
                torch.testing.assert_close(weight, torch.tensor(want), atol=1e-5, rtol=1e-5)
            kept = [len(a.keys() & b.keys()) / len(b) for a, b in zip(own, host, strict=True)]
            assert float(found.same_experts[1, row, layer]) == pytest.approx(sum(kept[1:]) / 11)
            assert float(found.sink_same_experts[1, row, layer]) == pytest.approx(kept[0])
    assert (found.same_experts[0] == 1).all() and (found.same_experts[2] == 1).all()
    assert found.same_experts[1].min() < 1  # some token is sent elsewhere without the sink
    assert "later tokens' experts kept" in found.summary()
    assert {"same_experts", "sink_same_experts"} <= set(found.to_frame().metric)


def test_models_that_do_not_route_have_no_routing() -> None:
    family = BY_NAME["llama"]
    tokens = ss.token_ids(family.tokens(prompts=1, length=8))
    found = transplant(family.build(), tokens, erase=False, conditions=["key"], progress=False)
    assert found.routed_layers == () and found.same_experts is None
    assert "experts" not in found.summary()
