"""Records, the JSON object, sink rate at any ε, the token mask."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from sinkscope.errors import ReportError
from tests.report.factory import only, synthetic_report


@pytest.fixture
def report():
    return synthetic_report(lengths=[16, 9, 4])


# -- top heads


def test_top_heads_are_the_largest_means(report):
    means = report.sink_attention.double().mean(0).numpy()
    order = sorted(np.ndindex(4, 6), key=lambda place: -means[place])
    records = report.top_heads(5)
    assert [(r["layer"], r["head"]) for r in records] == order[:5]
    for record in records:
        assert record["sink_attention"] == pytest.approx(means[record["layer"], record["head"]])
        assert record["low"] <= record["sink_attention"] <= record["high"]
        kv_head = record["head"] // 3  # 6 query heads share 2 kv_heads
        drain = report.value_drain[:, record["layer"], kv_head].mean().item()
        assert record["value_drain"] == pytest.approx(drain)
    assert len(report.top_heads(1000)) == 24


def test_heads_can_be_ranked_by_another_field(report):
    records = report.top_heads(24, by="attention_entropy")
    values = [record["attention_entropy"] for record in records]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ReportError, match="value_drain has prompt layer kv_head"):
        report.top_heads(by="value_drain")


def test_heads_without_a_figure_come_last():
    figures = torch.rand(2, 4, 6)
    figures[:, 1, 2] = torch.nan
    last = synthetic_report(2, sink_attention=figures).top_heads(24)[-1]
    assert (last["layer"], last["head"]) == (1, 2) and math.isnan(last["sink_attention"])


# -- massive activations and non-mixture dims


def test_massive_activations_are_records(report):
    records = report.massive_activations()
    assert len(records) == 6
    assert list(records[0]) == ["prompt", "layer", "position", "dim", "value", "ratio"]
    assert [r["dim"] for r in records] == [3, 7] * 3
    assert all(type(r["dim"]) is int and type(r["value"]) is float for r in records)
    with pytest.raises(ReportError, match="massive was not measured"):
        only(report).massive_activations()


@pytest.mark.parametrize("every_dim", [True, False])
def test_nonmixture_dims_hold_in_enough_prompts(every_dim):
    """Four prompts, one layer: dim 0 always, dim 1 in half of them, the other three never."""
    sink = torch.ones(4, 1, 5)
    sink[:2, 0, 0], sink[2:, 0, 0], sink[:2, 0, 1] = 900, 700, -300
    report = synthetic_report(4, 1, dims=5, ffn_sink=sink, ffn_mixed_max=torch.ones(4, 1, 5))
    if not every_dim:
        report = dataclasses.replace(report, ffn_sink=None, ffn_mixed_max=None)
    always, half = report.nonmixture_dims()
    assert always == pytest.approx(
        {"layer": 0, "dim": 0, "value": 800, "over_median": 800, "over_mixed": 800, "share": 1}
    )
    assert (half["dim"], half["share"], half["value"]) == (1, 0.5, -149.5)
    assert [r["dim"] for r in report.nonmixture_dims(share=0.6)] == [0]
    assert [r["dim"] for r in report.nonmixture_dims(over_median=750.0)] == [0]
    assert report.nonmixture_dims(over_median=1000.0) == []
    assert report.nonmixture_dims(over_mixed=1000.0) == []
    assert [r["dim"] for r in report.nonmixture_dims(share=0.0)] == [0, 1]  # 2 stands out nowhere


def test_nonmixture_dims_are_refused_where_more_may_pass_than_were_kept():
    """100 dims of which 32 are kept; by these thresholds 40 pass."""
    sink, mixed = torch.ones(2, 1, 100), torch.full((2, 1, 100), 0.01)
    sink[..., :40] = torch.arange(100.0, 60, -1)
    whole = synthetic_report(2, 1, dims=100, ffn_sink=sink, ffn_mixed_max=mixed)
    assert len(whole.nonmixture_dims(over_median=50.0)) == 40
    kept = dataclasses.replace(whole, ffn_sink=None, ffn_mixed_max=None)
    with pytest.raises(ReportError, match="more than 32 dims .* scan again with 'ffn_dims'"):
        kept.nonmixture_dims(over_median=50.0)
    assert kept.nonmixture_dims(over_median=80.0) == whole.nonmixture_dims(over_median=80.0)
    assert len(kept.nonmixture_dims(over_median=80.0)) == 20


def test_inactivity_scores_are_the_published_thirteen_and_ours(report):
    scores = report.inactivity_scores()
    assert len(scores) == 14 and "LTHON-LL" in scores
    norms = report.head_output_norm.numpy()
    np.testing.assert_allclose(
        scores["AHON-LN"], norms / norms.mean(axis=2, keepdims=True), rtol=1e-5
    )
    with pytest.raises(ReportError, match="last_output_norm was not measured"):
        dataclasses.replace(report, last_output_norm=None).inactivity_scores()


# -- rates and masks


def test_sink_rate_at_any_epsilon():
    importance = torch.tensor([[[0.1, 0.5]], [[0.4, torch.nan]]])
    report = synthetic_report(2, 1, 2, sink_importance=importance)
    assert report.sink_rate_at(0.05) == 1
    assert report.sink_rate_at(0.3) == pytest.approx(2 / 3)  # the head without a figure is left out
    assert report.sink_rate_at(0.5) == 0  # strictly above


def test_token_mask_marks_sinks_and_outliers_but_no_padding():
    nan = torch.nan
    report = synthetic_report(
        2,
        positions=4,
        lengths=[4, 2],
        received_peak=torch.tensor([[0.31, 0.1, 0.1, 0.3], [0.1, 0.1, 0.9, nan]]),
        residual_outlier=torch.tensor([[1.0, 1, 11, 1], [nan, 10, 99, nan]]),
    )
    assert report.token_mask().tolist() == [
        [True, False, True, False],
        [False, False, False, False],
    ]
    assert report.token_mask(residual_ratio=9.0).tolist()[1] == [False, True, False, False]
    assert report.token_mask(attention=0.05, residual_ratio=1e9).sum() == 6


def test_token_mask_needs_one_of_the_two(report):
    assert only(report, "received_peak").token_mask()[:, 0].all()
    assert only(report, "residual_outlier").token_mask()[:, 0].all()
    with pytest.raises(ReportError, match="scan again with the metric 'received'"):
        only(report).token_mask()


# -- JSON


def test_json_has_the_promised_shapes(report):
    plain = json.loads(report.to_json())
    prompts, layers, heads, kv_heads, positions = 3, 4, 6, 2, 16
    shapes = {
        "sink_attention": (prompts, layers, heads),
        "received_attention": (layers, heads, positions),
        "attention_entropy": (layers, heads),
        "sink_logit_gap": (layers, heads),
        "head_output_norm": (layers, heads),
        "honor": (layers, heads),
        "value_norm": (layers, kv_heads, positions),
        "residual_norm": (layers, positions),
        "sink_rate": (positions,),
        "tokens": (prompts, positions),
        "received_peak": (prompts, positions),
        "residual_peak": (layers,),
        "value_drain": (layers, kv_heads),
    }
    for name, shape in shapes.items():
        assert np.array(plain[name], dtype=object).shape == shape, name
    assert plain["settings"]["model"] == "synthetic" and plain["settings"]["windows"] == [None] * 4
    assert plain["massive_activations"] == report.massive_activations()
    assert [record["dim"] for record in plain["nonmixture_dims"]] == [3]
    assert "ffn_sink" not in plain


def test_json_figures_read_back_exactly(report):
    plain = json.loads(report.to_json())
    assert torch.equal(torch.tensor(plain["sink_attention"]), report.sink_attention)
    assert torch.equal(torch.tensor(plain["residual_norm"]), report.residual_norm)
    np.testing.assert_allclose(plain["honor"], report.honor.double().mean(0), rtol=1e-6)


def test_json_has_null_for_nan_and_inf():
    figures = torch.tensor([[[torch.nan, torch.inf, 0.5]]])
    report = synthetic_report(1, 1, 3, sink_attention=figures)
    entries = dataclasses.replace(report.massive, ratio=torch.tensor([torch.inf, 2.0]))
    text = dataclasses.replace(report, massive=entries).to_json()
    assert "NaN" not in text and "Infinity" not in text
    plain = json.loads(text)
    assert plain["sink_attention"] == [[[None, None, 0.5]]]
    assert [entry["ratio"] for entry in plain["massive_activations"]] == [None, 2.0]


def test_json_leaves_out_what_was_not_measured():
    plain = only(synthetic_report(), "sink_attention").to_dict()
    assert set(plain) == {"settings", "tokens", "mask", "sink_mask", "sink_attention"}


def test_json_takes_hostile_tokens():
    text = [["\0", "\ud800", "</script>"], ["é"], ["x", "\n"]]
    report = synthetic_report(positions=3, lengths=[3, 1, 2], token_text=text)
    assert json.loads(report.to_json())["token_text"] == text
