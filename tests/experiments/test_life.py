"""The life of the sink against plain forward hooks on transformers' own models, by a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.life import ROLE, SinkLife, sink_life
from tests.families.architectures import BY_NAME

# Block, its attention, its FFN, and what adds to the residual stream, which is a norm in Gemma 3.
PLACES = {
    "llama": ("model.layers.{}", "self_attn", "mlp"),
    "gemma3": ("model.layers.{}", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h.{}", "attn", "mlp"),
}
SINK = 1


def hooked(family: str, zero: tuple[tuple[int, str], ...] = ()) -> dict[str, np.ndarray]:
    """Every prompt alone through the plain model, some parts set to zero at the sink."""
    model = BY_NAME[family].build().eval()
    tokens = BY_NAME[family].tokens(prompts=3, length=12)
    block, attn, ffn = PLACES[family]
    kept: dict[str, list[np.ndarray]] = {"attention": [], "ffn": [], "state": [], "in": []}

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def part(name: str, layer: int):
        def hook(_, args, output):
            if (layer, name) in zero:
                first(output)[:, SINK] = 0
            kept[name].append(first(output)[0].double().numpy().copy())

        return hook

    layers = model.config.num_hidden_layers
    for layer in range(layers):
        at = model.get_submodule(block.format(layer))
        at.get_submodule(attn).register_forward_hook(part("attention", layer))
        at.get_submodule(ffn).register_forward_hook(part("ffn", layer))
        at.register_forward_pre_hook(
            lambda _, args, kwargs: kept["in"].append(
                (args[0] if args else kwargs["hidden_states"])[0].double().numpy().copy()
            ),
            with_kwargs=True,
        )
        at.register_forward_hook(
            lambda _, args, output: kept["state"].append(first(output)[0].double().numpy().copy())
        )
    paid, losses = [], []
    with torch.inference_mode():
        for row in tokens:
            out = model(row[None], output_attentions=True, use_cache=False)
            pattern = torch.stack(out.attentions)[:, 0, :, SINK + 1 :, SINK]  # [layer head query]
            paid.append(pattern.double().mean((1, 2)).numpy())
            logs = out.logits[0].double().log_softmax(-1)
            nll = [-float(logs[i, row[i + 1]]) for i in range(SINK + 1, len(row) - 1)]
            losses.append(np.mean(nll))
    shape = len(tokens), layers
    found = {name: np.stack(x).reshape(*shape, *x[0].shape) for name, x in kept.items()}
    return found | {"paid": np.stack(paid), "loss": np.array(losses)}


@pytest.fixture(scope="module", params=PLACES)
def both(request: pytest.FixtureRequest) -> tuple[str, SinkLife, dict[str, np.ndarray]]:
    family = BY_NAME[request.param]
    texts = ss.token_ids(family.tokens(prompts=3, length=12))
    found = sink_life(family.build(), texts, sink=SINK, progress=False)
    return request.param, found, hooked(request.param)


def test_parts_and_their_sum(both) -> None:
    _, found, want = both
    state = want["state"][:, :, SINK]
    norm = np.linalg.norm(state, axis=-1)
    u = state.mean(0)[norm.mean(0).argmax()]
    u /= np.linalg.norm(u)
    for row, part in enumerate(found.parts):
        np.testing.assert_allclose(found.added[row], want[part][:, :, SINK] @ u, atol=1e-4)
    np.testing.assert_allclose(found.along, state @ u, atol=1e-4)
    np.testing.assert_allclose(found.start, want["in"][:, 0, SINK] @ u, atol=1e-4)
    total = found.start[:, None] + found.added.sum(0).cumsum(1)
    np.testing.assert_allclose(total, found.along, atol=1e-4)
    shares = (np.stack([want[p][:, :, SINK] @ u for p in found.parts]).mean(1)) / (
        (state @ u).mean(0).max()
    )
    for (layer, part), role in found.roles().items():
        share = shares[found.parts.index(part), layer]
        assert role == ("writer" if share >= ROLE else "eraser" if share <= -ROLE else "carrier")
    change = shares.sum(0)
    assert found.steps()["up"][0] == change.argmax() and found.steps()["down"][0] == change.argmin()


def test_what_is_constant(both) -> None:
    _, found, want = both
    for place, position in enumerate((SINK, found.control)):
        for layer in range(found.norm.shape[1]):
            h = want["state"][:, layer, position]
            energy = np.mean([v @ v for v in h])
            share = h.mean(0) @ h.mean(0) / energy
            assert float(found.constant_share[place, layer]) == pytest.approx(share, abs=1e-5)
            pairs = [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for i, a in enumerate(h)
                for j, b in enumerate(h)
                if i != j
            ]
            assert float(found.mean_cosine[place, layer]) == pytest.approx(np.mean(pairs), abs=1e-5)


def test_the_effect_of_removing_writers(both) -> None:
    family, found, want = both
    writers = tuple((layer, part) for layer, part, _ in found.of_role("writer"))
    assert bool(writers) == (family != "gemma3"), "whose scaled embeddings outweigh every part"
    assert found.removed[0] == () and set(found.removed[-1]) == set(writers)
    for case in {0, len(found.removed) - 1}:
        again = hooked(family, found.removed[case]) if case else want
        np.testing.assert_allclose(found.attention[case], again["paid"], atol=1e-5)
        np.testing.assert_allclose(found.loss[case], again["loss"], atol=1e-4)
    rows = found.statistics()["removed"]
    assert rows[-1]["loss_change"].mean == pytest.approx(
        float(found.loss[-1].mean() - found.loss[0].mean()), abs=1e-5
    )


def ffn_of(family: str, layer: int) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A plain FFN, and what goes into it and into its down-projection, prompt by prompt."""
    model = BY_NAME[family].build().eval()
    ffn = model.get_submodule(PLACES[family][0].format(layer)).mlp
    down = ffn.c_proj if family == "gpt2" else ffn.down_proj
    seen: dict[str, list[np.ndarray]] = {"x": [], "a": []}
    for name, module in (("x", ffn), ("a", down)):
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0][0].double().numpy())
        )
    with torch.inference_mode():
        for row in BY_NAME[family].tokens(prompts=3, length=12):
            model(row[None])
    return ffn, np.stack(seen["x"]), np.stack(seen["a"])


def test_neurons_and_trigger(both) -> None:
    family, found, _ = both
    ffn, x, a = ffn_of(family, found.ffn_layer)
    gated = family != "gpt2"
    out = (ffn.down_proj.weight.T if gated else ffn.c_proj.weight).detach().double().numpy()
    mean = (a[:, SINK] @ out).mean(0)
    shares = [a[:, SINK, n].mean() * (out[n] @ mean) / (mean @ mean) for n in range(len(out))]
    assert found.neuron[0] == np.abs(shares).argmax()
    np.testing.assert_allclose(
        found.neuron_share, np.array(shares)[found.neuron.numpy()], atol=1e-4
    )
    assert sum(shares) == pytest.approx(1)
    if not gated:
        assert "has no gate" in found.no_trigger and found.trigger is None
        assert "No trigger direction" in found.summary()
        return
    channel = np.abs(mean).argmax()
    assert found.channel == channel
    form = np.zeros((x.shape[-1], x.shape[-1]))
    gate, up = (w.weight.detach().double().numpy() for w in (ffn.gate_proj, ffn.up_proj))
    for n in range(len(out)):
        form += out[n, channel] * np.outer(gate[n], up[n])
    values, vectors = np.linalg.eigh((form + form.T) / 2)
    s = vectors[:, np.abs(values).argmax()]
    np.testing.assert_allclose(found.trigger.abs(), np.abs(x @ s), atol=1e-3)
    assert abs(float(found.eigenvalue[0])) == pytest.approx(np.abs(values).max(), rel=1e-4)
    direct = [one[SINK] @ form @ one[SINK] for one in x]
    np.testing.assert_allclose(found.quadratic, direct, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.written, a[:, SINK] @ out[:, channel], atol=1e-4)
    assert found.rank_one == pytest.approx((values**2).max() / (values**2).sum(), rel=1e-4)


def test_words_table_and_figure(both) -> None:
    _, found, _ = both
    assert "Writers:" in found.summary() and found.to_dict()["sink"] == SINK
    frame = found.to_frame()
    row = frame.query("metric == 'added' and part == 'ffn' and prompt == 2 and layer == 1")
    assert row["value"].item() == pytest.approx(float(found.added[1, 2, 1]))
    assert set(frame["metric"]) >= {"added", "along", "residual_peak", "constant_share", "loss"}
    assert len(found.figures()["life"].layout.annotations) >= 6


def test_an_ending_too_soon_is_refused() -> None:
    with pytest.raises(TextError, match="should have 2 tokens after it"):
        sink_life(BY_NAME["llama"].build(), ss.token_ids([[1, 2, 3]]), sink=1, progress=False)


def test_one_constructed_writer_with_a_known_trigger() -> None:
    """The FFN of block 1 has one neuron, which writes dim 3 for inputs along dim 5."""
    model = BY_NAME["llama"].build()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
            if layer == 1:
                block.mlp.gate_proj.weight.zero_()[7, 5] = 40.0
                block.mlp.up_proj.weight.zero_()[7, 5] = 40.0
                block.mlp.down_proj.weight[3, 7] = 2.0
        embedding = model.model.embed_tokens.weight
        embedding.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))[:, 5] = 0
        embedding[9, 5] = 3.0
    tokens = torch.randint(10, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 9
    found = sink_life(model, ss.token_ids(tokens), progress=False)
    assert [one[:2] for one in found.of_role("writer")] == [(1, "ffn")]
    assert found.ffn_layer == 1 and found.channel == 3 and found.neuron[0] == 7
    assert float(found.neuron_share[0]) == pytest.approx(1)
    assert found.rank_one == pytest.approx(1) and found.tokens_at_sink == 1
    assert float(found.eigenvalue[0]) == pytest.approx(2 * 40 * 40)
    assert (found.trigger[:, 1:].abs() < 1e-5).all() and (found.trigger[:, 0].abs() > 1).all()
    torch.testing.assert_close(found.quadratic, found.written, rtol=1e-4, atol=1e-4)
    assert float(found.ratio_without[1].max()) < float(found.ratio.max()) / 10


def test_parts_that_do_not_add_up_are_refused() -> None:
    """BERT normalises after each addition, so its parts are no shares of what it keeps."""
    texts = ss.token_ids(BY_NAME["bert"].tokens(prompts=2, length=12))
    with pytest.raises(UnsupportedError, match="BertForMaskedLM .* do not add up"):
        sink_life(BY_NAME["bert"].build(), texts, progress=False)
