"""Text is generated alike with a KV cache, without one, and by plain transformers.

The reference recomputes the whole sequence for every token: a plain model, no cache, no bridge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope.interventions import (
    AblateHeads,
    RemoveOutput,
    ScaleValue,
    SelfOnlyMask,
    SetActivation,
    ShiftSinkLogit,
)

from ..interventions.test_families import assert_close, attention, masked
from .architectures import BY_NAME, FAMILIES, Family

CAUSAL = [family.name for family in FAMILIES if family.causal]
P, PROMPT, NEW = 10, 12, 6

INTERVENTIONS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "mask": lambda model: SelfOnlyMask(model, P),
    "sink logit": lambda model: ShiftSinkLogit(model, 3.0, P),
    "value": lambda model: ScaleValue(model, 4.0, [0, P]),
    "heads": lambda model: AblateHeads(model, [(0, 1), (1, 2)]),
    "activation": lambda model: SetActivation(model, 1, [3, 5], P, 9.0),
    "output": lambda model: RemoveOutput(model, 1, "mlp", P),
}


@pytest.fixture(params=CAUSAL)
def family(request: pytest.FixtureRequest) -> Family:
    return BY_NAME[request.param]


@pytest.fixture(params=["eager", "streaming"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def attending(model: Any, path: str) -> AbstractContextManager[Any]:
    return ss.streaming(model) if path == "streaming" else nullcontext()


@torch.no_grad()
def recomputed(plain: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens of a plain model that starts over for each, and the logits of them all."""
    for _ in range(NEW):
        logits = plain(tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens, plain(tokens, use_cache=False).logits


@torch.no_grad()
def generated(model: Any, tokens: Tensor, cached: bool = True) -> Tensor:
    """TransformerLens' own generation."""
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.generate(tokens, NEW, use_past_kv_cache=cached, return_type="tokens", **options)


@torch.no_grad()
def fed_singly(model: Any, tokens: Tensor) -> Tensor:
    """Logits of a sequence whose last tokens pass one at a time through the cache."""
    asked = {"return_type": "logits_and_cache", "use_cache": True}
    logits, cache = model(tokens[:, :PROMPT], **asked)
    parts = [logits]
    for at in range(PROMPT, tokens.shape[1]):
        logits, cache = model(tokens[:, at : at + 1], past_key_values=cache, **asked)
        parts.append(logits)
    return torch.cat(parts, dim=1)


def test_generation_is_that_of_plain_transformers(family: Family, path: str) -> None:
    prompt = family.tokens(prompts=2, length=PROMPT)
    want, logits = recomputed(family.build(), prompt)
    model = ss.load_model(family.build())
    with attending(model, path):
        assert torch.equal(generated(model, prompt), want)
        assert torch.equal(generated(model, prompt, cached=False), want)
        assert_close(fed_singly(model, want), logits)


def test_transformers_generates_the_same_through_the_bridge(family: Family, path: str) -> None:
    """What `bridge.hf_generate` calls."""
    prompt = family.tokens(prompts=1, length=PROMPT)
    want, _ = recomputed(family.build(), prompt)
    model = ss.load_model(family.build())
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with attending(model, path), torch.no_grad():
        got = model.original_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **options
        )
    assert torch.equal(got, want)


def test_generation_under_a_mask_is_that_of_a_masked_model(family: Family, path: str) -> None:
    prompt, plain = family.tokens(prompts=2, length=PROMPT), family.build()
    with attention(plain, masked(plain, family, [P])):
        want, logits = recomputed(plain, prompt)
    assert (logits - recomputed(family.build(), prompt)[1]).abs().max() > 1e-2
    model = ss.load_model(family.build())
    with SelfOnlyMask(model, P), attending(model, path):
        assert torch.equal(generated(model, prompt), want)
        assert_close(fed_singly(model, want), logits)


@pytest.mark.parametrize("name", [name for name in INTERVENTIONS if name != "mask"])
@pytest.mark.parametrize("which", ["llama", "gemma3", "gpt_neox", "opt"])
def test_an_intervention_does_the_same_with_and_without_a_cache(
    which: str, name: str, path: str
) -> None:
    """Without one every token is computed anew, as in the tests of the interventions themselves."""
    family = BY_NAME[which]
    prompt = family.tokens(prompts=2, length=PROMPT)
    model = ss.load_model(family.build())
    with torch.no_grad():
        plain = model(generated(model, prompt))
    with INTERVENTIONS[name](model), attending(model, path), torch.no_grad():
        want = generated(model, prompt, cached=False)
        logits = model(want)
        assert torch.equal(generated(model, prompt), want)
        assert_close(fed_singly(model, want), logits)
    assert (logits - plain).abs().max() > 1e-2, "the intervention changed nothing"


def test_a_bridge_that_somebody_else_made(path: str) -> None:
    """Interventions and streaming find its cache, too."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    family = BY_NAME["gpt_neox"]
    prompt, plain = family.tokens(prompts=2, length=PROMPT), family.build()
    with attention(plain, masked(plain, family, [P])):
        want, _ = recomputed(plain, prompt)
    hf = family.build()
    model = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    with attending(model, path), SelfOnlyMask(model, P):
        assert torch.equal(generated(model, prompt), want)


def test_a_copy_of_a_model_generates_with_weights_of_its_own() -> None:
    family = BY_NAME["llama"]
    prompt = family.tokens(prompts=1, length=PROMPT)
    want, _ = recomputed(family.build(), prompt)
    model = ss.load_model(family.build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.zero_()
    assert torch.equal(generated(twin, prompt), want)
