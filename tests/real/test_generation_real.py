"""SmolLM2 writes the same text with its cache, without it, and in plain transformers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

import sinkscope as ss
from sinkscope.models.packaged import packaged_folder

pytestmark = pytest.mark.real

NEW = 24


@pytest.fixture(scope="module")
def prompt(smollm2) -> torch.Tensor:
    return smollm2.to_tokens("The trains were late again, and on the platform everybody")


@pytest.fixture(scope="module")
def written(smollm2, prompt: torch.Tensor) -> torch.Tensor:
    """By transformers alone, which starts over for every token."""
    plain = AutoModelForCausalLM.from_pretrained(
        packaged_folder("smollm2-135m"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = prompt
    with torch.no_grad():
        for _ in range(NEW):
            logits = plain(tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert len(tokens[0, prompt.shape[1] :].unique()) > NEW / 2, "no text, a loop"
    return tokens


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_the_text_of_plain_transformers(
    smollm2, prompt: torch.Tensor, written: torch.Tensor, path: str, cached: bool
) -> None:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
    with ss.streaming(smollm2) if path == "streaming" else nullcontext(), torch.no_grad():
        got = smollm2.generate(
            prompt, NEW, use_past_kv_cache=cached, return_type="tokens", **options
        )
    assert torch.equal(got, written)
