import dataclasses

import numpy as np
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from sinkscope.experiments._nonmixture import NonMixture
from sinkscope.report import MassiveActivations
from tests.unit.report_factory import only, synthetic_report


def line(figure, name: str):
    """The line of that name, not the band behind it."""
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def test_lines_over_layers_are_means_over_prompts_and_heads():
    report = synthetic_report(prompts=5)
    figure = plot.by_layer(report, "sink_cosine", "other_cosine")
    for name in ("sink_cosine", "other_cosine"):
        drawn = line(figure, name.replace("_", " "))
        expected = report[name].double().mean((0, 2)).tolist()
        assert list(drawn.y) == pytest.approx(expected, rel=1e-5)
        low, high = np.moveaxis(np.asarray(drawn.customdata), -1, 0)
        assert (low < expected).all() and (high > expected).all()


def test_the_axis_has_the_words_that_names_share_and_no_logarithm_of_negative_figures():
    report = synthetic_report()
    signed = dataclasses.replace(report, other_cosine=report.other_cosine - 2)
    figure = plot.by_layer(signed, "sink_cosine", "other_cosine")
    assert figure.layout.yaxis.title.text == "cosine"
    assert figure.layout.updatemenus == ()
    positive = plot.by_layer(report, "sink_residual_norm", "median_residual_norm")
    assert positive.layout.yaxis.title.text == "residual norm [activation]"
    assert len(positive.layout.updatemenus) == 1


def test_lines_of_a_panel_are_told_apart_without_colours():
    names = ("sink_attention", "sink_importance", "learned_sink_mass", "first_token_attention")
    report = synthetic_report()
    known = [name for name in names if getattr(report, name) is not None]
    lines = [one for one in plot.by_layer(report, *known).data if one.name]
    assert len(lines) == len(known) > 1
    assert len({one.marker.symbol for one in lines}) == len(lines)
    reports = {name: synthetic_report(seed=seed) for seed, name in enumerate("abcd")}
    rates = [one for one in plot.sink_rate(reports).data if one.showlegend]
    assert len(rates) == 4 and len({one.line.dash for one in rates}) == 4, "101 points each"


def test_metrics_of_two_units_do_not_share_an_axis():
    with pytest.raises(ReportError, match=r"\[probability\] and attention_entropy \[nat\]"):
        plot.by_layer(synthetic_report(), "sink_attention", "attention_entropy")
    with pytest.raises(ReportError, match="needs the name of a field"):
        plot.by_layer(synthetic_report())
    with pytest.raises(ReportError, match="expected prompt and layer"):
        plot.by_layer(synthetic_report(), "received_attention")


def test_residual_norms_are_logarithmic_and_say_where_the_peak_is():
    report = synthetic_report(residual_peak=torch.tensor([[1.0, 2.0, 40.0, 5.0]] * 3))
    figure = plot.residual_norms(report)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "residual norm [activation]"
    expected = "the sink's is 1 × to 40 × the others', most after layer 2"
    assert expected in figure.layout.title.text
    expected = report.sink_residual_norm.double().mean(0).tolist()
    assert list(line(figure, "sink residual norm").y) == pytest.approx(expected, rel=1e-5)


def test_a_sink_that_never_stands_out_is_not_said_to_stand_above():
    peaks = torch.tensor([[0.7, 0.8, 0.9, 0.6]] * 3)
    title = plot.residual_norms(synthetic_report(residual_peak=peaks)).layout.title.text
    assert "the sink's is 0.6 × to 0.9 × the others', most after layer 2" in title


def test_an_axis_of_metrics_without_a_word_in_common_names_them():
    figure = plot.by_layer(synthetic_report(), "sink_attention", "sink_importance")
    said = figure.layout.yaxis.title.text
    assert said == "sink attention, sink importance [probability]"


def test_value_drains_show_every_head_and_count_the_drained():
    report = synthetic_report()
    drains = report.value_drain.double().mean(0).numpy()
    figure = plot.value_drains(report)
    dots = line(figure, "each KV head")
    np.testing.assert_allclose(dots.y, drains.ravel(), rtol=1e-5)
    assert list(dots.x) == np.repeat(range(4), 2).tolist()
    assert f"in {(drains < 0.5).mean():.0%} of KV heads" in figure.layout.title.text
    through = plot.value_drains(report, out=True)
    assert len(line(through, "each head").y) == 24


def test_attention_by_query_draws_layers_heads_or_one_head():
    report = synthetic_report()
    figure = plot.attention_by_query(report)
    expected = report.received_by_distance.double().mean(1).numpy()
    for layer in range(4):
        np.testing.assert_allclose(line(figure, f"layer {layer}").y, expected[layer], rtol=1e-5)
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 4, 8]
    (one,) = plot.attention_by_query(report, 2, 5).data
    assert list(one.y) == pytest.approx(report.received_by_distance[2, 5].tolist())
    assert len(plot.attention_by_query(report, 2).data) == 6


def test_sink_rate_is_exact_at_every_threshold():
    report = synthetic_report(prompts=4)
    figure = plot.sink_rate(report)
    drawn = line(figure, "first sink")
    importance = report.sink_importance.numpy()
    for epsilon, rate in zip(drawn.x, drawn.y, strict=True):
        above = sum(float(value) > np.float32(epsilon) for value in importance.ravel())
        assert rate == pytest.approx(above / importance.size, abs=1e-6)
    said = (importance > 0.3).mean()
    assert f"at 0.3: first sink {said:.1%}" in figure.layout.title.text


def test_sink_rate_names_the_next_positions():
    curve = torch.zeros(19, 16)
    curve[:, 0], curve[:5, 7] = 0.9, 0.5
    figure = plot.sink_rate(synthetic_report(sink_rate_curve=curve))
    names = [trace.name for trace in figure.data if (trace.name or "").startswith("position")]
    assert names == ["position 7"]


def test_sink_rate_leaves_out_the_last_keys_of_causal_models_which_few_queries_see():
    curve = torch.zeros(19, 12)
    curve[:, [4, 8, 9, 11]] = torch.tensor([0.2, 0.3, 0.8, 0.9])
    for causal, expected in ((True, [8, 4]), (False, [11, 9, 8])):
        settings = {"causal": causal}
        report = synthetic_report(positions=12, sink_rate_curve=curve, settings=settings)
        names = [trace.name for trace in plot.sink_rate(report).data]
        assert [name for name in names if name and name.startswith("position")] == [
            f"position {position}" for position in expected
        ]


def test_sink_rates_of_several_reports_say_what_differs():
    reports = {
        "short <s>": synthetic_report(positions=8),
        "long": synthetic_report(positions=16, settings={"bos": "never"}),
    }
    figure = plot.sink_rate(reports)
    assert "T = 8, 16" in figure.layout.title.subtitle.text
    assert "never" in figure.layout.title.subtitle.text
    short = next(trace for trace in figure.data if "ε =" in (trace.hovertemplate or ""))
    assert short.hovertemplate.startswith("short &lt;s&gt;, ε = ")


def test_sink_rate_by_length_has_a_point_a_report_and_the_uniform_level():
    reports = [synthetic_report(positions=n, seed=n) for n in (16, 8)]
    figure = plot.sink_rate_by_length(reports, epsilon=0.5)
    drawn = line(figure, "synthetic")
    assert list(drawn.x) == [8, 16]
    for report, rate in zip(reversed(reports), drawn.y, strict=True):
        assert rate == pytest.approx(float((report.sink_importance > 0.5).float().mean()))
    uniform = line(figure, "synthetic, uniform attention")
    assert list(uniform.x) == [8, 16]
    assert list(uniform.y) == pytest.approx(
        [sum(1 / (i + 1) for i in range(n)) / n for n in (8, 16)]
    )
    with pytest.raises(ReportError, match="no report"):
        plot.sink_rate_by_length([])


def spread_evenly(length: int, sink: int, causal: bool, window: int | None) -> float:
    """What a key receives from the queries that see it, each spread over the keys it sees."""
    far = length if window is None else window

    def sees(query: int, key: int) -> bool:
        return abs(query - key) < far and (key <= query or not causal)

    seers = [query for query in range(length) if sees(query, sink)]
    shares = [1 / sum(sees(query, key) for key in range(length)) for query in seers]
    return sum(shares) / len(shares)


def test_each_model_has_the_uniform_level_of_its_own_attention():
    def scan(model: str, length: int, causal: bool, windows, sink: int = 0):
        sinks = (torch.arange(length) == sink).expand(3, length)
        settings = dict(model=model, causal=causal, windows=windows)
        return synthetic_report(positions=length, sink_mask=sinks, settings=settings)

    every, some = (None,) * 4, (None, 4, 4, 4)
    kinds = {"both ways": (False, every, 0), "windows": (True, some, 0), "later": (True, every, 3)}
    figure = plot.sink_rate_by_length(
        [scan(m, n, causal, at, sink) for m, (causal, at, sink) in kinds.items() for n in (16, 32)]
    )
    for model, (causal, windows, sink) in kinds.items():
        uniform = line(figure, f"{model}, uniform attention")
        assert list(uniform.x) == [16, 32]
        expected = [
            np.mean([spread_evenly(n, sink, causal, window) for window in windows])
            for n in (16, 32)
        ]
        assert list(uniform.y) == pytest.approx(expected), model
    both = line(figure, "both ways, uniform attention")
    assert list(both.y) == pytest.approx([1 / 16, 1 / 32])


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


def test_figures_of_what_was_not_measured_say_what_to_measure():
    report = only(synthetic_report(), "received_attention")
    for draw in (
        plot.residual_norms,
        plot.value_drains,
        plot.attention_by_query,
        plot.sink_rate,
        plot.nonmixture_dims,
        plot.massive_activations,
    ):
        with pytest.raises(ReportError, match="was not measured"):
            draw(report)
