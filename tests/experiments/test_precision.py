"""What low precision costs, against plain transformers models quantised by hooks."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.errors import ReportError, TextError, UnsupportedError
from sinkscope.experiments import precision as module
from sinkscope.experiments.precision import Precision, pivots, precision

from ..families.architectures import BY_NAME
from ..interventions.test_quantise import by_hand, per_token

LLAMA = BY_NAME["llama"]
TOKENS = LLAMA.tokens(prompts=3, length=12)
TEXTS = ss.token_ids(TOKENS)
LAYERS = (0, 1, 2)


def per_tensor(x: Tensor, keep: tuple[int, ...] = ()) -> Tensor:
    """Each prompt's whole tensor on one int8 grid, prompt by prompt [prompt position dim]."""
    out, rest = x.clone(), [t for t in range(x.shape[1]) if t not in keep]
    for b in range(len(x)):
        step = x[b, rest].abs().max() / 127
        out[b, rest] = (x[b, rest] * step.reciprocal()).round().clamp(-127, 127) * step
    return out


def predictions(plain, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the mean loss of each prompt in double precision."""
    with torch.no_grad():
        logits = plain(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    return logits[:, :-1].double().log_softmax(-1), loss.mean(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_losses_and_divergences_are_those_of_transformers(name: str) -> None:
    family = BY_NAME[name]
    tokens = family.tokens(prompts=2, length=10)
    schemes = {
        "int8-token": (partial(per_token, bits=8), partial(per_token, bits=8, keep=(0, 4))),
        "int8-tensor": (per_tensor, partial(per_tensor, keep=(0, 4))),
    }
    found = precision(
        family.build(),
        ss.token_ids(tokens),
        schemes=schemes,
        sinks=[0, 4],
        first=[1],
        progress=False,
    )
    every = found.tensors
    assert every == ["attn_in", "key", "value", "z", "mlp_in", "neurons"]
    full, loss = predictions(family.build(), tokens)
    assert ((found.loss - loss).abs() <= 1e-6 * loss.clamp(min=1)).all(), "nothing is quantised"

    def check(got: tuple[Tensor, Tensor], tensors, change, layers=LAYERS) -> None:
        plain = family.build()
        with by_hand(plain, family, set(tensors), tuple(tokens.shape), change, layers):
            now, loss = predictions(plain, tokens)
        kl = (full.exp() * (full - now)).sum(-1).mean(1)
        # A rounding of the last bit may take an entry to the next point of its grid.
        assert (got[0] - loss[: len(got[0])]).abs().max() <= 2e-3
        torch.testing.assert_close(
            got[1].double(), kl[: len(got[1])], rtol=0.1, atol=1e-6, msg=lambda said: said
        )

    for s, (bare, kept) in enumerate(schemes.values()):
        at = found.kept.index
        check((found.quantised_loss[s, 0], found.divergence[s, 0]), every, bare)
        own = found.quantised_loss[s, at("sinks")], found.divergence[s, at("sinks")]
        check(own, every, kept)
        t = every.index("value")
        check((found.alone_loss[s, t], found.alone_divergence[s, t]), ["value"], bare)
        rest = [tensor for tensor in every if tensor != "value"]
        check((found.without_loss[s, t], found.without_divergence[s, t]), rest, bare)
    t = every.index("neurons")
    assert found.mapped == "int8-token"
    for state, change in enumerate(schemes["int8-token"]):
        cell = found["map_loss"][state, 2, t], found["map_divergence"][state, 2, t]
        check(cell, ["neurons"], change, layers=(2,))


def test_prompts_of_several_lengths_are_as_if_each_were_alone() -> None:
    ragged = [TOKENS[0].tolist(), TOKENS[1, :7].tolist(), TOKENS[2].tolist()]
    measure = partial(
        precision, schemes="int8-tensor", tensors=["key", "neurons"], sinks=0, first=[],
        mapped=None, progress=False,
    )  # fmt: skip
    both = measure(LLAMA.build(), ss.token_ids(ragged))
    for row, ids in enumerate(ragged):
        alone = measure(LLAMA.build(), ss.token_ids([ids]))
        for name in ("loss", "quantised_loss", "divergence", "alone_divergence"):
            torch.testing.assert_close(both[name][..., row], alone[name][..., 0])


def test_static_ranges_are_of_the_other_texts_without_their_kept_tokens() -> None:
    other = ss.token_ids(LLAMA.tokens(prompts=2, length=9, seed=5))
    model = ss.load_model(LLAMA.build())
    scheme = "int4-channel-asym-static"
    found = precision(
        model, TEXTS, schemes=scheme, sinks=0, first=[], calibration=other, mapped=None,
        progress=False,
    )  # fmt: skip
    for rule, keep in (("nothing", ()), ("sinks", (0,))):
        plain = LLAMA.build()
        with ss.Quantise(model, scheme, keep=keep, calibration=other), torch.no_grad():
            logits = model(TOKENS)
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none"
        ).mean(1)
        torch.testing.assert_close(found._loss(scheme, rule), nll, atol=1e-5, rtol=1e-5)
        assert (nll - predictions(plain, TOKENS)[1]).abs().max() > 1e-3


def test_pivots_are_those_of_the_state_that_enters_each_layer() -> None:
    plain = LLAMA.build()
    with torch.no_grad():
        states = plain(TOKENS, output_hidden_states=True).hidden_states
    found = pivots(ss.load_model(LLAMA.build()), TEXTS)
    assert found.shape == (3, 3, 12)
    for layer in LAYERS:
        for prompt in range(3):
            size = states[layer][prompt].abs()
            cut = size.flatten().sort().values[-20]
            want = [t for t in range(12) if bool((size[t] >= cut).any())]
            assert found[layer, prompt].nonzero().flatten().tolist() == want


def planted() -> torch.nn.Module:
    """Neuron 5 of layer 1 is 1,000 times as large at every token, and counts a thousandth."""
    plain = LLAMA.build()
    ffn = plain.model.layers[1].mlp
    with torch.no_grad():
        ffn.up_proj.weight[5] *= 1000
        ffn.down_proj.weight[:, 5] /= 1000
    return plain


def test_the_keep_list_names_the_channel_that_does_the_damage(tmp_path: Path) -> None:
    found = precision(
        planted(), TEXTS, schemes="int8-tensor", sinks=0, tolerance=1e-4, progress=False
    )
    worst = max(found.cells(), key=lambda one: one["divergence"])
    assert (worst["layer"], worst["tensor"]) == (1, "neurons")
    assert worst["channels"][0] == 5 and worst["with_channels"] < worst["with_sinks"] / 10
    found.save(tmp_path / "precision")
    keep = json.loads((tmp_path / "precision.keep.json").read_text())
    assert keep["tokens"]["positions"] == [0] and keep["tokens"]["prompts"] == [[0]] * 3
    ids = {int(TOKENS[row, 0]) for row in range(3)}
    assert {one["id"] for one in keep["tokens"]["ids"]} == ids
    (channels,) = [c for c in keep["channels"] if (c["layer"], c["tensor"]) == (1, "neurons")]
    assert channels["channels"][0] == 5
    # The list as a quantiser would read it, on the model itself.
    model = ss.load_model(planted())
    whole = {(one["layer"], one["tensor"]) for one in keep["layers"]}
    with torch.no_grad(), ExitStack() as stack:
        for tensor in keep["tensors"]:
            layers = [layer for layer in LAYERS if (layer, tensor) not in whole]
            mine = [c for c in keep["channels"] if c["tensor"] == tensor]
            apart = {(c["layer"], tensor): c["channels"] for c in mine}
            stack.enter_context(
                ss.Quantise(model, keep["scheme"], tensor, layers, keep=0, channels=apart)
            )
        logits = model(TOKENS)
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none"
    ).mean(1)
    torch.testing.assert_close(found["listed_loss"], nll, atol=1e-4, rtol=0)
    listed, bare = found["listed_divergence"].mean(), found.divergence[0, 0].mean()
    assert listed < bare / 5


def test_a_model_without_a_sink_loses_nothing_by_quantising_the_first_token() -> None:
    """A toy model with softpick, trained until it predicts; the same with softmax has a sink."""
    from sinkscope import bb

    shape = bb.ModelConfig(layers=2, heads=1, width=32, context=32, attention="softpick")
    config = bb.TrainConfig(shape, steps=150, batch=32, length=32, learning_rate=3e-3)
    model = bb.to_bridge(bb.train(config, progress=False).model)
    tokens = bb.BigramBackcopy().sample(24, 32, seed=3)
    found = precision(
        model, ss.token_ids(tokens), schemes="int8-tensor", sinks=0, first=[], mapped=None,
        progress=False,
    )  # fmt: skip
    gain = found.recovered("int8-tensor")
    assert gain is not None and gain.low <= 0 <= gain.high
    assert gain.high - gain.low < 0.05


def test_a_destroyed_run_is_marked_and_has_no_gain() -> None:
    found = precision(
        LLAMA.build(), TEXTS, schemes=["int8-token", "fp8-token"], tensors=["value", "z"],
        sinks=0, first=[], mapped=None, progress=False,
    )  # fmt: skip
    broken = found.quantised_loss.clone()
    broken[1, 0] = found.loss + math.log(10.5)
    worse = dataclasses.replace(found, quantised_loss=broken)
    assert not found.is_destroyed(found.loss + math.log(9.5))
    assert worse.recovered("fp8-token") is None and worse.recovered("int8-token") is not None
    assert worse.cost("fp8-token").mean == pytest.approx(math.log(10.5), abs=1e-5)
    facts = worse.to_dict()["schemes"]["fp8-token"]["kept"]
    assert facts["nothing"]["destroyed"] and facts["sinks"]["recovered"] is None
    assert "destroyed" in worse.summary().split("fp8-token", 1)[1].splitlines()[0]
    frame = worse.to_frame()
    gone = frame[frame["destroyed"]]
    assert set(zip(gone["scheme"], gone["kept"], gone["what"], strict=True)) == {
        ("fp8-token", "nothing", "all")
    }
    (note,) = worse.figures()["kept-tokens"].layout.annotations
    assert (note.text, note.x) == ("destroyed", 1)
    assert found.is_destroyed(torch.tensor([1.0, math.nan, 1.0]))


def test_an_interrupted_run_continues_and_comes_to_the_same(monkeypatch, tmp_path: Path) -> None:
    measure = partial(
        precision, schemes="int8-tensor", tensors=["key", "z"], sinks=0, first=[], progress=False
    )
    whole = measure(LLAMA.build(), TEXTS)
    file = tmp_path / "precision.nc"
    real, calls = module._Run.__call__, []

    def stop_later(self, case, rows):
        calls.append(case)
        if len(calls) in (5, 20):
            raise KeyboardInterrupt
        return real(self, case, rows)

    monkeypatch.setattr(module._Run, "__call__", stop_later)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure(LLAMA.build(), TEXTS, file=file)
    before = len(calls)
    found = measure(LLAMA.build(), TEXTS, file=file)
    assert found.equals(whole)
    assert len(calls) - before < before + 20
    done = len(calls)
    assert measure(LLAMA.build(), TEXTS, file=file).equals(whole) and len(calls) == done
    with pytest.raises(ReportError, match="another sinks"):
        measure(LLAMA.build(), TEXTS, file=file, sinks=1)


def test_sinks_are_by_default_the_tokens_that_a_scan_marks() -> None:
    model = ss.load_model(LLAMA.build())
    with torch.no_grad():  # token 7 becomes an outlier
        model.original_model.model.embed_tokens.weight[7] *= 60
    tokens = TOKENS.clone()
    tokens[tokens == 7] = 8
    tokens[1, 3] = 7
    texts = ss.token_ids(tokens)
    want = ss.scan(model, texts, progress=False).token_mask()
    assert want[1, 3]
    found = precision(
        model, texts, schemes="int8-token", tensors="value", mapped=None, first=[], progress=False
    )
    assert torch.equal(found.sinks, want.cpu())
    assert isinstance(found, Precision) and found.without_loss.isnan().all()


def test_what_cannot_be_measured_is_refused() -> None:
    cases = [
        (dict(schemes="int8-tensor-static"), UnsupportedError, "needs typical activations"),
        (dict(schemes=[]), UnsupportedError, "No scheme is named"),
        (dict(mapped="int8-channel"), UnsupportedError, "none of the schemes"),
        (dict(tensors="keys"), UnsupportedError, "tensor is 'keys'"),
        (dict(sinks=12), TextError, "positions run from 0 to 11"),
        (dict(first=[0]), TextError, "first"),
        (dict(map_prompts=0), TextError, "map_prompts"),
    ]
    for given, kind, why in cases:
        with pytest.raises(kind, match=why):
            precision(LLAMA.build(), TEXTS, progress=False, **given)
    bert = BY_NAME["bert"]
    with pytest.raises(UnsupportedError, match="no loss to compare"):
        precision(bert.build(), ss.token_ids(bert.tokens()), progress=False)


def test_smollm2_needs_its_sink_in_int8_per_tensor(smollm2) -> None:
    found = precision(
        smollm2,
        ss.texts("prose", prompts=3, length=48),
        schemes=["int8-tensor", "int8-token"],
        tensors=["mlp_in", "neurons"],
        sinks=0,
        first=[],
        mapped=None,
        progress=False,
    )
    gain = found.recovered("int8-tensor")
    assert gain is not None and gain.low > 0.2
    small = found.recovered("int8-token")
    assert small is not None and small.mean < gain.mean / 4
    inputs, neurons = (found.alone_loss[0] - found.loss).mean(1)
    assert neurons > 3 * inputs.abs()
