"""The flat tables of a report, against its tensors read entry by entry."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from sinkscope.errors import ReportError, TextError
from tests.report.factory import only, synthetic_report


def test_one_row_a_head_with_means_and_intervals():
    report = synthetic_report()
    frame = report.heads()
    assert len(frame) == 4 * 6 and all(name.isidentifier() for name in frame)
    low = report.interval("value_drain").low
    for row in frame.itertuples():
        layer, head = row.layer, row.head
        assert row.kv_head == head // 3
        assert row.sink_attention == pytest.approx(report.sink_attention[:, layer, head].mean())
        assert row.value_drain_low == pytest.approx(low[layer, row.kv_head])
        assert row.sink_head == (report.sink_attention[:, layer, head].mean() > 0.3)
    fields = {*report.measured("prompt", "layer", "head")}
    fields |= {*report.measured("prompt", "layer", "kv_head")}
    for field in fields:
        assert {field, f"{field}_low", f"{field}_high"} <= {*frame}
    assert frame.attrs["units"]["attention_entropy_high"] == "nat"
    assert "(HONOR)" in frame.attrs["about"]["honor"] and frame.attrs["text"] == "prose"


def test_what_was_not_measured_is_no_column():
    frame = only(synthetic_report(), "honor").heads()
    assert [*frame] == ["layer", "head", "kv_head", "honor", "honor_low", "honor_high"]


def test_one_row_a_prompt():
    report = synthetic_report()
    frame = report.features()
    assert frame.shape == (3, 4 * 6 * 3 * 3 + 4 * 6 + 4 * 2 + 4)
    assert all(name.isidentifier() for name in frame) and frame.index.name == "prompt"
    for prompt in range(3):
        row = frame.loc[prompt]
        for layer, head, rank in itertools.product(range(4), range(6), range(3)):
            place = f"L{layer}H{head}R{rank}"
            for name in ("top_received", "top_received_position", "top_received_value_norm"):
                assert row[f"{name}_{place}"] == report[name][prompt, layer, head, rank]
        assert row["sink_attention_L3H5"] == report.sink_attention[prompt, 3, 5]
        assert row["value_drain_L2KV1"] == report.value_drain[prompt, 2, 1]
        assert row["residual_peak_L1"] == report.residual_peak[prompt, 1]
    assert frame.attrs["units"]["top_received_position_L0H0R1"] == "position"
    assert frame.attrs["not_measured"] == {}


def test_named_features_and_the_metric_to_ask_for():
    report = dataclasses.replace(
        synthetic_report(), top_received=None, settings=synthetic_report().settings
    )
    frame = report.features()
    assert not [name for name in frame if name.startswith("top_received_L")]
    assert "metric 'top_received'" in frame.attrs["not_measured"]["top_received"]
    assert report.features("honor").shape == (3, 24)
    with pytest.raises(ReportError, match="metric 'top_received'"):
        report.features("top_received")
    with pytest.raises(ReportError, match="use to_frame\\('received_peak'\\)"):
        report.features("received_peak")
    with pytest.raises(ReportError, match="scan again with the metric"):
        only(report).features()


def two_texts():
    """Two texts of different sizes; head 0 of layer 0 is higher on the first, head 1 equal."""
    one, other = synthetic_report(prompts=9, seed=1), synthetic_report(prompts=7, seed=2)
    a, b = one.sink_attention.clone(), other.sink_attention.clone()
    a[:, 0, 0], b[:, 0, 0] = 0.8 + 0.01 * torch.arange(9), 0.2 + 0.01 * torch.arange(7)
    a[:, 0, 1] = b[:, 0, 1] = 0.5
    a[0, 0, 2] = torch.nan
    return (
        dataclasses.replace(one, sink_attention=a),
        dataclasses.replace(other, sink_attention=b),
    )


def test_two_texts_head_by_head():
    one, other = two_texts()
    frame = one.head_differences(other)
    a, b = one.sink_attention.double().numpy(), other.sink_attention.double().numpy()
    for row in frame.itertuples():
        mine, theirs = a[:, row.layer, row.head], b[:, row.layer, row.head]
        mine = mine[~np.isnan(mine)]
        assert row.difference == pytest.approx(mine.mean() - theirs.mean(), abs=1e-12)
        assert row.low <= row.difference <= row.high
        u = stats.mannwhitneyu(mine, theirs).statistic if row.head != 1 else None
        if u is not None and not set(mine) & set(theirs):
            assert row.higher == pytest.approx(u / (len(mine) * len(theirs)))
            assert row.lower == pytest.approx(1 - row.higher)
    head = frame.set_index(["layer", "head"])
    assert head.loc[(0, 0), "p"] < 0.01 and head.loc[(0, 0), "higher"] == 1
    assert head.loc[(0, 1), "higher"] == head.loc[(0, 1), "lower"] == 0
    assert np.isnan(head.loc[(0, 2), "p"])
    difference = np.nanmean(a, 0) - np.nanmean(b, 0)
    assert frame.attrs["heads_higher"] == (difference > 0).sum()
    assert frame.attrs["heads_lower"] == (difference < 0).sum()
    assert frame.attrs["heads_equal"] == 1 and frame.attrs["heads_undefined"] == 0
    assert frame.attrs["significantly_higher"] >= 1


def test_the_interval_of_a_difference_covers_it():
    """Of 200 pairs of samples 95 % intervals should miss the true difference in about 5 %."""
    from sinkscope.statistics import bootstrap_difference

    draw = torch.Generator().manual_seed(0)
    one = torch.randn(40, 200, generator=draw)
    other = 2 * torch.randn(30, 200, generator=draw) - 1
    mean, low, high = bootstrap_difference(one, other)
    assert torch.allclose(mean, one.mean(0) - other.mean(0), atol=1e-6)
    missed = ((low > 1) | (high < 1)).float().mean()
    assert 0.01 < missed < 0.11
    welch = (one.var(0) / 40 + other.var(0) / 30).sqrt()
    assert ((high - low) / (2 * 1.96 * welch)).mean().item() == pytest.approx(1, abs=0.05)


def test_texts_that_cannot_be_compared():
    one, other = two_texts()
    with pytest.raises(ReportError, match="residual_peak has prompt layer"):
        one.head_differences(other, "residual_peak")
    with pytest.raises(ReportError, match="the n_heads of these reports differ: 6 and 8"):
        one.head_differences(synthetic_report(heads=8))
    weights = dataclasses.replace(other.settings, weights="b")
    mine = dataclasses.replace(one, settings=dataclasses.replace(one.settings, weights="a"))
    with pytest.raises(ReportError, match="the weights of these reports differ"):
        mine.head_differences(dataclasses.replace(other, settings=weights))
    with pytest.raises(TextError, match="at least two prompts of each"):
        one.head_differences(synthetic_report(prompts=1))
