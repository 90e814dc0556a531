"""What the experiments read and remove equals transformers' own tensors, on tiny models."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.nonmixture import nonmixture
from sinkscope.experiments.trace_peak import trace_peak
from sinkscope.experiments.waiver import position_embeddings, position_norms, structured_mask
from sinkscope.experiments.which_part import which_part
from tests.families.architectures import BY_NAME, N_LAYERS, Family
from tests.families.reference import reference
from tests.interventions.test_families import (
    TABLES,
    attention,
    masked,
    module_of,
    module_output,
)

P = 15
NAMES = ("llama", "gemma2", "gpt_oss", "gpt2", "bert")


@pytest.fixture(params=NAMES)
def chosen(request: pytest.FixtureRequest) -> Family:
    return BY_NAME[request.param]


def norms(x: Tensor) -> np.ndarray:
    return np.sqrt((x.double().numpy() ** 2).sum(-1))


def test_conditions_are_what_the_masked_model_does(chosen: Family) -> None:
    """Received attention, what 0 and the position are paid, norms, FFN outputs and the loss."""
    tokens = chosen.tokens(prompts=4)
    model = ss.load_model(chosen.build())
    found = structured_mask(model, ss.token_ids(tokens), P, starts=["given"], progress=False)
    assert found.changes == ("unchanged", "designated")
    for index, positions in enumerate([[], [P]]):
        plain = chosen.build()
        with attention(plain, masked(plain, chosen, positions)):
            ref = reference(plain, tokens, parts=chosen.parts)
        pattern = ref["attentions"].double().numpy()  # [layer prompt head query key]
        later = [i for i in range(24) if i not in (0, P) and (i > P or not chosen.causal)]
        paid = pattern[..., later, :][..., [0, P]].mean(3)
        np.testing.assert_allclose(found.paid[index].numpy(), paid.transpose(1, 0, 2, 3), atol=1e-5)
        visible = ref["visible"].numpy().astype(bool)
        # Which queries see a key is a matter of the model, not of the mask put on one query.
        received = np.zeros((4, N_LAYERS, 24))
        for layer in range(N_LAYERS):
            for key in range(24):
                seeing = [i for i in range(24) if visible[layer, 0, i, key]]
                received[:, layer, key] = pattern[layer][:, :, seeing, key].mean((1, 2))
        np.testing.assert_allclose(found.received_attention[index].numpy(), received, atol=1e-5)
        np.testing.assert_allclose(
            found.residual_norm[index].numpy(), norms(ref["resid_post"]).swapaxes(0, 1), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.value_norm[index].numpy(), norms(ref["values"]).mean(-1).swapaxes(0, 1), rtol=1e-4
        )
        ffn = ref["mlp_out"].numpy()
        np.testing.assert_allclose(
            found.ffn_output[index].numpy(), ffn[:, :, [0, P]].swapaxes(0, 1), atol=1e-4
        )
        if chosen.causal:
            probability = ref["logits"].double().softmax(-1)[:, :-1]
            told = probability.gather(-1, tokens[:, 1:, None])[..., 0]
            np.testing.assert_allclose(
                found.loss[index, :, :-1].numpy(), -told.log().numpy(), atol=1e-4
            )
        else:
            assert found.loss is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_removals_are_those_of_transformers_modules(name: str, part: str) -> None:
    """‖h‖ at the sink and the attention paid to it, with one module's output replaced by hand."""
    family = BY_NAME[name]
    tokens, sink, block = family.tokens(prompts=3), 2, 1
    traced = trace_peak(
        family.build(), ss.token_ids(tokens), sink=sink, blocks=[0, block], progress=False
    )
    signal = {"attention": "attn_out", "ffn": "mlp_out"}[part]
    clean = reference(family.build(), tokens, parts=family.parts)
    outputs = clean[signal][block].double().numpy()
    others = [i for i in range(24) if i != sink]
    instead = {
        "zero": np.zeros(outputs.shape[-1]),
        "typical": outputs[:, others].mean((0, 1)),
        "mean": outputs[:, sink].mean(0),
    }
    np.testing.assert_allclose(
        traced.peak.numpy(), norms(clean["resid_post"])[:, :, sink].T, rtol=1e-4
    )
    for mode, value in instead.items():
        plain = family.build()

        def change(x: Tensor, value: np.ndarray = value) -> Tensor:
            x[:, sink] = torch.tensor(value).to(x)
            return x

        with ExitStack() as stack:
            where = module_of(family, block, signal)
            stack.enter_context(module_output(plain, where, tuple(tokens.shape), change))
            ref = reference(plain, tokens, parts=family.parts)
        row = 1, traced.parts.index(part), traced.modes.index(mode)
        norm = norms(ref["resid_post"])
        np.testing.assert_allclose(traced.peak_without[row].numpy(), norm[:, :, sink].T, rtol=1e-4)
        ratio = norm[:, :, sink] / np.median(norm[:, :, others], axis=-1)
        np.testing.assert_allclose(traced.peak_ratio_without[row].numpy(), ratio.T, rtol=1e-4)
        paid = ref["attentions"].double().numpy()[:, :, :, sink + 1 :, sink].mean(-1)
        np.testing.assert_allclose(
            traced.attention_without[row].numpy(), paid.swapaxes(0, 1), atol=1e-5
        )


def test_a_planted_writer_is_found() -> None:
    """A block whose FFN writes a huge dim at one token is named, with its neuron and its reader."""
    model = BY_NAME["llama"].build()
    block, neuron, dim, token = 1, 7, 5, 50
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[token] = 0
        embedding[token, 0] = 30.0  # a direction of its own, which the first norm keeps
        embedding[:token, 0], embedding[token + 1 :, 0] = 0, 0
        mlp = model.model.layers[block].mlp
        mlp.gate_proj.weight[neuron] = 0
        mlp.gate_proj.weight[neuron, 0] = 4.0
        mlp.up_proj.weight[neuron] = 0
        mlp.up_proj.weight[neuron, 0] = 4.0
        mlp.down_proj.weight[:, neuron] = 0
        mlp.down_proj.weight[dim, neuron] = 20.0
    tokens = BY_NAME["llama"].tokens(prompts=4)
    tokens[tokens == token] = 51
    tokens[:, 0] = token
    texts = ss.token_ids(tokens)
    bridge = ss.load_model(model)
    traced = trace_peak(bridge, texts, progress=False)
    assert traced.needed("zero")[0][:2] == (block, "ffn")
    assert traced.written_in == block
    assert "The FFN of block 1 writes the peak: set to zero" in traced.summary()
    found = nonmixture(bridge, texts, over_median=50.0, progress=False)
    assert {(record["layer"], record["dim"]) for record in found.found} == {(block, dim)}
    assert found.first_writers() == {dim: block}
    writer = found.neurons()[0]
    assert (writer["layer"], writer["dim"], writer["neuron"]) == (block, dim, neuron)
    assert writer["share"] > 0.9
    parts = which_part(bridge, texts, P, start="given", progress=False)
    assert parts.peak_layer == block
    by_name = dict(zip(parts.cases, parts.peak.mean(1).tolist(), strict=False))
    assert by_name["the peak's dims set to 0"] < 0.2 * float(parts.peak[0].mean())


def test_a_part_is_named_only_where_its_interval_ends_below_half() -> None:
    """Shares left of 10 over 1: -90 % and 70 % by turns; surely 20 %; surely below the others."""
    from sinkscope.experiments.trace_peak import PeakTrace

    def traced(*without: list[float]) -> PeakTrace:
        now = torch.tensor(without)[:, None, None, :, None]  # [removed part mode prompt layer]
        prompts = now.shape[3]
        return PeakTrace(
            about="synthetic",
            sink=0,
            blocks=tuple(range(len(without))),
            parts=("ffn",),
            modes=("zero",),
            peak=torch.full((prompts, 1), 11.0),
            peak_ratio=torch.full((prompts, 1), 11.0),
            attention=torch.full((prompts, 1, 2), 0.5),
            peak_without=now,
            peak_ratio_without=now,
            attention_without=torch.full((len(without), 1, 1, prompts, 1, 2), 0.4),
        )

    unsure, sure, below = [-8.0, 8.0] * 2, [3.0, 2.9, 3.1, 3.0], [-1.0, -1.1, -1.2, -1.0]
    found = traced(unsure, sure)
    assert [one[:2] for one in found.needed()] == [(1, "ffn")]
    assert "necessary for the peak: set to zero, it leaves 20 % [19, 21] of it" in found.summary()
    text = traced(unsure).summary()
    assert "No single part is significantly necessary" in text and "writes the peak" not in text
    assert "leaves least, nothing of it (a norm below that of the others: -10 % [" in text
    assert "leaves nothing of it (a norm below that of the others: -2" in traced(below).summary()
    assert traced([3.0]).needed() == [(0, "ffn", pytest.approx(0.2))], "one prompt has no interval"


def test_peaks_are_over_the_median_of_an_even_number_as_numpy_takes_it() -> None:
    family = BY_NAME["llama"]
    tokens = family.tokens(prompts=3)
    others = [i for i in range(24) if i not in (0, P)]
    assert len(others) % 2 == 0
    norm = norms(reference(family.build(), tokens, parts=family.parts)["resid_post"])
    want = norm[:, :, 0] / np.median(norm[:, :, others], axis=-1)  # [layer prompt]
    model, texts = ss.load_model(family.build()), ss.token_ids(tokens)
    parts = which_part(model, texts, P, start="given", progress=False)
    np.testing.assert_allclose(parts.peak[0].numpy(), want.max(0), rtol=1e-4)
    found = structured_mask(model, texts, P, starts=["given"], progress=False)
    np.testing.assert_allclose(found.peak(0, 0).numpy(), want.T, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_position_norms(name: str) -> None:
    family = BY_NAME[name]
    plain = family.build()
    where, first = TABLES[name]
    want = norms(plain.get_submodule(where).weight.detach()[first:])
    found = position_norms(family.build())
    np.testing.assert_allclose(found.norm.numpy(), want, rtol=1e-5)
    assert len(found.norm) == 64
    assert found.statistics()["first_over_median"] == pytest.approx(
        want[0] / np.median(want[1:]), rel=0.05
    )
    with pytest.raises(UnsupportedError, match="no learned position vectors"):
        position_norms(BY_NAME["llama"].build())


def test_position_conditions_edit_what_they_say() -> None:
    """Each change of the fourth figure against the same edit of a copy of the table."""
    family = BY_NAME["bert"]
    tokens = family.tokens(prompts=2)
    found = position_embeddings(
        family.build(), ss.token_ids(tokens), P, starts=["given"], progress=False
    )
    expected = {
        "unchanged": {},
        "first replaced": {P: 0},
        "last replaced": {P: 63},
        "first swapped": {P: 0, 0: P},
        "last swapped": {P: 63, 63: P},
    }
    assert found.changes == tuple(expected)
    for index, moves in enumerate(expected.values()):
        plain = family.build()
        table = plain.get_submodule(TABLES["bert"][0]).weight
        old = table.detach().clone()
        with torch.no_grad():
            for target, source in moves.items():
                table[target] = old[source]
        ref = reference(plain, tokens, parts=family.parts)
        np.testing.assert_allclose(
            found.residual_norm[index].numpy(), norms(ref["resid_post"]).swapaxes(0, 1), rtol=1e-4
        )


def test_results_come_as_words_tables_figures_and_files(tmp_path) -> None:
    family = BY_NAME["llama"]
    texts = ss.token_ids(family.tokens(prompts=3))
    model = ss.load_model(family.build())
    results = {
        "nonmixture": nonmixture(model, texts, progress=False),
        "mask": structured_mask(model, texts, P, starts=["given", "random"], progress=False),
        "parts": which_part(model, texts, P, start="random", progress=False),
        "trace": trace_peak(model, texts, modes=["zero"], progress=False),
    }
    for name, result in results.items():
        files = result.save(tmp_path / name)
        assert [file.suffix for file in files] == [".json", ".csv", ".html"]
        page = files[2].read_text()
        assert page.count('<div class="figure wide"') == len(result.figures())
        assert f"<h1>{result.QUESTION}</h1>" in page and result.QUESTION.endswith("?")
        assert not result.to_frame().empty
        assert repr(result).startswith("LlamaForCausalLM · T = 24")
    mask = results["mask"]
    assert " · BOS: as each condition says · " in mask.about, (
        "the starts differ from the texts' own"
    )
    frame = mask.to_frame()
    at = frame[(frame["metric"] == "residual_norm") & (frame["position"] == P)]
    at = at[(at["condition"] == mask.names[1]) & (at["layer"] == 2) & (at["prompt"] == 1)]
    assert at["value"].tolist() == pytest.approx([float(mask.residual_norm[1, 1, 2, P])])


@pytest.mark.parametrize("length", [4, 5, 24])
def test_the_last_position_that_is_taken_has_a_loss_after_it(length: int) -> None:
    """By default in short prompts, and where it is named; the loss by transformers' own."""
    family = BY_NAME["llama"]
    tokens = family.tokens(prompts=2, length=length)
    model, last = ss.load_model(family.build()), length - 3
    with torch.no_grad():
        logits = family.build()(tokens).logits[:, last + 1]
    want = -logits.log_softmax(-1)[range(2), tokens[:, -1]].numpy()
    texts, options = ss.token_ids(tokens), dict(starts=["given"], progress=False)
    named = last if length == 24 else None
    mask = structured_mask(model, texts, named, **options)
    assert mask.position == last
    np.testing.assert_allclose(mask.loss[0, :, last + 1].numpy(), want, atol=1e-4)
    after = mask.statistics()[mask.names[1]]["loss_change"]["after_it"]
    plain = family.build()
    with attention(plain, masked(plain, family, [last])), torch.no_grad():
        logits = plain(tokens).logits[:, last + 1]
    masked_loss = -logits.log_softmax(-1)[range(2), tokens[:, -1]].numpy()
    assert after.mean == pytest.approx((masked_loss - want).mean(), abs=1e-4)
    assert "nan" not in mask.summary()
    parts = which_part(model, texts, named, start="given", progress=False)
    np.testing.assert_allclose(parts.loss[0].numpy(), want, atol=1e-4)
    bert = BY_NAME["bert"]
    found = structured_mask(
        bert.build(), ss.token_ids(bert.tokens(prompts=2, length=length)), length - 2, **options
    )
    assert found.position == length - 2, "without a loss, one token after it is enough"


def test_refusals() -> None:
    family = BY_NAME["llama"]
    model = ss.load_model(family.build())
    ragged = ss.token_ids([[5] * 9, [6] * 12])
    with pytest.raises(TextError, match="equal length"):
        structured_mask(model, ragged, 4, starts=["given"], progress=False)
    with pytest.raises(TextError, match="2 tokens after it, .* from 0 to 21"):
        structured_mask(model, ss.token_ids(family.tokens()), 22, starts=["given"], progress=False)
    with pytest.raises(UnsupportedError, match="0 first layers"):
        which_part(model, ss.token_ids([[5, 6]]), start="given", first_layers=(1, 0))
    with pytest.raises(TextError, match="beside position 0"):
        structured_mask(model, ss.token_ids(family.tokens()), 0, starts=["given"], progress=False)
    with pytest.raises(TextError, match="no tokenizer"):
        structured_mask(model, ss.token_ids(family.tokens()), progress=False)
    with pytest.raises(UnsupportedError, match="No starts are named"):
        structured_mask(model, ss.token_ids(family.tokens()), 5, starts=[], progress=False)
    with pytest.raises(UnsupportedError, match="No modes are named"):
        trace_peak(model, ss.token_ids(family.tokens()), modes=(), progress=False)
    with pytest.raises(UnsupportedError, match="No parts are named"):
        trace_peak(model, ss.token_ids(family.tokens()), parts=(), progress=False)
    with pytest.raises(UnsupportedError, match="mode is .median.; expected one of"):
        trace_peak(model, ss.token_ids(family.tokens()), modes=["median"], progress=False)
