import dataclasses
import itertools

import numpy as np
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from tests.plot.traces import line
from tests.report.factory import only, synthetic_report, with_nulls


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


def test_of_many_layers_the_strongest_bear_their_names():
    report = synthetic_report(layers=12)
    figure = plot.attention_by_query(report)
    assert len(figure.data) == 12 and not any(trace.showlegend for trace in figure.data)
    means = report.received_by_distance.double().nanmean((1, 2))
    strongest = {f"L{layer}" for layer in means.topk(5).indices.tolist()}
    assert {note.text.split("</span> ")[1] for note in figure.layout.annotations} == strongest
    heights = [note.y for note in figure.layout.annotations]
    top = max(max(trace.y) for trace in figure.data)
    assert all(a - b > 0.05 * top for a, b in itertools.pairwise(heights)), "one below the other"
    few = plot.attention_by_query(synthetic_report(layers=4))
    assert not few.layout.annotations and all(trace.showlegend for trace in few.data)


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
    assert list(uniform.x) == [8, 16] and "markers" in uniform.mode, "one length is a point"
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


@pytest.mark.parametrize(
    ("quantity", "nulls", "kind", "strongest"),
    [
        ("sink_attention", 3, "head", np.amax),
        ("residual_peak", 2, "layer", np.amax),
        ("value_drain", 2, "KV head", np.amin),
    ],
)
def test_chance_levels_draw_every_head_and_the_strongest_of_each_draw(
    quantity, nulls, kind, strongest
):
    report = with_nulls(synthetic_report(prompts=3))
    figure = plot.chance_levels(report, quantity)
    heads = next(trace for trace in figure.data if trace.name == f"each {kind}")
    expected = report[quantity].double().mean(0).flatten()
    np.testing.assert_allclose(heads.y, expected, rtol=1e-5)
    levels = [trace for trace in figure.data if trace.name and "," in trace.name]
    assert len(levels) == nulls == heads.customdata.shape[1] - 1
    drawn = report[f"random_{quantity}"].double().mean(0).numpy()
    of_draws = strongest(drawn.reshape(-1, drawn.shape[-1]), axis=0)
    random = next(trace for trace in levels if trace.name.startswith("another position"))
    np.testing.assert_allclose(random.y, np.median(of_draws), rtol=1e-5)
    np.testing.assert_allclose(
        random.customdata[0], np.quantile(of_draws, [0.025, 0.975]), rtol=1e-5
    )
    stronger = expected.min() < of_draws.min() if kind == "KV head" else expected.max() > 0
    assert stronger and figure.layout.title.text.startswith("Chance levels")
    tested = figure.layout.title.text.endswith("the model at initialisation")
    assert tested == (quantity == "residual_peak"), "peaks are not tested against other positions"


def test_chance_levels_of_a_report_without_nulls_are_refused():
    with pytest.raises(ReportError, match="nulls=20"):
        plot.chance_levels(synthetic_report(), "value_drain")
    with pytest.raises(ReportError, match="residual_peak and value_drain"):
        plot.chance_levels(with_nulls(synthetic_report()), "value_norm")
