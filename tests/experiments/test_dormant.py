"""Dormancy of domains: which heads are named, and what the tables say, against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ReportError, TextError, UnsupportedError
from sinkscope.experiments.ablation import Ablation, ablate_heads
from sinkscope.experiments.dormant import dormancy
from tests.families.architectures import BY_NAME, N_HEADS, N_LAYERS
from tests.families.reference import reference

LLAMA = BY_NAME["llama"]
# Random weights give no dormant head, so the thresholds are set where this model's heads lie.
BOUNDS = dict(sink_threshold=0.15, drop=0.05)
SEED = 11


def kinds(prompts: int = 8) -> dict[str, torch.Tensor]:
    """Two kinds of text: any tokens after another first one."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, first in (("low", 5), ("high", 60)):
        found[name] = torch.randint(4, 97, (prompts, 16), generator=generator)
        found[name][:, 0] = first
    return found


@pytest.fixture
def model():
    return ss.load_model(LLAMA.build(SEED))


def domains(prompts: int = 8) -> dict:
    return {name: ss.token_ids(tokens) for name, tokens in kinds(prompts).items()}


def sink_attention_by_hand(tokens: torch.Tensor) -> np.ndarray:
    """[prompt layer head]: mean over the queries after the first token of A_i0."""
    pattern = reference(LLAMA.build(SEED), tokens)["attentions"].double().numpy()
    found = np.zeros((len(tokens), N_LAYERS, N_HEADS))
    for prompt in range(len(tokens)):
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                rows = pattern[layer, prompt, head]
                found[prompt, layer, head] = np.mean([rows[i][0] for i in range(1, len(rows))])
    return found


def test_named_heads_follow_the_rule(model) -> None:
    found = dormancy(model, domains(), **BOUNDS, progress=False)
    by_hand = {name: sink_attention_by_hand(tokens) for name, tokens in kinds().items()}
    means = {name: x.mean(0) for name, x in by_hand.items()}
    p = found.p_values["low", "high"]
    want = set()
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            for here, there in (("low", "high"), ("high", "low")):
                parked = means[here][layer, head] > 0.15
                drops = means[here][layer, head] - means[there][layer, head] >= 0.05
                if parked and drops and p[layer, head] < 0.05:
                    want.add((layer, head, here, there))
    got = found.differing()
    keys = [(head["layer"], head["head"], head["dormant_on"], head["active_on"]) for head in got]
    assert set(keys) == want and len(keys) == len(want)
    assert {here for _, _, here, _ in want} == {"low", "high"}, "the case needs both directions"
    drops = [h["sink_attention"][0].mean - h["sink_attention"][1].mean for h in got]
    assert drops == sorted(drops, reverse=True)
    for domain in by_hand:
        np.testing.assert_array_equal(found.dormant(domain).numpy(), means[domain] > 0.15)


def test_alike_kinds_differ_in_nothing(model) -> None:
    """Two samples of one kind of text: no head is named."""
    tokens = kinds(12)["low"]
    same = {"one": ss.token_ids(tokens[::2]), "other": ss.token_ids(tokens[1::2])}
    found = dormancy(model, same, sink_threshold=0.05, drop=0.001, progress=False)
    assert found.differing() == []
    assert found.p_values["one", "other"].min() > 0.05
    assert "No head" in found.summary()


def test_the_frame_has_every_head_and_domain(model) -> None:
    found = dormancy(model, domains(), **BOUNDS, progress=False)
    frame = found.to_frame()
    assert len(frame) == 2 * N_LAYERS * N_HEADS
    scores = found.reports["high"].inactivity_scores()
    assert len(scores) == 14
    row = frame.query("domain == 'high' and layer == 2 and head == 1").iloc[0]
    for name, figures in scores.items():
        own = figures[:, 2, 1].double().numpy()
        assert row[name] == pytest.approx(own.mean(), rel=1e-5)
        assert own.min() <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= own.max()
    by_hand = sink_attention_by_hand(kinds()["high"])[:, 2, 1].mean()
    assert row["sink_attention"] == pytest.approx(by_hand, abs=1e-5)
    named = {(head["layer"], head["head"]) for head in found.differing()}
    for head, rows in frame.groupby(["layer", "head"]):
        assert rows["differs"].tolist() == [head in named] * 2
    assert {"attention_entropy", "head_output_norm", "honor", "p", "dormant"} <= set(frame)


def test_removal_is_on_the_first_prompts_and_of_named_heads_on_all(model) -> None:
    found = dormancy(
        model, domains(), **BOUNDS, remove=["zero", "mean"], remove_prompts=3, progress=False
    )
    named = found.differing()
    assert list(found.ablations) == ["zero", "mean"]
    whole = ablate_heads(model, domains()["low"], "zero", progress=False)
    got = found.ablations["zero"]["low"]
    measured = ~got.ablated_loss.isnan()
    assert measured[:3].all()
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            is_named = any((h["layer"], h["head"]) == (layer, head) for h in named)
            assert measured[3:, layer, head].all() == is_named
    torch.testing.assert_close(
        got.ablated_loss[measured], whole.ablated_loss[measured], atol=1e-5, rtol=0
    )
    for head in named:
        for place, domain in enumerate((head["dormant_on"], head["active_on"])):
            own = found.ablations["zero"][domain].loss_change[:, head["layer"], head["head"]]
            cost, effect = head["zero"]["cost"][place], head["zero"]["effect"][place]
            assert cost.mean == pytest.approx(float(own.mean()), abs=1e-6)
            assert effect.mean == pytest.approx(np.mean([abs(x) for x in own.tolist()]), abs=1e-6)


def test_a_domain_on_which_every_head_matters_more_confirms_none(model) -> None:
    """Effects drawn by hand: the named heads' stand out where they are active, or everybody's."""
    found = dormancy(model, domains(24), **BOUNDS, progress=False)
    named = [head for head in found.differing() if head["active_on"] == "high"]
    assert named and not any(head["active_on"] == "low" for head in found.differing())
    rng = np.random.default_rng(0)

    def judged(boost: np.ndarray) -> tuple[Any, list[bool]]:
        """Removals whose effects on "high" are those on "low" times the boost of each head."""
        changes = {
            name: rng.choice([-1, 1], shape) * rng.uniform(0.01, 0.02, shape) * factor
            for name, factor in (("low", np.ones_like(boost)), ("high", boost))
            for shape in [(24, N_LAYERS, N_HEADS)]
        }
        removals = {
            name: Ablation(
                about="", mode="zero", texts="", loss=torch.zeros(24), ablated_loss=torch.tensor(x)
            )
            for name, x in changes.items()
        }
        again = replace(found, ablations={"zero": removals})
        for name, x in changes.items():
            want = np.mean([np.median(np.abs(row).ravel()) for row in x])
            assert again.typical_effect("zero")[name] == pytest.approx(want)
        return again, [head["zero"]["confirmed"] for head in again.differing()]

    everybody = np.full((N_LAYERS, N_HEADS), 3.0)
    few = np.ones((N_LAYERS, N_HEADS))
    for head in named[:1]:
        few[head["layer"], head["head"]] = 3.0
    again, confirmed = judged(everybody)
    effects = again.differing()[0]["zero"]["effect"]
    assert effects[1].low > 2 * effects[0].high, "in nat the effect is plainly larger"
    assert not any(confirmed)
    again, confirmed = judged(few)
    assert confirmed == [True] + [False] * (len(named) - 1)
    assert f"confirms 1 of {len(named)}" in again.summary()


def test_prediction_is_a_rank_correlation_over_heads(model) -> None:
    found = dormancy(model, domains(), **BOUNDS, remove="zero", remove_prompts=4, progress=False)
    table = found.prediction("zero")
    assert len(table) == 2 * 15  # sink attention and the fourteen scores, on either domain
    for domain in ("low", "high"):
        cost = found.ablations["zero"][domain].loss_change[:4].double().mean(0).flatten().numpy()
        score = found.reports[domain].inactivity_scores()["AHON"][:4].double().mean(0)
        ordered = [z.argsort().argsort() for z in (score.flatten().numpy(), cost)]
        want = np.corrcoef(*ordered)[0, 1]
        row = table.query("domain == @domain and score == 'AHON'").iloc[0]
        assert row["rho"] == pytest.approx(want)
        assert row["low"] <= row["high"]
        assert row["expected"] == 1
    assert set(table.query("score == 'AWFT'")["expected"]) == {-1}
    effect = found.ablations["zero"]["high"].loss_change[:4].double().abs().mean(0).flatten()
    entropy = found.reports["high"].attention_entropy[:4].double().mean(0).flatten()
    ordered = [z.numpy().argsort().argsort() for z in (entropy, effect)]
    row = found.prediction("zero", "effect").query("domain == 'high' and score == 'AEQD'").iloc[0]
    assert row["rho"] == pytest.approx(np.corrcoef(*ordered)[0, 1])
    with pytest.raises(ReportError, match="choose 'cost' or 'effect'"):
        found.prediction("zero", "loss")
    with pytest.raises(ReportError, match="remove='mean'"):
        found.prediction("mean")


def test_the_figure_of_costs_is_on_the_prompts_that_its_sentence_counts(model) -> None:
    found = dormancy(model, domains(), **BOUNDS, remove="zero", remove_prompts=3, progress=False)
    assert found.differing(), "heads that were removed on all prompts are what the case is about"
    title = found.figures()["ablation-zero"].layout.title
    assert "on 3 prompts of each" in title.subtitle.text
    dots = {trace.name: trace for trace in found.figures()["ablation-zero"].data}
    for domain in ("low", "high"):
        attention = sink_attention_by_hand(kinds()[domain])[:3].mean(0).flatten()
        cost = found.ablations["zero"][domain].loss_change[:3].double().mean(0).flatten().numpy()
        np.testing.assert_allclose(dots[domain].x, attention, atol=1e-5)
        np.testing.assert_allclose(dots[domain].customdata[:, 2], cost, atol=1e-9)
        ordered = [z.argsort().argsort() for z in (attention, cost)]
        rho = f"{np.corrcoef(*ordered)[0, 1]:.2f}"
        assert f"{domain} ρ = {rho}" in title.text
        row = found.prediction("zero").query("domain == @domain and score == 'sink_attention'")
        assert f"{row.iloc[0]['rho']:.2f}" == rho


def test_words_figures_and_json(model, tmp_path) -> None:
    found = dormancy(model, domains(), **BOUNDS, remove="zero", progress=False)
    text = found.summary()
    first = found.differing()[0]
    assert f"{first['layer']}.{first['head']}" in text and "Rank correlation" in text
    assert "Ablation (zero) confirms" in text
    figures = found.figures()
    assert set(figures) == {"low-high", "ablation-zero"}
    assert len(figures["low-high"].data[0].x) == N_LAYERS * N_HEADS
    json.dumps(found.to_dict(), allow_nan=False)
    names = {file.name for file in found.save(tmp_path / "dormant")}
    assert {"dormant.json", "dormant.csv", "dormant.html"} == names


def test_three_domains_are_compared_in_pairs(model) -> None:
    generator = torch.Generator().manual_seed(3)
    three = domains() | {"all": ss.token_ids(torch.randint(4, 97, (5, 12), generator=generator))}
    found = dormancy(model, three, **BOUNDS, progress=False)
    two = dormancy(model, domains(), **BOUNDS, progress=False)
    assert set(found.p_values) == {("low", "high"), ("low", "all"), ("high", "all")}
    want = (3 * two.p_values["low", "high"]).clamp(max=1)
    torch.testing.assert_close(found.p_values["low", "high"], want)
    assert len(found.to_frame()) == 3 * N_LAYERS * N_HEADS


def test_a_folder_is_continued_or_refused(model, tmp_path, monkeypatch) -> None:
    from sinkscope.experiments import dormant

    first = dormancy(model, domains(), remove="zero", out=tmp_path, progress=False)

    def again(*args: object, **options: object) -> None:
        raise AssertionError("this was measured already")

    with monkeypatch.context() as patch:
        patch.setattr(dormant, "scan", again)
        second = dormancy(model, domains(), remove="zero", out=tmp_path, progress=False)
    for domain in ("low", "high"):
        assert second.reports[domain].equals(first.reports[domain])
        assert torch.equal(
            second.ablations["zero"][domain].ablated_loss,
            first.ablations["zero"][domain].ablated_loss,
        )
    swapped = dict(zip(("high", "low"), domains().values(), strict=True))
    with pytest.raises(ReportError, match="another tokens"):
        dormancy(model, swapped, out=tmp_path, progress=False)
    with pytest.raises(ReportError, match="another sinks"):
        dormancy(model, domains(), sinks=(1,), out=tmp_path, progress=False)
    half = ss.load_model(LLAMA.build(SEED).to(torch.bfloat16))
    with pytest.raises(ReportError, match=r"another dtype \(float32; now bfloat16\)"):
        dormancy(half, domains(), out=tmp_path, progress=False)


def test_what_is_refused(model) -> None:
    with pytest.raises(TextError, match="at least two"):
        dormancy(model, {"low": domains()["low"]}, progress=False)
    with pytest.raises(TextError, match="two prompts of each kind"):
        dormancy(model, domains(1), progress=False)
    with pytest.raises(TextError, match="short has 1 token"):
        dormancy(model, domains() | {"short": ss.token_ids([[5], [5, 6]])}, progress=False)
    with pytest.raises(UnsupportedError, match="mode is .median.; expected one of"):
        dormancy(model, domains(), remove="median", progress=False)
    with pytest.raises(TextError, match="ablated on 0 prompts"):
        dormancy(model, domains(), remove="zero", remove_prompts=0, progress=False)
    bert = BY_NAME["bert"]
    with pytest.raises(UnsupportedError, match="no loss"):
        dormancy(ss.load_model(bert.build()), domains(), remove="zero", progress=False)
    found = dormancy(ss.load_model(bert.build()), domains(), progress=False)
    assert len(found.to_frame()) == 2 * N_LAYERS * N_HEADS, "scores need no loss"
