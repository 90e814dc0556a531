"""The model computes what its description says, and its bridge is the same model."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from sinkscope.bb import ATTENTIONS, BackcopyTransformer, BigramBackcopy, ModelConfig, to_bridge
from sinkscope.bb.model import TokenEmbedding, recorder
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.models.capabilities import capabilities

SIZE = dict(layers=3, heads=2, width=16, context=24)
STRUCTURES = {
    "plain": {},
    "minimal": {"no_attention": (0,), "linear_ffn": (1,), "no_ffn": (2,)},
    "no norm": {"no_norm": True},
}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return BigramBackcopy().sample(3, 20, seed=0)


def build(seed: int = 1, **changes) -> BackcopyTransformer:
    model = BackcopyTransformer(ModelConfig(**{**SIZE, **changes}), seed=seed)
    with torch.no_grad():  # norms and sinks away from their neutral starting values
        for name, weight in model.named_parameters():
            if "ln" in name or "sinks" in name:
                weight.add_(
                    0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
                )
    return model.eval()


def layer_norm(x: list[float], weight, bias) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [
        (v - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b)
        for v, w, b in zip(x, weight, bias, strict=True)
    ]


def times(matrix, x: list[float]) -> list[float]:
    return [sum(float(m) * v for m, v in zip(row, x, strict=True)) for row in matrix]


def by_loops(model: BackcopyTransformer, ids: list[int]) -> list[list[float]]:
    """A softmax model in plain Python, head by head and position by position."""
    model = copy.deepcopy(model).requires_grad_(False)
    size = model.config.width // model.config.heads
    x = [
        [float(a + b) for a, b in zip(model.tok_embed.weight[i], model.pos.weight[t], strict=True)]
        for t, i in enumerate(ids)
    ]
    for block in model.layers:
        normed = [layer_norm(h, block.ln1.weight, block.ln1.bias) for h in x]
        q, k, v = (
            [times(linear.weight, h) for h in normed]
            for linear in (block.attn.q, block.attn.k, block.attn.v)
        )
        for t in range(len(ids)):
            z: list[float] = []
            for head in range(model.config.heads):
                part = slice(head * size, (head + 1) * size)
                scores = [
                    sum(a * b for a, b in zip(q[t][part], k[j][part], strict=True))
                    / math.sqrt(size)
                    for j in range(t + 1)
                ]
                total = sum(math.exp(s) for s in scores)
                z += [
                    sum(math.exp(scores[j]) / total * v[j][part][d] for j in range(t + 1))
                    for d in range(size)
                ]
            x[t] = [a + b for a, b in zip(x[t], times(block.attn.o.weight, z), strict=True)]
            hidden = times(
                block.mlp.fc_in.weight, layer_norm(x[t], block.ln2.weight, block.ln2.bias)
            )
            update = times(block.mlp.fc_out.weight, [max(h, 0.0) for h in hidden])
            x[t] = [a + b for a, b in zip(x[t], update, strict=True)]
    return [
        times(model.head.weight, layer_norm(h, model.ln_out.weight, model.ln_out.bias)) for h in x
    ]


def test_forward_equals_plain_loops(tokens):
    model = build(layers=2, width=8)
    ids = tokens[0, :7]
    with torch.no_grad():
        logits = model(ids[None])[0]
    torch.testing.assert_close(
        logits, torch.tensor(by_loops(model, ids.tolist())), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bridge_is_the_same_model(attention, structure, tokens):
    model = build(attention=attention, **STRUCTURES[structure])
    recorded, record = recorder("")
    bridge = to_bridge(model)
    with torch.inference_mode():
        expected = model(tokens, tap=record)
        logits, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    recorded.pop("hook_pos_embed")  # the bridge repeats it for every prompt
    for name in recorded:
        torch.testing.assert_close(cache[name], recorded[name], atol=1e-5, rtol=0, msg=name)
    names = {name.rsplit("hook_")[-1] for name in recorded}
    assert {"attn_scores", "pattern", "q", "k", "v", "z", "resid_pre", "resid_post"} <= names


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_edits_of_scores_and_pattern_take_effect(attention, tokens):
    bridge = to_bridge(build(attention=attention))
    blind = torch.finfo(torch.float32).min

    def self_only(scores, hook):
        edited = scores.clone()
        edited[..., 5, :] = blind
        edited[..., 5, 5] = scores[..., 5, 5]
        return edited

    def check(pattern, hook):
        off = pattern[..., 5, :5]
        assert (off == 0).all()

    with torch.inference_mode():
        plain = bridge(tokens)
        hooks = [
            ("blocks.1.attn.hook_attn_scores", self_only),
            ("blocks.1.attn.hook_pattern", check),
        ]
        edited = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        assert (edited[:, 5] - plain[:, 5]).abs().max() > 1e-5
        assert torch.equal(edited[:, :5], plain[:, :5])
        zero = [("blocks.1.attn.hook_pattern", lambda pattern, hook: torch.zeros_like(pattern))]
        bridge.run_with_hooks(
            tokens, fwd_hooks=[*zero, ("blocks.1.hook_attn_out", lambda x, hook: check_zero(x))]
        )


def check_zero(value: torch.Tensor) -> None:
    assert (value == 0).all()


def test_bridging_leaves_the_model_alone(tokens):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        logits = model(tokens)
        to_bridge(model)
        assert torch.equal(model(tokens), logits)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("attention", ["softmax", "sigmoid", "learned-sink"])
def test_capabilities_see_true_scores(attention):
    found = capabilities(to_bridge(build(attention=attention)))
    assert found.causal
    assert found.signals["scores"] == "blocks.{layer}.attn.hook_attn_scores"
    assert {"pattern", "value", "z", "resid_pre", "resid_post", "mlp_out"} <= found.signals.keys()
    assert found.softmax == (attention != "sigmoid")


def test_spare_attention_is_learned_per_head(tokens):
    model = build(attention="learned-sink")
    recorded, record = recorder("attn.hook_attn_scores", "attn.hook_pattern")
    with torch.inference_mode():
        model(tokens, tap=record)
    for layer, block in enumerate(model.layers):
        scores = recorded[f"blocks.{layer}.attn.hook_attn_scores"]
        left = 1 - recorded[f"blocks.{layer}.attn.hook_pattern"].sum(-1)
        weights = scores.double().exp()
        sink = block.attn.sinks.double().exp()[:, None]
        torch.testing.assert_close(
            left.double(), sink / (sink + weights.sum(-1)), atol=1e-6, rtol=0
        )


def test_right_padding_changes_nothing_and_left_padding_is_refused(tokens):
    model = build()
    mask = torch.ones_like(tokens)
    mask[:, 15:] = 0
    with torch.inference_mode():
        padded = model(tokens, attention_mask=mask)
        torch.testing.assert_close(padded[:, :15], model(tokens[:, :15]), atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError, match="Padding must be on the right"):
        model(tokens, attention_mask=mask.flip(1))


def test_token_embedding_has_the_usual_gradient():
    ids = torch.tensor([[0, 3, 3], [1, 0, 3]])
    ours, usual = TokenEmbedding(5, 4), torch.nn.Embedding(5, 4)
    usual.load_state_dict(ours.state_dict())
    upstream = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for table in (ours, usual):
        (table(ids) * upstream).sum().backward()
    torch.testing.assert_close(ours.weight.grad, usual.weight.grad)
    assert torch.equal(ours(ids), usual(ids))


def test_weights_come_from_the_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_impossible_models_are_refused(tokens):
    with pytest.raises(ModelError, match="attention is 'hard'; expected one of softmax, relu"):
        ModelConfig(attention="hard")
    with pytest.raises(ModelError, match="no_ffn=.1,. names a layer outside 0 to 0"):
        ModelConfig(no_ffn=(1,))
    with pytest.raises(ModelError, match="multiple of the 3 heads"):
        ModelConfig(heads=3)
    with pytest.raises(UnsupportedError, match="30 tokens were given, but this model has 24"):
        build()(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="token ids, not inputs_embeds"):
        build()(tokens, inputs_embeds=torch.zeros(3, 20, 16))
