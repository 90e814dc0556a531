"""Hybrid models: some blocks attend, the others are linear attention, state-space or convolution.

Each is a tiny random model, measured against the tensors of transformers' own eager forward pass.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5EncoderModel

import sinkscope as ss
from sinkscope.errors import UnsupportedError
from sinkscope.experiments.trace_peak import trace_peak
from sinkscope.families import OWN, row, tiny_model

from .architectures import BY_NAME, VOCAB, Parts
from .oracle import expected
from .reference import reference
from .test_scan_families import MAGNITUDE, PROBABILITIES, PROBABILITY

FFN = Parts(ffn="mlp|feed_forward", down=None)
GATED = Parts(ffn="mlp", down=None, output="self_attn.o_proj")
NORMED = Parts(ffn="post_feedforward_layernorm|mlp", down=None)
HYBRIDS: dict[str, tuple[Parts, tuple[int, ...]]] = {
    "Qwen3_5ForCausalLM": (GATED, (3,)),
    "Qwen3NextForCausalLM": (GATED, (3,)),
    "Lfm2ForCausalLM": (FFN, (1, 3)),
    "FalconH1ForCausalLM": (FFN, (0, 1, 2, 3)),
    "OlmoHybridForCausalLM": (NORMED, (3,)),
    "JambaForCausalLM": (FFN, (1, 3)),
    "BambaForCausalLM": (FFN, (1, 3)),
}
LAYERS = 4
LENGTHS = np.array([20, 9, 16])
MASK = np.arange(20) < LENGTHS[:, None]


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, VOCAB, MASK.shape, generator=generator)


@cache
def model(name: str) -> PreTrainedModel:
    return tiny_model(name)


@cache
def oracle(name: str) -> dict[str, np.ndarray]:
    """Every prompt alone: some of these models mix padding into what comes after it."""
    parts, _ = HYBRIDS[name]
    rows = [
        expected(
            reference(tiny_model(name), ids[None, :n], parts=parts),
            np.ones((1, n), dtype=bool),
            causal=True,
        )
        for ids, n in zip(tokens(), LENGTHS, strict=True)
    ]
    return {
        field: np.concatenate([one[field] for one in rows])
        for field in rows[0]
        if _is_per_prompt(field)
    }


def _is_per_prompt(field: str) -> bool:
    return ss.SinkReport.variables()[field].dims[:2] == ("prompt", "layer")


def prompts() -> ss.Texts:
    return ss.token_ids([ids[:n].tolist() for ids, n in zip(tokens(), LENGTHS, strict=True)])


@pytest.mark.parametrize("way", ["eager", "streaming"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_fields_are_transformers_own_and_undefined_without_attention(name: str, way: str) -> None:
    attending = list(HYBRIDS[name][1])
    every = ("all", "ffn_dims")
    report = ss.scan(model(name), prompts(), metrics=every, batch=2, attention=way, progress=False)
    assert report.settings.attending == tuple(attending)
    compared = set()
    for field, want in oracle(name).items():
        got = getattr(report, field)
        if got is None:
            continue
        got = got.double().numpy()
        if want.shape[1] != LAYERS:
            others = np.setdiff1d(np.arange(LAYERS), attending)
            assert np.isnan(got[:, others]).all(), field
            got = got[:, attending]
        tolerance = PROBABILITY if field in PROBABILITIES else MAGNITUDE
        np.testing.assert_allclose(got, want, err_msg=field, **tolerance)
        compared.add(field)
    assert {"sink_attention", "value_drain", "head_output_norm", "honor"} <= compared
    assert {"residual_peak", "ffn_sink", "ffn_mixed_max", "sink_residual_norm"} <= compared
    can, metrics = ss.capabilities(ss.load_model(model(name))), report.metrics()
    by_layer = [field for field in report.measured() if field in metrics and _is_per_prompt(field)]
    for layer in range(LAYERS):
        defined = {metrics[f] for f in by_layer if not report[f][:, layer].isnan().all()}
        assert defined == {metrics[f] for f in by_layer} & set(can.measured_at(layer))


def test_the_description_says_what_each_layer_has() -> None:
    text = str(ss.capabilities(ss.load_model(tiny_model("Lfm2ForCausalLM"))))
    table = text[text.index("What can be measured in each layer") :]
    (without,) = [line for line in table.splitlines() if "no attention (conv)" in line]
    assert "0 and 2" in without and "residual, massive, ffn, outliers, cosine" in without
    assert "each layer" not in str(ss.capabilities(ss.load_model(BY_NAME["llama"].build())))


@pytest.mark.parametrize("positions", ["rope", "nope", None])
def test_granite_with_and_without_positions(
    positions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens takes positions that the config says nothing of for rotary ones."""
    name = "GraniteMoeHybridForCausalLM"
    monkeypatch.setitem(OWN, name, OWN[name] | {"position_embedding_type": positions})
    ids = tokens()
    oracle = expected(
        reference(tiny_model(name), ids, parts=Parts(ffn="shared_mlp", down=None)),
        np.ones(ids.shape, dtype=bool),
        causal=True,
    )
    bridge = ss.load_model(tiny_model(name))
    for way in ("eager", "streaming"):
        report = ss.scan(bridge, ss.token_ids(ids), attention=way, progress=False)
        for field in ("sink_attention", "attention_entropy", "value_drain", "head_output_norm"):
            got = getattr(report, field).double().numpy()[:, [1, 3]]
            np.testing.assert_allclose(got, oracle[field], err_msg=field, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(report.residual_peak, oracle["residual_peak"], rtol=1e-4)


def test_chunks_are_refused_beyond_the_first_and_plainly_causal_in_it() -> None:
    family = BY_NAME["llama4"]
    bridge = ss.load_model(family.build())
    with pytest.raises(UnsupportedError, match="to 32 keys at most.*a prompt has 33 tokens"):
        ss.scan(bridge, ss.token_ids(family.tokens(length=33)), progress=False)
    with ss.streaming(bridge) as stream, torch.no_grad():
        short, long = bridge(family.tokens(length=32)), bridge(family.tokens(length=40))
        assert stream.calls[0].mask is not None  # as transformers builds it
        bridge(family.tokens(length=32))
        assert stream.calls[0].mask is None and stream.calls[0].causal
    plain = family.build()
    with torch.no_grad():
        torch.testing.assert_close(
            short, plain(family.tokens(length=32)).logits, atol=4e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            long, plain(family.tokens(length=40)).logits, atol=4e-5, rtol=1e-5
        )


def test_a_t5_encoder_alone_is_refused_with_its_own_name() -> None:
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UnsupportedError, match="no adapter for T5EncoderModel alone"):
        ss.load_model(T5EncoderModel(config))


def test_a_factor_on_the_keys_is_shown_and_edits_act_as_on_the_stock_bridge() -> None:
    bridge, ids = ss.load_model(tiny_model("FalconH1ForCausalLM")), tokens()[:2, :12]
    attn = bridge.blocks[1].attn
    points = {"scaled": attn.hook_k, "raw": attn.k.hook_out}

    def edit(x, hook):
        return torch.cat([x[:, :3], -0.5 * x[:, 3:]], dim=1)

    def run() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name, point in points.items():
            point.add_hook(lambda x, hook, name=name: seen.update({name: x.flatten(2).clone()}))
        with torch.no_grad():
            seen["plain"] = bridge(ids)
            for point in points.values():
                point.remove_hooks()
            attn.hook_k.add_hook(edit)
            seen["edited"] = bridge(ids)
        attn.hook_k.remove_hooks()
        return seen

    stock = run()
    with ss.streaming(bridge):
        ours = run()
    assert stock.keys() == ours.keys() == {"scaled", "raw", "plain", "edited"}
    assert (stock["edited"] - stock["plain"]).abs().max() > 1e-3
    for name, want in stock.items():
        torch.testing.assert_close(ours[name], want, atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(ours["scaled"], 0.6 * ours["raw"])
    assert attn.original_component.key_multiplier == 0.6


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "FalconH1ForCausalLM"])
def test_batches_move_nothing(name: str) -> None:
    alone = ss.scan(model(name), prompts(), batch=1, progress=False)
    together = ss.scan(model(name), prompts(), batch=3, progress=False)
    for field in filter(_is_per_prompt, alone.measured()):
        torch.testing.assert_close(
            together[field], alone[field], atol=1e-5, rtol=1e-5, equal_nan=True
        )


def test_the_report_says_where_there_is_no_attention(tmp_path) -> None:
    report = ss.scan(model("Qwen3_5ForCausalLM"), prompts(), progress=False)
    assert "attention in layers 3, none in the others" in " ".join(repr(report).split())
    again = ss.load_report(report.save(tmp_path / "report.nc"))
    assert again.settings.without_attention == (0, 1, 2)
    figure = ss.plot.head_map(report)
    assert [note.text for note in figure.layout.annotations if note.text == "no attention"]
    assert np.isnan(np.array(figure.data[0].z, dtype=float)[:3]).all()
    assert "no attention" in report.to_html()
    merged = report.merge(again)
    assert torch.isnan(merged.received_attention[:3]).all()
    assert not torch.isnan(merged.received_attention[3]).any()


def test_heads_of_a_layer_without_attention_are_refused() -> None:
    bridge = ss.load_model(model("Lfm2ForCausalLM"))
    with pytest.raises(UnsupportedError, match="Layer 0 of this Lfm2ForCausalLM has no attention"):
        ss.AblateHeads(bridge, [(0, 1)])
    with pytest.raises(UnsupportedError, match="Layer 2 of this Lfm2ForCausalLM has no attention"):
        ss.SelfOnlyMask(bridge, 3, layers=[2])
    with ss.SelfOnlyMask(bridge, 3) as mask:
        assert mask.layers == (1, 3)


def test_a_peak_is_traced_through_every_block() -> None:
    """What stands in the place of attention is replaced like attention."""
    ids = tokens()[:2, :12]
    found = trace_peak(model("Lfm2ForCausalLM"), ss.token_ids(ids), modes=["zero"])
    bridge = tiny_model("Lfm2ForCausalLM")

    def without(module, args, output):
        return torch.cat([torch.zeros_like(output[:, :1]), output[:, 1:]], dim=1)

    handle = bridge.model.layers[0].conv.register_forward_hook(without)
    with torch.no_grad():
        states = bridge(ids, output_hidden_states=True).hidden_states
    handle.remove()
    want = torch.stack([state[:, 0].norm(dim=-1) for state in states[1:-1]], dim=1)
    got = found.peak_without[0, 0, 0][:, :-1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MambaForCausalLM", "no block of MambaForCausalLM attends to keys"),
        ("NemotronHForCausalLM", "runs each block of NemotronHForCausalLM as a whole"),
        ("RecurrentGemmaForCausalLM", "runs each block of RecurrentGemmaForCausalLM as a whole"),
    ],
)
def test_models_without_shown_attention_get_the_residual_stream(name: str, why: str) -> None:
    plain, states = tiny_model(name), []
    for block in plain.base_model.layers:
        block.register_forward_hook(lambda _, __, out: states.append(out))
    with torch.no_grad():
        plain(tokens())
    report = ss.scan(model(name), ss.token_ids(tokens()), progress=False)
    norms = torch.stack([state[:, 0].norm(dim=-1) for state in states], dim=1)
    torch.testing.assert_close(report.sink_residual_norm, norms, atol=1e-5, rtol=1e-5)
    assert report.sink_attention is None
    assert "no attention measured" in " ".join(repr(report).split())
    assert why in ss.capabilities(ss.load_model(model(name))).unavailable["sink_attention"]
    with pytest.raises(UnsupportedError, match=why):
        ss.scan(model(name), prompts(), metrics=["sink_attention"], progress=False)


def test_a_row_of_the_page_says_residual_stream_only() -> None:
    assert row("MambaForCausalLM").reason.endswith("residual stream only")
