import dataclasses

import numpy as np
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from sinkscope.experiments.nonmixture import NonMixture
from sinkscope.report.fields import MassiveActivations
from tests.plot.traces import line
from tests.report.factory import synthetic_report


def test_nonmixture_dims_show_the_sink_against_the_mixed_positions():
    report = synthetic_report(prompts=4)
    figure = plot.nonmixture_dims(report, top=3)
    assert figure.layout.title.text == "Non-mixture dims of layer 1: 3"
    every = line(figure, "sink, mean over prompts")
    np.testing.assert_allclose(every.y, report.ffn_sink[:, 1].double().mean(0), rtol=1e-5)
    reach = line(figure, "largest of the mixed positions, either way")
    np.testing.assert_allclose(reach.y, report.ffn_mixed_max[:, 1].double().mean(0), rtol=1e-5)
    largest = line(figure, "sink")
    first, second, _ = largest.x
    assert first == "<b>3</b>"
    assert "<b>" not in second
    assert largest.y[0] == pytest.approx(400)


def test_nonmixture_dims_of_a_chosen_layer():
    figure = plot.nonmixture_dims(synthetic_report(), 2)
    assert figure.layout.title.text == "Non-mixture dims of layer 2: none"
    with pytest.raises(ReportError, match="no layer 9"):
        plot.nonmixture_dims(synthetic_report(), 9)


def report_of_a_dim_that_hardly_stands_out():
    """Dim 5 of layer 2: 40 and 60 over a median of 1, in positions that reach 5."""
    ffn_sink = torch.ones(2, 4, 12)
    ffn_sink[:, 2, 5] = torch.tensor([40.0, 60.0])
    return synthetic_report(
        prompts=2, ffn_sink=ffn_sink, ffn_mixed_max=5 * torch.ones(2, 4, 12),
        ffn_sink_median=torch.ones(2, 4),
    )  # fmt: skip


def test_nonmixture_dims_follow_the_thresholds_asked_for():
    report = report_of_a_dim_that_hardly_stands_out()
    for rule, dims in (
        ({}, "none"),
        ({"over_median": 20.0, "over_mixed": 5.0}, "5"),
        ({"over_median": 50.0, "over_mixed": 5.0}, "5"),  # in half the prompts
        ({"over_median": 50.0, "over_mixed": 5.0, "share": 0.6}, "none"),
    ):
        figure = plot.nonmixture_dims(report, **rule)
        assert figure.layout.title.text == f"Non-mixture dims of layer 2: {dims}"
        median, mixed = rule.get("over_median", 100), rule.get("over_mixed", 10)
        said = f"over {median:g} × median, {mixed:g} × mixed"
        assert figure.layout.title.subtitle.text.endswith(said)
        assert line(figure, "sink").x[0] == ("5" if dims == "none" else "<b>5</b>")


def test_figures_of_the_waiver_experiment_follow_its_thresholds():
    found = NonMixture(
        about="synthetic", report=report_of_a_dim_that_hardly_stands_out(), position=0,
        masked=False, causal=True, over_median=20.0, over_mixed=5.0,
    )  # fmt: skip
    ((name, figure),) = found.figures().items()
    assert name == "ffn-layer-2" and found.found[0]["dim"] == 5
    assert figure.layout.title.text == "Non-mixture dims of layer 2: 5"


def test_thousands_of_dims_keep_the_largest():
    report = synthetic_report(prompts=2, dims=5000)
    every = line(plot.nonmixture_dims(report), "sink, mean over prompts")
    assert len(every.x) <= 1100
    assert 3 in every.x and max(every.y) == 400


def test_among_thousands_of_dims_the_mixed_positions_reach_as_far_as_they_do():
    ffn_mixed = torch.rand(2, 4, 4096, generator=torch.Generator().manual_seed(0))
    ffn_mixed[:, 1, 2000] = 900
    figure = plot.nonmixture_dims(
        synthetic_report(prompts=2, dims=4096, ffn_mixed_max=ffn_mixed), layer=1
    )
    mean = ffn_mixed[:, 1].double().mean(0).tolist()
    reach = line(figure, "largest of the mixed positions, either way")
    (below,) = [trace for trace in figure.data if trace.name == ""]
    assert max(reach.y) == 900 and min(below.y) == -900 and len(reach.x) <= 1100
    assert 2000 in reach.x
    for one in (reach, below):
        assert [abs(y) for y in one.y] == pytest.approx([mean[dim] for dim in one.x])
    assert f"every dim, maxima of {len(reach.x):,} bins" in {
        note.text for note in figure.layout.annotations
    }


def test_massive_activations_are_mapped_over_layers_and_dims():
    report = synthetic_report(prompts=3)
    figure = plot.massive_activations(report)
    (cells,) = figure.data
    assert list(cells.y) == ["3", "7"]
    largest = report.massive.value.abs().reshape(3, 2).amax(0).double().log10().tolist()
    assert [row[1] for row in cells.z] == pytest.approx(largest, rel=1e-5)
    assert np.isnan(np.asarray(cells.z)[:, [0, 2, 3]]).all()
    assert "3 of 3 prompts, position 0" in cells.text[0][1]
    assert "6 in 2 dims" in figure.layout.title.text


def test_a_map_without_massive_activations_is_a_sentence():
    nowhere, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    none = MassiveActivations(
        prompt=nowhere, layer=nowhere, position=nowhere, dim=nowhere,
        value=nothing, ratio=nothing, count=torch.zeros(2, 4, dtype=torch.int64),
    )  # fmt: skip
    figure = plot.massive_activations(synthetic_report(prompts=2, massive=none))
    assert len(figure.data) == 0 and figure.layout.xaxis.visible is False
    assert "No activation is above 100" in figure.layout.annotations[0].text
    assert figure.layout.title.text == "Massive activations: none passes the rule"


def test_the_bars_of_dims_begin_a_decade_below_the_smallest():
    report = synthetic_report()
    figure = plot.nonmixture_dims(report, 2)
    bars = [trace for trace in figure.data if trace.type == "bar" and trace.xaxis == "x2"]
    smallest = min(float(y) for trace in bars for y in trace.y)
    assert 10 ** figure.layout.yaxis2.range[0] == pytest.approx(smallest / 10, rel=1e-3)
    assert bars[0].error_y.color == "#1b1f24", "seen on the paper of its theme"


def test_massive_activations_count_the_dims_that_are_not_drawn_too():
    dims = torch.arange(25)
    one = torch.ones(25, dtype=torch.int64)
    massive = MassiveActivations(
        prompt=0 * one, layer=one, position=0 * one, dim=dims,
        value=200.0 + dims, ratio=2000.0 + dims, count=torch.tensor([[0, 25, 0, 0]]),
    )  # fmt: skip
    figure = plot.massive_activations(synthetic_report(prompts=1, massive=massive))
    assert figure.layout.title.text == "Massive activations: 25 in 25 dims, the 20 largest drawn"
    assert list(figure.data[0].y) == [str(dim) for dim in range(24, 4, -1)]
    more = dataclasses.replace(massive, count=10 * massive.count)
    figure = plot.massive_activations(synthetic_report(prompts=1, massive=more))
    assert "250, the 25 largest in 25 dims" in figure.layout.title.text
    assert figure.layout.xaxis.dtick == 1, "a tick at layer 0.5 names no layer"
