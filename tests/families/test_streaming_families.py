"""Streaming attention of every architecture, against transformers and the stock bridge."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinkscope.attention import pattern_sums
from sinkscope.attention.streaming import Stream, streaming
from sinkscope.models.load import load_model

from .architectures import BY_NAME, FAMILIES, N_LAYERS, OTHERS, VOCAB, Family, bridge_of
from .reference import reference

FIRED = ("hook_rot_q", "hook_rot_k", "hook_rot_v", "hook_lse")
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
# Post-norm stacks of random weights amplify rounding.
LOGIT_TOLERANCE = dict(rtol=1e-5, atol=4e-5)


@pytest.fixture(params=[family.name for family in (*FAMILIES, *OTHERS)])
def family(request: pytest.FixtureRequest) -> Family:
    """Every family that attends through transformers' attention functions."""
    return BY_NAME[request.param]


@pytest.fixture
def bridge(family: Family) -> TransformerBridge:
    """Shared by all tests: leave it as it was."""
    return bridge_of(family)


@pytest.fixture
def own_bridge(family: Family) -> TransformerBridge:
    """A bridge to be changed."""
    return load_model(family.build())


@pytest.fixture
def tokens(family: Family) -> Tensor:
    return family.tokens()


@pytest.fixture
def padded(family: Family) -> tuple[Tensor, Tensor]:
    """Tokens and a mask that hides the end of one prompt and the beginning of another."""
    tokens = family.tokens()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -5:] = False
    mask[2, :4] = not family.causal  # left padding shifts positions; encoders have none
    return tokens, mask


def shown_at(bridge: TransformerBridge, name: str) -> str:
    """The name that a hook point of `FIRED` has in multi-head latent attention, or its own."""
    latent = "hook_kv_latent" in bridge.blocks[0].attn._modules
    return name.replace("rot_", "") if latent else name


def listen(bridge: TransformerBridge, tokens: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """What the streaming hook points fire, stacked over layers, and the logits."""
    seen: dict[str, list[Tensor]] = {name: [] for name in FIRED}
    hooks = [
        (
            f"blocks.{layer}.attn.{shown_at(bridge, name)}",
            lambda x, hook, name=name: seen[name].append(x.clone()),
        )
        for layer in range(N_LAYERS)
        for name in FIRED
    ]
    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs)
    return {name: torch.stack(layers) for name, layers in seen.items()} | {"logits": logits}


def test_computes_what_transformers_computes(
    family: Family, bridge: TransformerBridge, family_reference: dict[str, Tensor]
) -> None:
    with streaming(bridge):
        seen = listen(bridge, family.tokens())
    torch.testing.assert_close(seen["logits"], family_reference["logits"], **LOGIT_TOLERANCE)
    for name, theirs in (("q", "queries"), ("k", "keys"), ("v", "values")):
        torch.testing.assert_close(seen[f"hook_rot_{name}"], family_reference[theirs], **TOLERANCE)
    pattern = (family_reference["scores"] - seen["hook_lse"][..., None]).exp()
    torch.testing.assert_close(pattern, family_reference["attentions"], **TOLERANCE)


def test_describes_the_call(family: Family, bridge: TransformerBridge, tokens: Tensor) -> None:
    with streaming(bridge) as stream, torch.no_grad():
        bridge(tokens)
    calls = [stream.calls[layer] for layer in range(N_LAYERS)]
    assert tuple(call.window for call in calls) == family.windows
    assert all(call.causal == family.causal for call in calls)
    assert all(call.softcap == family.softcap for call in calls)
    assert all((call.learned_sink is not None) == family.learned_sinks for call in calls)
    assert all(call.mask is None and call.offset == 0 for call in calls)


def test_statistics_equal_those_of_the_pattern(
    family: Family, bridge: TransformerBridge, padded: tuple[Tensor, Tensor]
) -> None:
    tokens, mask = padded
    # A bridge moves left-padded prompts to other positions, on which these two depend: GPT-2 has
    # learned ones, and Hunyuan's norms after the rotation weight its channels.
    if family.name in ("gpt2", "hunyuan"):
        tokens, mask = tokens[:2], mask[:2]
    expected = reference(family.build(), tokens, mask, family.parts)["attentions"]
    with streaming(bridge) as stream:
        seen = listen(bridge, tokens, attention_mask=mask.long())
    real = mask[:, None, :]
    keys = torch.zeros_like(mask)
    keys[:, :2], keys[-1, 7] = True, True
    for layer in range(N_LAYERS):
        pattern, call = expected[layer], stream.calls[layer]
        call_of = seen["hook_rot_q"][layer], seen["hook_rot_k"][layer], seen["hook_lse"][layer]
        paid = pattern_sums.attention_to_keys(*call_of, call, keys)
        both = pattern_sums.row_and_column_sums(*call_of, call, mask, entropy=True)
        sizes = seen["hook_rot_v"][layer].norm(dim=-1)
        weighted = pattern_sums.weighted_mass(*call_of, call, sizes)
        learned = pattern_sums.learned_sink_share(call_of[2], call)

        group = pattern.shape[1] // sizes.shape[2]
        per_key = sizes.repeat_interleave(group, dim=2).mT[:, :, None]
        counted = torch.where(real[..., None], pattern, 0)
        close(paid, (pattern * keys[:, None, None, :]).sum(-1), real)
        close(both.received, counted.sum(2))
        close(both.entropy, torch.special.entr(counted).sum(-1))
        close(weighted, (pattern * per_key).sum(-1), real)
        close(learned, 1 - pattern.sum(-1), real)


def close(found: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Equal, at real queries."""
    if where is not None:
        found, expected = torch.where(where, found, 0), torch.where(where, expected, 0)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_padding(family: Family, bridge: TransformerBridge, padded: tuple[Tensor, Tensor]) -> None:
    tokens, mask = padded
    expected = reference(family.build(), tokens, mask, family.parts)
    with streaming(bridge):
        seen = listen(bridge, tokens, attention_mask=mask.long())
    assert seen["logits"].isfinite().all()
    # A bridge moves left-padded prompts to other positions than the bare model: compared below.
    same = [0, 1] if family.causal else [0, 1, 2]
    torch.testing.assert_close(
        seen["logits"][same][mask[same]], expected["logits"][same][mask[same]], **LOGIT_TOLERANCE
    )
    with torch.no_grad():
        theirs = bridge(tokens, attention_mask=mask.long())
    torch.testing.assert_close(seen["logits"][mask], theirs[mask], **LOGIT_TOLERANCE)


def test_every_other_hook_point_fires_as_on_the_stock_bridge(
    family: Family, bridge: TransformerBridge, tokens: Tensor
) -> None:
    everything = dict(output_attentions=False)
    with torch.no_grad():
        _, stock = bridge.run_with_cache(tokens, **everything)
        with streaming(bridge):
            _, ours = bridge.run_with_cache(tokens, **everything)
    missing = set(stock) - set(ours)
    assert not missing
    for name, expected in stock.items():
        # Before Hunyuan's norms, which come after the rotation, on the stock bridge.
        if not family.stock_rotated and name.endswith(("hook_rot_q", "hook_rot_k")):
            continue
        if expected.dtype.is_floating_point and not name.endswith("hook_attn_scores"):
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=5e-5, msg=name)
    new = {name.rsplit(".", 1)[1] for name in set(ours) - set(stock)}
    patterns = set() if family.stock_scores else {"hook_attn_scores", "hook_pattern"}
    assert new <= {*FIRED, *patterns}


def test_scores_and_pattern_are_those_of_transformers(
    family: Family, bridge: TransformerBridge, family_reference: dict[str, Tensor]
) -> None:
    names = lambda name: name.endswith(("hook_attn_scores", "hook_pattern"))  # noqa: E731
    with streaming(bridge), torch.no_grad():
        _, cache = bridge.run_with_cache(family.tokens(), names_filter=names)
    for layer in range(N_LAYERS):
        found = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(found, family_reference["attentions"][layer], **TOLERANCE)
        scores, expected = (
            cache[f"blocks.{layer}.attn.hook_attn_scores"],
            family_reference["scores"],
        )
        hidden = expected[layer] == -torch.inf
        assert (scores[hidden] == torch.finfo(scores.dtype).min).all()
        torch.testing.assert_close(scores[~hidden], expected[layer][~hidden], **TOLERANCE)


def test_a_hooked_layer_alone_materialises_its_pattern(
    bridge: TransformerBridge, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkscope.attention import layer as layer_module

    dense = []

    def counted(*args: object) -> object:
        dense.append(args)
        return attend_densely(*args)

    attend_densely = layer_module.attend_densely
    monkeypatch.setattr(layer_module, "attend_densely", counted)
    with streaming(bridge), torch.no_grad():
        bridge(tokens)
        assert not dense
        bridge.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: None)]
        )
    assert len(dense) == 1


def test_edits_of_scores_take_effect(
    family: Family, bridge: TransformerBridge, tokens: Tensor
) -> None:
    """Row 5 of layer 1 made to see only itself: pattern, z and log-sum-exp all follow."""
    seen: dict[str, Tensor] = {}

    def only_itself(scores: Tensor, hook: object) -> Tensor:
        scores = scores.clone()
        kept = scores[:, :, 5, 5].clone()
        scores[:, :, 5] = torch.finfo(scores.dtype).min
        scores[:, :, 5, 5] = kept
        seen["score"] = kept
        return scores

    hooks = [("blocks.1.attn.hook_attn_scores", only_itself)]
    hooks += keep(bridge, seen, 1, "hook_pattern", "hook_lse", "hook_rot_v", "hook_z")
    with streaming(bridge) as stream, torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    lse = seen["score"]
    if family.learned_sinks:
        lse = torch.logaddexp(lse, stream.calls[1].learned_sink.detach())
    close(seen["hook_lse"][:, :, 5], lse)
    share = (seen["score"] - lse).exp()
    close(seen["hook_pattern"][:, :, 5, 5], share)
    value = seen["hook_rot_v"][:, 5]
    value = value.repeat_interleave(share.shape[1] // value.shape[1], dim=1) * share[..., None]
    close(seen["hook_z"].reshape(*tokens.shape, *value.shape[1:])[:, 5], value)


def keep(
    bridge: TransformerBridge, seen: dict[str, Tensor], layer: int, *names: str
) -> list[tuple]:
    """Hooks that keep what attention hook points of a layer show."""
    return [
        (
            f"blocks.{layer}.attn.{shown_at(bridge, name)}",
            lambda x, hook, name=name: seen.update({name: x.clone()}),
        )
        for name in names
    ]


def test_an_identity_pattern_makes_z_the_values(bridge: TransformerBridge, tokens: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    hooks = [("blocks.2.attn.hook_pattern", lambda p, hook: torch.eye(p.shape[-1]).expand_as(p))]
    hooks += keep(bridge, seen, 2, "hook_rot_v", "hook_z")
    with streaming(bridge), torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    value = seen["hook_rot_v"]
    z = seen["hook_z"].reshape(*tokens.shape, -1, value.shape[-1])
    close(z, value.repeat_interleave(z.shape[2] // value.shape[2], dim=2))


@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_v", "hook_z", "hook_in", "hook_out"])
def test_edits_act_as_on_the_stock_bridge(
    family: Family, bridge: TransformerBridge, tokens: Tensor, point: str
) -> None:
    if family.attention != "eager":
        pytest.skip("the stock bridge computes something else")

    def change(x: Tensor, hook: object) -> Tensor:
        return torch.cat([x[:, :3], -0.5 * x[:, 3:]], dim=1)

    hooks = [(f"blocks.1.attn.{point}", change)]
    with torch.no_grad():
        plain = bridge(tokens)
        stock = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        with streaming(bridge):
            ours = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert (stock - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", ["hook_rot_q", "hook_rot_k", "hook_rot_v"])
def test_edits_before_the_dot_product_take_effect(
    family: Family, bridge: TransformerBridge, tokens: Tensor, point: str
) -> None:
    """Zero queries or keys: uniform attention. Zero values: nothing is mixed."""
    seen: dict[str, Tensor] = {}
    name = f"blocks.1.attn.{shown_at(bridge, point)}"
    hooks = [(name, lambda x, hook: torch.zeros_like(x))]
    hooks += keep(bridge, seen, 1, "hook_z", "hook_lse")
    with streaming(bridge) as stream, torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    if point == "hook_rot_v":
        assert seen["hook_z"].abs().max() == 0
        return
    place = torch.arange(tokens.shape[1])
    visible = place + 1 if family.causal else torch.full_like(place, len(place))
    visible = visible.clamp(max=family.windows[1] or len(place)).float().expand_as(seen["hook_lse"])
    if family.learned_sinks:
        visible = visible + stream.calls[1].learned_sink.detach().exp()[:, None]
    expected = visible.log()
    if (bias := stream.calls[1].key_bias) is not None:
        expected = bias.logcumsumexp(-1).expand_as(expected)
    close(seen["hook_lse"], expected)


def test_a_cache_fed_in_chunks(family: Family, bridge: TransformerBridge, tokens: Tensor) -> None:
    """New keys fire alone, as on the stock bridge; edits of them reach the cache."""
    if not family.causal:
        pytest.skip("an encoder has no cache")
    with torch.no_grad():
        whole = bridge(tokens)
    with streaming(bridge) as stream:
        first = listen(bridge, tokens[:, :9], return_type="logits_and_cache", use_cache=True)
        logits, cache = first["logits"]
        keys: list[Tensor] = []
        with bridge.hooks(
            [("blocks.1.attn.hook_lse", lambda x, hook: keys.append(stream.calls[1].keys))]
        ):
            second = listen(
                bridge, tokens[:, 9:], return_type="logits_and_cache", past_key_values=cache
            )
        full = listen(bridge, tokens)
    got = torch.cat([logits, second["logits"][0]], dim=1)
    torch.testing.assert_close(got, whole, **LOGIT_TOLERANCE)
    for name in FIRED[:3]:
        fired = torch.cat([first[name], second[name]], dim=2)
        torch.testing.assert_close(fired, full[name], **TOLERANCE)
    torch.testing.assert_close(
        torch.cat([first["hook_lse"], second["hook_lse"]], dim=3), full["hook_lse"], **TOLERANCE
    )
    window = family.windows[1]
    past = 9 if window is None else min(9, window - 1)
    torch.testing.assert_close(keys[0], full["hook_rot_k"][1][:, 9 - past :], **TOLERANCE)


def test_an_edited_key_stays_in_the_cache(
    family: Family, bridge: TransformerBridge, tokens: Tensor
) -> None:
    if not family.causal or not family.stock_rotated:
        pytest.skip("the stock bridge shows no keys here")
    name = "blocks.1.attn.hook_rot_k"
    if name not in bridge.hook_dict:
        pytest.skip("the stock bridge has no such hook point")

    def chunked() -> Tensor:
        edit = [(name, lambda k, hook: k * 0.25)]
        with torch.no_grad():
            _, cache = bridge.run_with_hooks(
                tokens[:, :7], fwd_hooks=edit, return_type="logits_and_cache", use_cache=True
            )
            return bridge(tokens[:, 7:], past_key_values=cache)

    stock = chunked()
    with streaming(bridge):
        ours = chunked()
    torch.testing.assert_close(ours, stock, **LOGIT_TOLERANCE)


def test_a_mask_with_four_axes_is_the_last_word(
    family: Family, bridge: TransformerBridge, tokens: Tensor
) -> None:
    """Also one that lets queries see later keys."""
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(len(tokens), 1, 24, 24, generator=generator) > 0.5
    seen |= torch.eye(24, dtype=torch.bool)
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    masks = dict(attention_mask=bias)
    if "Gemma" in family.model_class or "GptOss" in family.model_class:
        masks = dict(attention_mask={"full_attention": bias, "sliding_attention": bias})
    if family.name in ("opt", "bert"):
        pytest.skip("transformers takes masks with two axes only here")
    theirs = family.build()
    with torch.no_grad():
        expected = theirs(tokens, **masks).logits
        with streaming(bridge):
            ours = bridge.original_model(tokens, **masks).logits
    torch.testing.assert_close(ours, expected, **LOGIT_TOLERANCE)


def test_gradients_flow_as_through_the_stock_bridge(
    family: Family, own_bridge: TransformerBridge, tokens: Tensor
) -> None:
    def gradients() -> dict[str, Tensor]:
        own_bridge.zero_grad()
        own_bridge(tokens).square().mean().backward()
        named = own_bridge.original_model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    own_bridge.requires_grad_(True)
    stock = gradients()
    with streaming(own_bridge):
        ours = gradients()
    assert stock.keys() == ours.keys() and stock
    # Key biases have none but rounding noise: attention does not depend on them.
    noise = 1e-6 * max(float(expected.abs().max()) for expected in stock.values())
    for name, expected in stock.items():
        atol = noise + 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=atol, msg=name)


def test_leaves_the_bridge_as_it_was(
    family: Family, bridge: TransformerBridge, tokens: Tensor
) -> None:
    with torch.no_grad():
        before_logits = bridge(tokens)
    before = snapshot(bridge)
    with streaming(bridge), torch.no_grad():
        bridge(tokens)
    assert snapshot(bridge) == before
    with torch.no_grad():
        assert torch.equal(bridge(tokens), before_logits)


def snapshot(bridge: TransformerBridge) -> dict[str, object]:
    """Every attribute of every module by identity, and the names of the hook points in order."""
    modules = {f"bridge.{name}": module for name, module in bridge.named_modules()}
    modules |= {f"model.{name}": m for name, m in bridge.original_model.named_modules()}
    state: dict[str, object] = {"hooks": list(bridge.hook_dict)}
    for name, module in modules.items():
        for attribute, value in module.__dict__.items():
            if attribute == "_fired_hook_out":
                continue  # the stock bridge writes it in every forward pass, too
            where = f"{name} {attribute}"
            if isinstance(value, dict):
                state[where] = {key: id(entry) for key, entry in value.items()}
            else:
                state[where] = id(value)
    config = bridge.original_model.config
    return state | {"implementation": config._attn_implementation}


def test_a_copy_taken_inside_is_a_plain_bridge(
    own_bridge: TransformerBridge, tokens: Tensor
) -> None:
    with torch.no_grad():
        expected = own_bridge(tokens)
    with streaming(own_bridge) as stream:
        heard: list[str] = []
        own_bridge.add_hook("blocks.0.attn.hook_lse", lambda x, hook: heard.append(hook.name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own, about copying
            twin = copy.deepcopy(own_bridge)
        assert "blocks.0.attn.hook_lse" not in twin.hook_dict
        with torch.no_grad():
            assert torch.equal(twin(tokens), expected)
            own_bridge(tokens)
        assert heard == ["blocks.0.attn.hook_lse"] and set(stream.calls) == set(range(N_LAYERS))
        with streaming(twin) as other:
            assert isinstance(other, Stream) and other is not stream
    with torch.no_grad():
        assert torch.equal(twin(tokens), expected)


def test_generates_the_same_tokens(family: Family, bridge: TransformerBridge) -> None:
    if not family.causal:
        pytest.skip("an encoder does not generate")
    start = family.tokens(prompts=2, length=6)
    options = dict(max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    expected = bridge.generate(start, **options)
    with streaming(bridge):
        found = bridge.generate(start, **options)
    assert found.tolist() == expected.tolist() and int(found.max()) < VOCAB
