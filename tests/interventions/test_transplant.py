"""A transplanted sink equals keys and values replaced by hand in the plain transformers model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions import SinkTransplant

from ..families.architectures import BY_NAME, N_LAYERS, Family, bridge_of
from .test_families import Attend, assert_close, attention, hand_made_mask, layer_of, run

PATHS = ("eager", "streaming")
P = 2


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def can_be_edited(model: object) -> bool:
    return {"key", "value"} <= set(ss.capabilities(model).signals)


def by_hand(family: Family, donors: Tensor, position: int) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' mean key and value of each layer [kv_head d_head]; prompt after prompt."""
    plain, kept = family.build(), {layer: [] for layer in range(N_LAYERS)}

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, *args, **kwargs):
            at = layer_of(plain, module, family)
            kept[at].append((key[0, :, position], value[0, :, position]))
            return eager(module, query, key, value, *args, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        for donor in donors:
            plain(donor[None])
    return {
        layer: tuple(torch.stack(x).mean(0) for x in zip(*pairs, strict=True))
        for layer, pairs in kept.items()
    }


def in_place(
    plain: PreTrainedModel, family: Family, sink: dict, what: str
) -> Callable[[Attend], Attend]:
    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            donor_key, donor_value = sink[layer_of(plain, module, family)]
            key, value = key.clone(), value.clone()
            if what != "value":
                key[:, :, P] = donor_key
            value[:, :, P] = 0 if what == "key" else donor_value
            return eager(module, query, key, value, attention_mask, **kwargs)

        return attend

    return change


@pytest.mark.parametrize("what", ["both", "key", "value"])
def test_in_place(family: Family, path: str, what: str) -> None:
    tokens, donors = family.tokens(), family.tokens(prompts=2, length=9, seed=1)
    model = bridge_of(family)
    if not can_be_edited(model):
        with pytest.raises(UnsupportedError, match="no hook point for 'key'"):
            SinkTransplant(model, ss.token_ids(donors))
        return
    sink, plain = by_hand(family, donors, P), family.build()
    with attention(plain, in_place(plain, family, sink, what)), torch.no_grad():
        want = plain(tokens).logits
    before = run(model, tokens, path)
    with SinkTransplant(model, ss.token_ids(donors), P, what):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


def with_a_slot(
    plain: PreTrainedModel, family: Family, sink: dict, what: str
) -> Callable[[Attend], Attend]:
    """One more key and value in front of those of the prompt, which keeps its positions."""

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            layer = layer_of(plain, module, family)
            donor_key, donor_value = (x.expand(len(key), 1, *x.shape) for x in sink[layer])
            if what == "key":
                donor_value = torch.zeros_like(donor_value)
            key = torch.cat([donor_key.transpose(1, 2), key], dim=2)
            value = torch.cat([donor_value.transpose(1, 2), value], dim=2)
            length = query.shape[2]
            seen = torch.ones(length, length + 1, dtype=torch.bool)
            seen[:, 1:] = hand_made_mask(family, layer, length)
            window = family.windows[layer]
            for i in range(length):
                seen[i, 0] = window is None or i + 1 < window
            mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo().min)
            return eager(module, query, key, value, mask, **kwargs)

        return attend

    return change


@pytest.mark.parametrize("what", ["both", "key"])
def test_an_extra_slot_at_no_position(family: Family, path: str, what: str) -> None:
    tokens, donors = family.tokens(), family.tokens(prompts=2, length=9, seed=1)
    model, given = bridge_of(family), ss.token_ids(donors)
    if not can_be_edited(model):
        return
    if family.positions not in ("rotary", "learned", "none"):
        with pytest.raises(UnsupportedError, match="a key's index is its position"):
            SinkTransplant(model, given, None)
        return
    sink, plain = by_hand(family, donors, 0), family.build()
    with attention(plain, with_a_slot(plain, family, sink, what)), torch.no_grad():
        want = plain(tokens).logits
    try:
        transplant = SinkTransplant(model, given, None, what)
    except UnsupportedError as error:
        pytest.skip(str(error))
    before = run(model, tokens, path)
    with transplant:
        got = run(model, transplant.with_slot(ss.token_ids(tokens)).tokens, path)[:, 1:]
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)
    with pytest.raises(UnsupportedError, match="no key of the host"):
        SinkTransplant(model, given, None, "value")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_prompt_that_is_its_own_donor_changes_nothing(name: str, path: str) -> None:
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build()), family.tokens(prompts=1)
    before = run(model, tokens, path)
    with SinkTransplant(model, ss.token_ids(tokens), P):
        assert_close(run(model, tokens, path), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt2"])
def test_a_slot_at_position_0_is_a_bos_token(name: str, path: str) -> None:
    """The donor token's keys and values alone do what the token in front does."""
    family = BY_NAME[name]
    plain, tokens = family.build(), family.tokens(prompts=2)
    bos = torch.full((2, 1), 7)
    with torch.no_grad():
        want = plain(torch.cat([bos, tokens], 1)).logits[:, 1:]
    model = ss.load_model(family.build())
    transplant = SinkTransplant(model, ss.token_ids(bos[:1]))
    slot = transplant.with_slot(ss.token_ids(tokens))
    with transplant:
        assert_close(run(model, slot.tokens, path)[:, 1:], want)


def test_padded_prompts_are_what_they_are_alone() -> None:
    family = BY_NAME["llama"]
    model, tokens = ss.load_model(family.build()), family.tokens(prompts=2)
    ragged = ss.token_ids([tokens[0, :13].tolist(), tokens[1].tolist()])
    donor = ss.token_ids(family.tokens(prompts=1, seed=1))
    for position in (0, None):
        transplant = SinkTransplant(model, donor, position, "key")
        texts = ragged if position == 0 else transplant.with_slot(ragged)
        with transplant:
            both = ss.scan(model, texts, metrics="core", progress=False).sink_attention
            for prompt in range(2):
                length = int(texts.lengths[prompt])
                one = ss.token_ids(texts.tokens[prompt : prompt + 1, :length])
                alone = ss.scan(model, one, metrics="core", progress=False).sink_attention
                torch.testing.assert_close(both[prompt : prompt + 1], alone)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_starts_from_the_cache(name: str) -> None:
    """transformers' generate, on a plain model: as with the donor token in front."""
    family = BY_NAME[name]
    plain, prompt = family.build(), family.tokens(prompts=2, length=6)
    bos = torch.full((2, 1), 7)
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = torch.cat([bos, prompt], 1)
    want = plain.generate(text, attention_mask=torch.ones_like(text), **greedy)
    model = ss.load_model(family.build())
    cache = SinkTransplant(model, ss.token_ids(bos[:1])).to_cache(prompts=2)
    assert isinstance(cache, DynamicCache)
    slot = torch.cat([torch.full((2, 1), 5), prompt], 1)  # whatever the placeholder is
    got = plain.generate(
        slot, attention_mask=torch.ones_like(slot), past_key_values=cache, **greedy
    )
    assert torch.equal(got[:, 1:], want[:, 1:])


def test_a_mean_sink_in_a_cache_is_the_slot_at_position_0() -> None:
    family = BY_NAME["llama"]
    plain, prompt = family.build(), family.tokens(prompts=1, length=6)
    model = ss.load_model(family.build())
    for what in ("both", "key"):
        transplant = SinkTransplant(model, ss.token_ids(torch.tensor([[7], [9]])), what=what)
        with transplant:
            want = run(model, transplant.with_slot(ss.token_ids(prompt)).tokens, "eager")[:, 1:]
        with torch.no_grad():
            got = plain(prompt, past_key_values=transplant.to_cache()).logits
        assert_close(got, want)


def constructed(constant: float) -> LlamaForCausalLM:
    """One layer, one head, whose attention and output can be written down.

    Every token has component 0 (so queries are one vector), token 1 alone has component 1 (so its
    key alone is not zero) and writes `constant` to dim 2; the others write 1 to dim 3.
    """
    config = LlamaConfig(
        **{"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8},
        **{"num_attention_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0},
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 2.0
        embedding[1, 1] = embedding[2:, 4] = 2.0  # each state's norm is √8: RMSNorm keeps it
        attention = model.model.layers[0].self_attn
        # Dims 3 and 7 rotate together, the slowest pair, here not at all.
        attention.q_proj.weight[3, 0] = attention.k_proj.weight[3, 1] = 1.0
        attention.v_proj.weight[2, 1] = constant / 2
        attention.v_proj.weight[5, 4] = 0.5
        attention.o_proj.weight.copy_(torch.eye(8))
    return model


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_absorbing_and_adding_apart(constant: float, path: str) -> None:
    """Key only: attention e^s / (e^s + n) and no constant; value only: 1 / (n + 1) and a constant.

    s = 2 · 2 / √8 is the sink's logit; query n sees n other keys, whose logits are 0 and whose
    values are 1 in dim 5. The host starts with an ordinary token, so without a sink.
    """
    model = ss.load_model(constructed(constant))
    host, donor = torch.full((1, 9), 4), ss.token_ids([[1, 4, 4]])
    n, logit = torch.arange(9.0), torch.tensor(4 / 8**0.5).exp()
    absorbed = {"both": logit / (logit + n), "key": logit / (logit + n), "value": 1 / (1 + n)}
    for what, attention_to_sink in absorbed.items():
        kept, patterns = [], []
        hooks = [
            ("blocks.0.hook_attn_out", lambda x, hook, kept=kept: kept.append(x[0])),
            ("blocks.0.attn.hook_pattern", lambda x, hook, p=patterns: p.append(x[0, 0, :, 0])),
        ]
        how = ss.streaming(model) if path == "streaming" else nullcontext()
        with SinkTransplant(model, donor, what=what), how, torch.no_grad():
            model.run_with_hooks(host, fwd_hooks=hooks)
        adds = constant if what != "key" else 0.0
        torch.testing.assert_close(patterns[0], attention_to_sink, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept[0][:, 2], adds * attention_to_sink, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept[0][:, 5], 1 - attention_to_sink, atol=1e-5, rtol=0)


def test_refusals() -> None:
    family = BY_NAME["llama"]
    model, donor = ss.load_model(family.build()), ss.token_ids([[7, 8]])
    with pytest.raises(TextError, match="2 tokens, and its sink should stand at position 2"):
        SinkTransplant(model, donor, 2)
    with pytest.raises(UnsupportedError, match="what is|mode is"):
        SinkTransplant(model, donor, what="query")
    with pytest.raises(UnsupportedError, match="layers run from 0 to 2"):
        SinkTransplant(model, donor, layers=3)
    with (
        SinkTransplant(model, donor, 5, donor_position=1),
        pytest.raises(TextError, match="0 to 3"),
    ):
        run(model, family.tokens(length=4), "eager")
    for odd in (
        SinkTransplant(model, donor, layers=0),
        SinkTransplant(model, donor, what="value"),
        SinkTransplant(model, donor, donor_position=1),
    ):
        with pytest.raises(UnsupportedError, match="for a token at position 0"):
            odd.to_cache()
    with pytest.raises(TextError, match="65 tokens are more"):
        SinkTransplant(model, donor).with_slot(ss.token_ids(family.tokens(length=64)))
    for few in (lambda: SinkTransplant(model, donor, None, layers=[0, 1]), partial_slot):
        with pytest.raises(UnsupportedError, match="2 of them|1 of them"):
            few()


def partial_slot() -> None:
    family = BY_NAME["llama"]
    model = ss.load_model(family.build())
    SinkTransplant(model, ss.token_ids([[7]]), layers=0).with_slot(ss.token_ids([[5, 6]]))
