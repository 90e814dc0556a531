"""Every family in bfloat16 and float16, on both ways of attending."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.attention.streaming import streaming
from sinkscope.models.load import load_model

from .architectures import BY_NAME

DTYPES = [torch.bfloat16, torch.float16]
READABLE = [
    (family.name, path)
    for family in BY_NAME.values()
    for path in ("eager", "streaming")
    if family.attention == "eager" and (family.streams or path == "eager")
]


@cache
def reference(name: str) -> tuple[Tensor, Tensor]:
    """Logits and attention of transformers' own eager forward in float32."""
    return forward(name, torch.float32)


@cache
def rounded(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same in half precision, without the bridge."""
    return forward(name, dtype)


def forward(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    family = BY_NAME[name]
    model = family.build(attention=family.attention).to(dtype)
    with torch.no_grad():
        output = model(family.tokens(), output_attentions=family.attention == "eager")
    return output.logits.float(), torch.stack(output.attentions or [torch.empty(0)]).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_logits_equal_transformers(name: str, dtype: torch.dtype) -> None:
    """With and without a cache, and streaming: as close to float32 as transformers itself is."""
    truth, theirs = reference(name)[0], rounded(name, dtype)[0]
    bridge, tokens = load_model(BY_NAME[name].build().to(dtype)), BY_NAME[name].tokens()
    # Means, since rounding sends a few tokens to another expert.
    rounding = (theirs - truth).abs().mean()
    assert 0 < rounding < 0.05 * truth.abs().mean()
    with torch.no_grad():
        found = []
        if BY_NAME[name].attention == "eager":
            found = [bridge(tokens, use_cache=use_cache) for use_cache in (True, False)]
        if BY_NAME[name].streams:
            with streaming(bridge):
                found.append(bridge(tokens, use_cache=False))
    for logits in found:
        assert (logits.float() - truth).abs().mean() <= 1.5 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "path"), READABLE)
def test_a_scan_is_off_by_no_more_than_the_model(name: str, dtype: torch.dtype, path: str) -> None:
    """Attention to the first token, against float32; transformers' own rounding is the measure."""
    family = BY_NAME[name]
    model = load_model(family.build().to(dtype))
    report = ss.scan(model, ss.token_ids(family.tokens()), attention=path, progress=False)

    def first_token(patterns: Tensor) -> Tensor:
        return patterns[..., 0].mean(-1).transpose(0, 1)

    truth, theirs = first_token(reference(name)[1]), first_token(rounded(name, dtype)[1])
    rounding = (theirs - truth).abs().max()
    assert 0 < rounding < 0.02
    off = (report["first_token_attention"] - truth).abs().max()
    assert off <= 2 * rounding, (float(off), float(rounding))
