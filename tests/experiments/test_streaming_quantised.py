"""A KV cache whose older entries are quantised, against one token at a time on transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.precision import pivots
from sinkscope.experiments.streaming_context import streaming_context

from ..families.architectures import BY_NAME

LENGTH, RECENT = 20, 5


def stored(x: Tensor, bits: int, group: int | None) -> Tensor:
    """One token's keys or values [prompt kv_head d_head] on their own grid or grids.

    Without groups the grid is symmetric; with them it runs from the least to the largest entry.
    """
    flat, out = x.flatten(), x.flatten().clone()
    for at in range(0, len(flat), group or len(flat)):
        part = flat[at : at + (group or len(flat))]
        if group is None:
            n = 2 ** (bits - 1) - 1
            step = part.abs().max() / n
            new = (part * step.reciprocal()).round().clamp(-n, n) * step
        else:
            n = 2**bits - 1
            step = (part.max() - part.min()) / n
            new = ((part - part.min()) * step.reciprocal()).round().clamp(0, n) * step + part.min()
        out[at : at + len(part)] = new
    return out.view_as(x)


def token_by_token(plain, tokens: Tensor, bits: int, group: int | None, full: Tensor) -> Tensor:
    """The loss of every token when query t reads keys t − RECENT and earlier from storage.

    `full` [layer position] says which tokens are stored as they are.
    """
    written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(full))]
    losses = []
    for t in range(tokens.shape[1]):
        cache = DynamicCache()
        for layer, past in enumerate(written):
            if past:
                read = [
                    pair
                    if j > t - RECENT or full[layer, j]
                    else tuple(stored(x, bits, group) for x in pair)
                    for j, pair in enumerate(past)
                ]
                key, value = (torch.stack(x, dim=2) for x in zip(*read, strict=True))
                cache.update(key, value, layer)
        with torch.no_grad():
            out = plain(
                tokens[:, t : t + 1], past_key_values=cache, use_cache=True,
                position_ids=torch.tensor([[t]]),
            )  # fmt: skip
        for layer, past in enumerate(written):
            now = out.past_key_values.layers[layer]
            past.append((now.keys[:, :, -1], now.values[:, :, -1]))
        if t + 1 < tokens.shape[1]:
            losses.append(
                torch.nn.functional.cross_entropy(out.logits[0], tokens[0, t + 1 : t + 2])
            )
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cache_is_read_as_one_token_at_a_time_would(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    tokens = family.tokens(prompts=1, length=LENGTH)
    model = ss.load_model(family.build())
    found = streaming_context(
        model, ss.token_ids(tokens), tokens=LENGTH, windows=[], sinks=[0, 1], designated=None,
        quantise=["int4-token", "int2-group8-asym"], recent=RECENT, chunk=7,
        file=tmp_path / "stream.nc", progress=False,
    )  # fmt: skip
    schemes = ["int4-token", "int2-group8-asym"]
    assert found.schemes == ["", *(s for s in schemes for _ in range(3))]
    assert found.kept == ["everything", *["0 sinks", "1 sink", "pivots"] * 2]
    first = torch.arange(LENGTH).expand(3, -1)
    massive = pivots(model, ss.token_ids(tokens))[:, 0]
    plain = family.build()
    for row, (kept, scheme) in enumerate(zip(found.kept, found.schemes, strict=True)):
        full = {"0 sinks": first < 0, "1 sink": first < 1, "pivots": massive}.get(kept, first >= 0)
        bits, group = (2, 8) if "int2" in scheme else (4, None)
        want = token_by_token(plain, tokens, bits, group, full)
        got = found.loss[row, :-1]
        # A rounding of the last bit may take an entry to the next point of its grid.
        assert (got - want).abs().median() <= 1e-5, (kept, scheme)
        assert (got - want).abs().max() <= 0.05 * (got - found.loss[0, :-1]).abs().max() + 1e-4
        torch.testing.assert_close(got[:RECENT], found.loss[0, :RECENT])
        if scheme:
            assert (got - found.loss[0, :-1]).abs().max() > 1e-3
    assert "perplexity-scheme" in found.figures() and "int4-token" in found.summary()
    rows = found.to_frame()
    assert rows["bits"].tolist()[1:] == [4] * 3 + [2] * 3
    # 4 layers' worth of what a token holds, by hand: bits, and one range of 16 bits for a token.
    channels = model.cfg.n_key_value_heads or model.cfg.n_heads
    channels *= model.cfg.d_head
    old = LENGTH - (RECENT - 1)
    want = 3 * 2 * (old * (channels * 4 / 8 + 2) + (RECENT - 1) * channels * 4)
    assert float(found.cache_bytes[1]) == want
    assert float(found.full_bytes[1]) == float(found.full_bytes[0])


def test_what_a_cache_cannot_store_is_refused() -> None:
    family = BY_NAME["llama"]
    text = ss.token_ids(family.tokens(prompts=1, length=LENGTH))
    asked = dict(tokens=LENGTH, windows=[], designated=None, progress=False)
    for given, kind, why in (
        (dict(quantise="int8-tensor"), UnsupportedError, "range over tokens that are not all"),
        (dict(quantise="int3-token"), UnsupportedError, "format is 'int3'"),
        (dict(quantise="int8-token", recent=0), TextError, "recent"),
    ):
        with pytest.raises(kind, match=why):
            streaming_context(family.build(), text, **asked, **given)
