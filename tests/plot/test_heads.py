import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError, SinkscopeError
from tests.report.factory import only, synthetic_report


def slider_counts(figure: go.Figure) -> dict[str, str]:
    """Title at every stop of the threshold's slider."""
    return {step.label: step.args[1]["title.text"] for step in figure.layout.sliders[0].steps}


def test_head_map_shows_the_mean_over_prompts_with_its_interval():
    report = synthetic_report(prompts=5)
    figure = plot.head_map(report)
    (cells,) = figure.data
    expected = report.sink_attention.double().numpy().mean(axis=0)
    np.testing.assert_allclose(cells.z, expected, rtol=1e-6)
    mean, low, high = np.moveaxis(cells.customdata, -1, 0)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert (low <= expected).all() and (expected <= high).all()
    assert (low < high).all()
    assert "95 % interval" in cells.hovertemplate
    assert "probability" in cells.hovertemplate
    assert figure.layout.xaxis.title.text == "head"
    assert figure.layout.yaxis.title.text == "layer"


def test_title_says_model_length_bos_and_epsilon():
    figure = plot.head_map(synthetic_report(settings={"model": "some/model"}))
    line = figure.layout.title.subtitle.text
    for part in ("some/model", "T = 16", "BOS: auto (&lt;s&gt;)", "ε = 0.3", "prose"):
        assert part in line


def test_threshold_starts_at_epsilon_and_counts_heads_at_every_stop():
    report = synthetic_report(settings={"epsilon": 0.4})
    figure = plot.head_map(report)
    mean = report.sink_attention.double().numpy().mean(axis=0)
    slider = figure.layout.sliders[0]
    assert slider.steps[slider.active].label == "0.4"
    for label, title in slider_counts(figure).items():
        if label == "none":
            continue
        share = (mean > float(label)).sum() / mean.size
        assert f"{share:.0%} of 24 heads above {float(label):g}" in title
    assert figure.layout.title.text == slider_counts(figure)["0.4"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_heads_below_the_threshold_are_empty_and_those_above_keep_their_colour(theme):
    figure = plot.head_map(synthetic_report(), threshold=0.5, theme=theme)
    scale = dict(figure.data[0].colorscale)
    assert {colour for at, colour in scale.items() if at < 0.5} == {
        figure.layout.template.layout.paper_bgcolor
    }
    assert figure.layout.plot_bgcolor != figure.layout.template.layout.paper_bgcolor, "no outline"
    assert figure.data[0].xgap == figure.data[0].ygap == 1
    plain = plot.head_map(synthetic_report(), threshold=None, metric="attention_entropy")
    assert plain.data[0].colorscale[0][1] == "#440154"  # viridis begins here: nothing is empty
    assert scale[1.0] in ("rgb(253, 231, 37)", "#fde725")


def test_signed_metric_has_a_diverging_scale_about_zero():
    figure = plot.head_map(synthetic_report(), "sink_logit_gap")
    (cells,) = figure.data
    assert cells.zmin == -cells.zmax
    assert cells.zmax == pytest.approx(np.abs(cells.z).max())
    assert "logit" in cells.colorbar.title.text


def test_kv_heads_keep_their_own_axis():
    figure = plot.head_map(synthetic_report(), "value_drain")
    assert np.shape(figure.data[0].z) == (4, 2)
    assert figure.layout.xaxis.title.text == "KV head"


def test_one_prompt_has_no_interval():
    figure = plot.head_map(synthetic_report(prompts=1))
    assert np.isnan(figure.data[0].customdata[..., 1:]).all()
    assert "interval" not in figure.data[0].hovertemplate


def test_inactivity_scores_can_be_drawn_by_name():
    report = synthetic_report()
    (cells,) = plot.head_map(report, "AHON-LN").data
    norms = report.head_output_norm.double().numpy()
    expected = (norms / norms.mean(axis=2, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(cells.z, expected, rtol=1e-5)
    (dots,) = plot.head_scatter(report, "sink_attention", "AHON-LN").data
    np.testing.assert_allclose(dots.y, expected.ravel(), rtol=1e-5)


def test_undefined_heads_are_left_out_of_the_count():
    attention = torch.tensor([[[0.9, float("nan"), 0.1]]])
    report = only(synthetic_report(prompts=1, layers=1, heads=3), "sink_attention")
    figure = plot.head_map(
        type(report)(**{**vars(report), "sink_attention": attention}), threshold=0.5
    )
    assert figure.layout.title.text == "Sink attention: 50% of 2 heads above 0.5"
    one = only(synthetic_report(prompts=1, layers=1, heads=1, kv_heads=1), "sink_attention")
    assert "of 1 head above" in plot.head_map(one).layout.title.text


def test_metric_without_heads_is_refused_with_names_that_work():
    message = r"residual_norm has the dimensions layer position; .*such as sink_attention"
    with pytest.raises(ReportError, match=message):
        plot.head_map(synthetic_report(), "residual_norm")
    with pytest.raises(ReportError, match="was not measured"):
        plot.head_map(only(synthetic_report(), "residual_norm"), "sink_attention")


def test_theme_is_an_argument_and_a_setting():
    report = synthetic_report()
    light, dark = (plot.head_map(report, theme=theme) for theme in ("light", "dark"))
    assert light.layout.template.layout.paper_bgcolor == "#ffffff"
    assert dark.layout.template.layout.paper_bgcolor == "#14171c"
    try:
        plot.set_theme("dark")
        assert plot.head_map(report).layout.template.layout.paper_bgcolor == "#14171c"
    finally:
        plot.set_theme("light")
    with pytest.raises(SinkscopeError, match="'sepia'"):
        plot.set_theme("sepia")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_figure_offers_to_upload(theme):
    removed = plot.template(theme).layout.modebar.remove
    assert "sendChartToCloud" in removed and "sendDataToCloud" in removed


def test_recency_plane_has_sink_near_keys_and_rest():
    report = synthetic_report()
    figure = plot.recency_plane(report, 64)
    (dots,) = figure.data
    recent = report.recent_attention[..., 2].double().mean(0).numpy()
    rest = report.remaining_attention[..., 2].double().mean(0).numpy()
    np.testing.assert_allclose(dots.y, recent.ravel(), rtol=1e-6)
    np.testing.assert_allclose(dots.x, (1 - recent - rest).ravel(), rtol=1e-6)
    np.testing.assert_allclose(dots.customdata[:, 2], rest.ravel(), rtol=1e-6)
    little = (rest < 0.1).mean()
    assert f"{little:.0%} of {rest.size} heads pay the rest under 0.1" in figure.layout.title.text
    levels = {shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1}
    assert list(levels) == pytest.approx([0.6])
    with pytest.raises(ReportError, match="width is 5; expected one of 4, 16, 64"):
        plot.recency_plane(report, 5)
    with pytest.raises(ReportError, match="was not measured"):
        plot.recency_plane(only(report, "sink_attention"))
    short = dict(recent_attention=torch.full_like(report.recent_attention, torch.nan))
    with pytest.raises(ReportError, match="scan longer prompts"):
        plot.recency_plane(synthetic_report(**short))


def test_head_scatter_repeats_kv_heads_and_ranks():
    report = synthetic_report()
    figure = plot.head_scatter(report, "sink_attention", "value_drain")
    (dots,) = figure.data
    x = report.sink_attention.double().mean(0).numpy()
    y = np.repeat(report.value_drain.double().mean(0).numpy(), 3, axis=1)
    np.testing.assert_allclose(dots.x, x.ravel(), rtol=1e-6)
    np.testing.assert_allclose(dots.y, y.ravel(), rtol=1e-6)
    assert dots.customdata[7].tolist() == [1, 1]
    ranks = [values.ravel().argsort().argsort() for values in (x, y)]
    # y has ties, whose ranks are shared: compare only the sign and the rough size
    rough = np.corrcoef(*ranks)[0, 1]
    said = float(figure.layout.title.text.rsplit("ρ = ", 1)[1])
    assert said == pytest.approx(rough, abs=0.1)


def test_head_change_is_after_less_before_and_marks_sure_heads():
    before = synthetic_report(prompts=6)
    shift = torch.zeros(4, 6)
    shift[2, 3] = -0.5
    after = type(before)(**{**vars(before), "sink_attention": before.sink_attention + shift})
    figure = plot.head_change(before, after)
    cells, dots = figure.data
    np.testing.assert_allclose(cells.z, shift.numpy(), atol=1e-6)
    assert (dots.x.tolist(), dots.y.tolist()) == ([3], [2])
    assert cells.zmin == -cells.zmax
    assert "1 of 24 intervals leave out 0" in figure.layout.title.text


def test_head_change_of_other_texts_pairs_nothing():
    before, after = synthetic_report(prompts=4, seed=0), synthetic_report(prompts=4, seed=1)
    cells, dots = plot.head_change(before, after).data
    assert len(dots.x) == 0
    assert np.isnan(cells.customdata[..., 2:]).all()


def test_head_change_refuses_other_sizes():
    with pytest.raises(ReportError, match="cannot be compared head by head"):
        plot.head_change(synthetic_report(), synthetic_report(heads=4))


def test_ratios_are_coloured_by_their_logarithm_about_one():
    drain = torch.tensor([[0.01, 0.1, 1.0, 2.0], [1e-4, 0.0, 0.5, 1.0]]).expand(2, 2, 4)
    report = synthetic_report(2, layers=2, heads=4, kv_heads=4, value_drain=drain)
    cells = plot.head_map(report, "value_drain").data[0]
    assert (cells.zmin, cells.zmax) == (-2, 2), "a hundredfold either way at most"
    np.testing.assert_allclose(
        cells.z, [[-2, -1, 0, np.log10(2)], [-2, -2, np.log10(0.5), 0]], atol=1e-6
    )
    np.testing.assert_allclose(cells.customdata[..., 0], drain[0], rtol=1e-6)
    assert cells.colorbar.ticktext[0] == "0.01" and "1" in cells.colorbar.ticktext
