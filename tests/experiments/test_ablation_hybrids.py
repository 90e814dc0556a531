"""Heads ablated where not every layer attends, and under latent attention.

By hand: a hook before transformers' own output projection sets a head's outputs to zero.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import UnsupportedError
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.dormant import dormancy
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.experiments.streaming_context import streaming_context
from sinkscope.families import tiny_model

TOKENS = torch.randint(4, 60, (2, 14), generator=torch.Generator().manual_seed(0))
MODELS = {
    "Qwen3_5ForCausalLM": "self_attn.o_proj",
    "Lfm2ForCausalLM": "self_attn.out_proj",
    "DeepseekV2ForCausalLM": "self_attn.o_proj",
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def losses(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        logs = model(TOKENS, use_cache=False).logits.double().log_softmax(-1)
    return -logs[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0].mean(1).numpy()


@contextmanager
def without(model: torch.nn.Module, name: str, flags: torch.Tensor):
    """Zero the heads of [layer head] that are flagged."""
    handles = []
    for layer, heads in enumerate(flags):
        if not heads.any():
            continue
        projection = model.model.layers[layer].get_submodule(MODELS[name])

        def zero(module, args, heads=heads):
            z = args[0].unflatten(-1, (len(heads), -1)).clone()
            z[..., heads, :] = 0
            return (z.flatten(-2),)

        handles.append(projection.register_forward_pre_hook(zero))
    yield
    for handle in handles:
        handle.remove()


def test_every_head_of_the_layers_that_attend(name: str) -> None:
    model = tiny_model(name)
    can = ss.capabilities(ss.load_model(model))
    found = ablate_heads(model, ss.token_ids(TOKENS), "zero", progress=False)
    for layer in range(can.n_layers):
        got = found.ablated_loss[:, layer]
        if layer not in can.attending:
            assert got.isnan().all()
            continue
        for head in range(can.n_heads):
            flags = torch.zeros(can.n_layers, can.n_heads, dtype=torch.bool)
            flags[layer, head] = True
            plain = tiny_model(name)
            with without(plain, name, flags):
                want = losses(plain)
            np.testing.assert_allclose(got[:, head].numpy(), want, rtol=1e-5)
    for mode in ("mean", "resample"):
        other = ablate_heads(model, ss.token_ids(TOKENS), mode, progress=False)
        assert torch.equal(other.ablated_loss.isnan(), found.ablated_loss.isnan())


def test_a_head_where_no_attention_is_is_refused() -> None:
    model = tiny_model("Lfm2ForCausalLM")
    can = ss.capabilities(ss.load_model(model))
    absent = next(layer for layer in range(can.n_layers) if layer not in can.attending)
    chosen = torch.zeros(len(TOKENS), can.n_layers, can.n_heads, dtype=torch.bool)
    chosen[:, absent, 0] = True
    for heads in ([(absent, 0)], chosen):
        with pytest.raises(UnsupportedError, match=f"Layer {absent} .* has no attention"):
            ablate_heads(model, ss.token_ids(TOKENS), heads=heads, progress=False)


@pytest.mark.parametrize("procedure", ["two passes", "one pass"])
def test_inactive_heads_are_those_of_the_layers_that_attend(name: str, procedure: str) -> None:
    model = tiny_model(name)
    texts = ss.token_ids(TOKENS)
    can = ss.capabilities(ss.load_model(model))
    found = ablate_inactive(
        model,
        texts,
        scores=["AHON-LN"],
        shares=[0.5],
        procedure=procedure,
        draws=1,
        progress=False,
    )
    heads = len(can.attending) * can.n_heads
    drawn = found.share_ablated[found.scores.index("random"), 0]
    assert drawn.tolist() == pytest.approx([round(0.5 * heads) / heads] * len(TOKENS))
    share = found.share_ablated[0, 0]
    torch.testing.assert_close((share * heads).round(), share * heads)
    assert 0 < share.mean() < 1
    if procedure == "one pass":
        return
    score = ss.scan(model, texts, progress=False).inactivity_scores()["AHON-LN"]
    flags = score < np.nanquantile(score.double().numpy(), 0.5)
    for prompt in range(len(TOKENS)):
        plain = tiny_model(name)
        with without(plain, name, flags[prompt]):
            want = losses(plain)[prompt]
        assert float(found.ablated_loss[0, 0, prompt]) == pytest.approx(want, rel=1e-5)


def test_dormancy_counts_the_heads_that_there_are(name: str) -> None:
    """Two draws of the same random ids: no head differs, and none is where no attention is."""
    draw = torch.Generator().manual_seed(1)
    kinds = {kind: ss.token_ids(torch.randint(4, 60, (6, 14), generator=draw)) for kind in "ab"}
    can = ss.capabilities(ss.load_model(tiny_model(name)))
    found = dormancy(tiny_model(name), kinds, remove="zero", progress=False)
    assert found.statistics()["heads"] == len(can.attending) * can.n_heads
    (p,) = found.p_values.values()
    assert p[list(can.attending)].isfinite().all() and (p.nan_to_num(1) > 0.05).all()
    assert sorted((~p.isnan().any(dim=1)).nonzero()[:, 0].tolist()) == list(can.attending)
    assert all(whole.all() for whole in found._whole("zero").values())
    assert found.prediction("zero")["rho"].notna().all()


def test_a_window_over_a_hybrid_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="2 of 4 layers without attention"):
        streaming_context(
            tiny_model("Lfm2ForCausalLM"), ss.token_ids(TOKENS[:1]), tokens=14, progress=False
        )
