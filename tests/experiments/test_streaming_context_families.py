"""Text through a small cache equals attention written out query by query, key by key.

The oracle is a plain transformers model whose attention function is replaced by loops: rotary
angles are left out by the model and put in here, for every pair of a query and a key at the places
where the cache counts them to be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from einops import repeat
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope.errors import ReportError, TextError, UnsupportedError
from sinkscope.experiments.streaming_context import Setting, streaming_context
from sinkscope.experiments.window_cache import WindowCache
from tests.families.architectures import BY_NAME, COMMON, GROUPED, SPECIAL, Family

ROTARY = ("llama", "qwen3", "olmo2", "gpt_neox", "phi3", "mixtral")
TOKENS = 40
PARTIAL = {
    "phi": Family("phi", "PhiForCausalLM", dict(COMMON, **SPECIAL, partial_rotary_factor=0.5)),
    "stablelm": Family("stablelm", "StableLmForCausalLM", dict(GROUPED, partial_rotary_factor=0.5)),
}
"""Models that rotate the first part of a key, in their attention rather than in the function."""


def cached_places(query: int, keep: list[int], window: int) -> dict[int, int]:
    """What one query sees, and where the cache counts each of them to be."""
    recent = [j for j in range(query + 1) if j > query - window]
    kept = [k for k in keep if k <= query - window]
    return {position: place for place, position in enumerate([*kept, *recent])}


def turned(x: Tensor, place: int, cos: Tensor, sin: Tensor) -> Tensor:
    """One head's vector, rotated as transformers' Llama does at a place."""
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[place] + torch.cat([-second, first], dim=-1) * sin[place]
    return torch.cat([rotated, rest], dim=-1)


@contextmanager
def by_hand(model: PreTrainedModel, setting: Setting) -> Iterator[None]:
    """Attention of a setting, written out."""
    home = sys.modules[type(model).__module__]
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, 1), torch.arange(TOKENS)[None])
    cos, sin = cos[0], sin[0]

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (repeat(x, "b k t d -> b (k g) t d", g=group) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        z = torch.zeros_like(query)
        for i in range(query.shape[2]):
            if setting.counted == "cache":
                seen = cached_places(i, list(setting.keep), setting.window)
            else:
                seen = {j: j for j in range(i + 1) if j > i - setting.window or j in setting.keep}
            if i in setting.alone:
                seen = {i: seen[i]}
            here = turned(query[:, :, i], seen[i], cos, sin)
            scores = torch.stack(
                [
                    (here * turned(key[:, :, j], place, cos, sin)).sum(-1) * scale
                    for j, place in seen.items()
                ],
                dim=-1,
            )
            weights = scores.softmax(-1)
            z[:, :, i] = sum(weights[..., n, None] * value[:, :, j] for n, j in enumerate(seen))
        return z.transpose(1, 2), None

    def unturned(q, k, *_, **__):
        return q, k

    with (
        mock.patch.object(home, "eager_attention_forward", attend),
        mock.patch.object(home, "apply_rotary_pos_emb", unturned),
    ):
        yield


def losses_by_hand(family: Family, tokens: Tensor, setting: Setting) -> Tensor:
    plain = family.build()
    with by_hand(plain, setting), torch.no_grad():
        logits = plain(tokens).logits[0]
    probabilities = logits.double().softmax(-1)
    return torch.stack(
        [-probabilities[i, tokens[0, i + 1]].log() for i in range(tokens.shape[1] - 1)]
    )


SETTINGS = {
    "window alone": dict(keep=(), alone=()),
    "two sinks": dict(keep=(0, 1), alone=()),
    "one in the middle": dict(keep=(5,), alone=()),
    "designated": dict(keep=(5,), alone=(5,)),
    "two designated": dict(keep=(3, 9), alone=(3, 9)),
}


CASES = [("llama", kept) for kept in SETTINGS] + [
    (name, "two designated") for name in (*ROTARY[1:], *PARTIAL)
]


@pytest.mark.parametrize("counted", ["cache", "absolute"])
@pytest.mark.parametrize(("name", "kept"), CASES)
def test_equals_attention_by_hand(name: str, counted: str, kept: str) -> None:
    family = (BY_NAME | PARTIAL)[name]
    tokens = family.tokens(prompts=1, length=TOKENS)
    setting = Setting(kept, window=7, counted=counted, **SETTINGS[kept])
    want = losses_by_hand(family, tokens, setting)
    model = ss.load_model(family.build())
    got = run(model, tokens, setting, chunk=16)
    torch.testing.assert_close(got[:-1].double(), want, atol=1e-4, rtol=1e-5)
    assert got[-1].isnan()


def run(model: object, tokens: Tensor, setting: Setting, chunk: int) -> Tensor:
    from sinkscope.experiments.streaming_context import stream
    from sinkscope.experiments.window_cache import KeyRotation

    rotation = KeyRotation(model, ss.capabilities(model)) if setting.counted == "cache" else None
    return stream(model, ss.token_ids(tokens), setting, rotation, chunk)[0]


@pytest.mark.parametrize("counted", ["cache", "absolute"])
@pytest.mark.parametrize("name", ["llama", *PARTIAL])
def test_chunks_change_nothing(name: str, counted: str) -> None:
    """Token by token, as StreamingLLM runs, and in chunks longer than the window."""
    family = (BY_NAME | PARTIAL)[name]
    tokens = family.tokens(prompts=1, length=TOKENS)
    model = ss.load_model(family.build())
    setting = Setting("both", (0, 4), 6, counted, (4,))
    alone = run(model, tokens, setting, chunk=1)
    for chunk in (3, 6, 40):
        torch.testing.assert_close(
            run(model, tokens, setting, chunk), alone, atol=1e-4, rtol=1e-5, equal_nan=True
        )


def test_keys_that_are_not_rotated_alike_in_every_layer_are_refused() -> None:
    """SmolLM3 has layers without positions: re-rotated keys would silently be wrong there."""
    settings = dict(GROUPED, no_rope_layers=[1, 0, 1])
    model = ss.load_model(Family("smollm3", "SmolLM3ForCausalLM", settings).build())
    tokens = BY_NAME["llama"].tokens(prompts=1, length=TOKENS)
    with pytest.raises(UnsupportedError, match="not rotated alike in every layer"):
        run(model, tokens, Setting("2 sinks", (0, 1), 6, "cache"), chunk=8)
    assert not run(model, tokens, Setting("2 sinks", (0, 1), 6, "absolute"), 8)[:-1].isnan().any()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_count_absolutely(name: str) -> None:
    """A window wide enough for everything is the model itself; in the cache is refused."""
    family = BY_NAME[name]
    tokens = family.tokens(prompts=1, length=TOKENS)
    with torch.no_grad():
        logits = family.build()(tokens).logits[0]
    want = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
    model = ss.load_model(family.build())
    got = run(model, tokens, Setting("all", (), TOKENS, "absolute"), chunk=16)
    torch.testing.assert_close(got[:-1], want, atol=1e-4, rtol=1e-5)
    with pytest.raises(UnsupportedError, match="absolute"):
        streaming_context(
            model, ss.token_ids(tokens), tokens=TOKENS, designated=None, progress=False
        )
    with pytest.raises(UnsupportedError, match="64 positions"):
        streaming_context(
            model,
            ss.token_ids(family.tokens(prompts=1, length=80)),
            tokens=80,
            designated=None,
            counted=["absolute"],
            progress=False,
        )


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss", "bert"])
def test_models_with_windows_of_their_own_are_refused(name: str) -> None:
    family = BY_NAME[name]
    model = ss.load_model(family.build())
    with pytest.raises(UnsupportedError, match=r"windows of its own|bidirectional"):
        streaming_context(model, ss.token_ids(family.tokens()), tokens=20, progress=False)


def test_the_cache_is_bounded() -> None:
    """However long the text, it holds the window and what is kept."""
    from sinkscope.experiments.streaming_context import stream

    family = BY_NAME["llama"]
    model = ss.load_model(family.build())
    sizes = []
    for length in (40, 200):
        tokens = ss.token_ids(family.tokens(prompts=1, length=length))
        setting = Setting("2 sinks", (0, 1), 8, "absolute")
        sizes.append(stream(model, tokens, setting, None, 16)[1].bytes())
    per_position = 3 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, d_head, bytes
    assert sizes == [per_position * (7 + 2)] * 2


def test_an_interrupted_run_goes_on(tmp_path) -> None:
    """What is done is not done again, and another question is not mixed in."""
    family = BY_NAME["llama"]
    model = ss.load_model(family.build())
    text = ss.token_ids(family.tokens(prompts=1, length=TOKENS))
    asked = dict(tokens=TOKENS, windows=[6], sinks=[0, 2], designated=5, progress=False)
    whole = streaming_context(model, text, **asked)
    file = tmp_path / "run.nc"
    chunks = 0
    begin = WindowCache.begin

    def interrupted(*args, **kwargs):
        nonlocal chunks
        chunks += 1
        if chunks == 3:
            raise KeyboardInterrupt
        return begin(*args, **kwargs)

    with mock.patch.object(WindowCache, "begin", interrupted):
        with pytest.raises(KeyboardInterrupt):
            streaming_context(model, text, file=file, chunk=20, **asked)
    chunks = -100
    with mock.patch.object(WindowCache, "begin", interrupted):
        resumed = streaming_context(model, text, file=file, chunk=20, **asked)
    # Two chunks a setting, and the first setting was complete.
    assert chunks == -100 + 2 * (len(whole.kept) - 1)
    torch.testing.assert_close(resumed.loss, whole.loss, atol=1e-4, rtol=1e-5, equal_nan=True)
    assert resumed.kept == whole.kept
    with pytest.raises(ReportError, match="another settings"):
        streaming_context(model, text, file=file, **{**asked, "windows": [9]})


def test_a_text_is_given_in_every_way_that_texts_takes(tmp_path) -> None:
    """A path as a string or a `Path`, strings, and exact ids in a file are the same tokens."""
    from sinkscope.prompts.texts import long_text
    from tests.prompts.tiny_tokenizers import words

    model = ss.load_model(BY_NAME["llama"].build(), tokenizer=words(bos=True))
    spelt = " ".join(f"w{4 + i * i % 31}" for i in range(30))
    want = model.tokenizer(spelt, add_special_tokens=False)["input_ids"][:20]
    assert len(set(want)) > 5
    (tmp_path / "text.txt").write_text(spelt)
    (tmp_path / "ids.json").write_text(json.dumps([want]))
    path = tmp_path / "text.txt"
    for source in (path, str(path), [spelt], (spelt,)):
        assert long_text(model, source, 20, bos="never").tokens[0].tolist() == want, source
    assert long_text(model, tmp_path / "ids.json", 20).tokens[0].tolist() == want
    with pytest.raises(TextError, match="exact token ids, which are used as they are; leave out"):
        long_text(model, tmp_path / "ids.json", 20, bos="never")


def test_keys_that_cannot_be_turned_are_refused() -> None:
    """gpt-oss hands out angles for half a key's width."""
    family = BY_NAME["gpt_oss"]
    settings = dict(family.settings, layer_types=["full_attention"] * 3)
    model = ss.load_model(replace(family, settings=settings).build())
    text = ss.token_ids(family.tokens(prompts=1, length=40))
    asked = dict(tokens=40, windows=[4], sinks=[1], progress=False)
    with pytest.raises(UnsupportedError, match='count positions as "absolute"'):
        streaming_context(model, text, counted=["cache"], **asked)


def test_refusals() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    text = ss.token_ids(BY_NAME["llama"].tokens(prompts=1, length=TOKENS))
    with pytest.raises(TextError, match="fewer than the 50"):
        streaming_context(model, text, tokens=50, progress=False)
    with pytest.raises(TextError, match="to be kept"):
        streaming_context(model, text, tokens=TOKENS, designated=TOKENS, progress=False)
    with pytest.raises(TextError, match="window of 0 positions is empty"):
        streaming_context(model, text, tokens=TOKENS, designated=1, windows=[0], progress=False)
    with pytest.raises(TextError, match="chunks of 0 tokens"):
        streaming_context(model, text, tokens=TOKENS, chunk=0, progress=False)
    with pytest.raises(TextError, match="No run is requested"):
        streaming_context(model, text, tokens=TOKENS, windows=[], full=False, progress=False)
    with pytest.raises(TextError, match="no tokenizer"):
        streaming_context(model, "prose", tokens=TOKENS, progress=False)
