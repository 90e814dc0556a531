import itertools
import re

import numpy as np
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from sinkscope.plot.bins import bins
from tests.report.factory import only, synthetic_report


def drawn(figure) -> dict[int, float]:
    """Heights of the sinks and of the others, as bars or a line, by position."""
    return {
        int(x): float(y) for trace in figure.data[:2] for x, y in zip(trace.x, trace.y, strict=True)
    }


def test_bars_of_one_head_are_its_received_attention():
    report = synthetic_report()
    figure = plot.by_position(report, layer=2, head=3)
    expected = report.received_attention[2, 3].tolist()
    assert drawn(figure) == pytest.approx(dict(enumerate(expected)))
    sink, others = figure.data[:2]
    assert sink.x.tolist() == [0] and others.x.tolist() == list(range(1, 16))
    assert figure.layout.title.text == "Received attention: layer 2, head 3"
    assert figure.layout.yaxis.title.text == "received attention [probability]"


def test_bars_of_a_layer_are_the_mean_over_its_heads():
    report = synthetic_report()
    expected = report.value_norm[1].double().mean(0).tolist()
    figure = plot.by_position(report, "value_norm", layer=1)
    assert drawn(figure) == pytest.approx(dict(enumerate(expected)))
    assert "mean of 2 KV heads" in figure.layout.title.text


def test_uniform_line_is_the_mean_of_one_over_what_each_query_sees():
    length, window = 16, 4
    report = synthetic_report(layers=2, settings={"windows": (None, window)})
    for layer, reach in ((0, length), (1, window)):
        line = plot.by_position(report, layer=layer, head=0).data[2]
        assert line.name == "uniform attention"
        for key in range(length):
            seen = [1 / min(i + 1, reach) for i in range(key, min(key + reach, length))]
            assert line.y[key] == pytest.approx(sum(seen) / len(seen), rel=1e-5)


def test_hover_names_position_and_tokens_and_escapes_them():
    text = [["<script>", "b"], ["c", "b"]]
    report = synthetic_report(prompts=2, positions=2, token_text=text)
    sink, others = plot.by_position(report, layer=0, head=0).data[:2]
    assert sink.text[0] == "position 0: \u2068&lt;script&gt;\u2069, \u2068c\u2069"
    assert others.text[0] == "position 1: \u2068b\u2069"


def test_long_text_is_drawn_in_bins_that_keep_every_maximum():
    report = synthetic_report(prompts=1, layers=1, heads=2, kv_heads=1, positions=5000)
    figure = plot.by_position(report, layer=0, head=1)
    heights = drawn(figure)
    assert len(heights) <= 1100
    values = report.received_attention[0, 1].numpy()
    assert max(heights.values()) == values.max()
    edges = [*sorted(heights), 5000]
    for start, end in itertools.pairwise(edges):
        assert heights[start] == values[start:end].max()
    assert sorted(heights)[:16] == list(range(16))
    assert f"maxima of {len(heights):,} bins" in figure.layout.title.text


def test_a_sink_in_the_middle_is_drawn_where_it_is():
    sinks = torch.zeros(1, 5000, dtype=torch.bool)
    sinks[0, 3333] = True
    report = synthetic_report(
        prompts=1, layers=1, heads=2, kv_heads=1, positions=5000, sink_mask=sinks
    )
    sink = plot.by_position(report, layer=0, head=0).data[0]
    assert (sink.type, sink.mode, sink.x.tolist()) == ("scatter", "markers", [3333])
    assert sink.y[0] == report.received_attention[0, 0, 3333]


@pytest.mark.parametrize("size", [1, 10, 1024, 1025, 32768, 100_003])
def test_bins_cover_every_position_once(size):
    places = bins(size, keep=[0, size // 2, size - 1])
    covered = np.concatenate(
        [np.arange(a, b + 1) for a, b in zip(places.first, places.last, strict=True)]
    )
    np.testing.assert_array_equal(covered, np.arange(size))
    assert len(places.first) <= 1024 + 40
    assert places.binned == (size > 1024)


def test_residual_norms_are_linear_unless_they_differ_widely():
    norms = torch.full((1, 16), 12.0)
    norms[0, 0] = 8.0
    narrow = plot.by_position(
        synthetic_report(layers=1, residual_norm=norms), "residual_norm", layer=0
    )
    assert narrow.layout.yaxis.type == "linear" and narrow.layout.yaxis.range is None
    norms[0, 0] = 12.0 * 21
    wide = plot.by_position(
        synthetic_report(layers=1, residual_norm=norms), "residual_norm", layer=0
    )
    assert wide.layout.yaxis.type == "log"


def test_the_smallest_bar_of_a_logarithmic_axis_is_a_decade_high():
    norms = torch.full((1, 16), 12.0)
    norms[0, 0] = 8.0
    report = synthetic_report(layers=1, residual_norm=norms)
    figure = plot.by_position(report, "residual_norm", layer=0, log=True)
    low, high = figure.layout.yaxis.range
    assert 10**low == pytest.approx(0.8) and 12 < 10**high < 14
    linear, log = (button.args[0] for button in figure.layout.updatemenus[0].buttons)
    assert log["yaxis.range"] == [low, high] and linear["yaxis.autorange"] is True
    received = plot.by_position(report, layer=0, log=True)
    heights = [*drawn(received).values(), *received.data[2].y]
    assert 10 ** received.layout.yaxis.range[0] == pytest.approx(min(heights) / 10, rel=1e-4)
    assert 10 ** received.layout.yaxis.range[1] > max(heights)


@pytest.mark.parametrize("causal", [True, False])
def test_the_last_quarter_of_a_causal_text_is_shaded_where_attention_is_drawn(causal):
    report = synthetic_report(positions=12, settings={"causal": causal})
    for metric in ("received_attention", "uniform_ratio"):
        figure = plot.by_position(report, metric, layer=0)
        ends = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
        assert ends == ([(8.5, 11.5)] if causal else [])
        assert ("from 9 on seen by few queries" in figure.layout.xaxis.title.text) == causal
    assert not plot.by_position(report, "value_norm", layer=0).layout.shapes
    said = plot.position_map(report).layout.xaxis.title.text
    assert ("from 9 on seen by few queries" in said) == causal
    assert plot.position_map(report, "residual_norm").layout.xaxis.title.text == "position"


def test_three_positions_have_three_ticks():
    report = synthetic_report(positions=3)
    assert plot.by_position(report, layer=0).layout.xaxis.dtick == 1
    assert plot.position_map(report).layout.xaxis.dtick == 1


def test_log_switch_changes_the_axis_and_its_ticks():
    norms = 10 ** torch.linspace(0, 3, 64).reshape(4, 16)
    figure = plot.by_position(
        synthetic_report(residual_norm=norms.T.reshape(4, 16)), "residual_norm", layer=1
    )
    assert figure.layout.yaxis.type == "log"
    linear, log = figure.layout.updatemenus[0].buttons
    assert linear.args[0]["yaxis.type"] == "linear" and linear.args[0]["yaxis.dtick"] is None
    assert {button.args[0]["yaxis.tickformat"] for button in (linear, log)} == {",~g"}
    assert log.args[0]["yaxis.type"] == "log"
    assert figure.layout.updatemenus[0].active == 1


def test_position_map_is_the_log_of_the_mean_over_heads():
    report = synthetic_report()
    (cells,) = plot.position_map(report).data
    mean = report.received_attention.double().mean(1).numpy()
    np.testing.assert_allclose(10.0 ** np.asarray(cells.z), mean, rtol=1e-5)
    np.testing.assert_allclose(cells.customdata, mean, rtol=1e-5)
    assert [10**at for at in cells.colorbar.tickvals] == pytest.approx(
        [float(text) for text in cells.colorbar.ticktext], rel=0.005
    )


def test_columns_of_a_map_are_the_maxima_of_their_positions_and_bear_ticks_where_these_are():
    sinks = torch.zeros(1, 4096, dtype=torch.bool)
    sinks[0, [0, 3001]] = True
    report = synthetic_report(prompts=1, positions=4096, sink_mask=sinks)
    figure = plot.position_map(report)
    (cells,) = figure.data
    names = [re.findall(r"\d+", text.split(":")[0]) for text in cells.text[0]]
    ends = [(int(name[0]), int(name[-1])) for name in names]
    assert [k for first, last in ends for k in range(first, last + 1)] == list(range(4096))
    mean = report.received_attention.double().mean(1).numpy()
    for column, (first, last) in enumerate(ends):
        largest = mean[:, first : last + 1].max(1)
        assert cells.customdata[:, column] == pytest.approx(largest, rel=1e-5)
    axis = figure.layout.xaxis
    assert list(axis.ticktext) == [f"{position:,}" for position in range(0, 4096, 500)]
    for at, text in zip(axis.tickvals, axis.ticktext, strict=True):
        column = np.searchsorted(cells.x, at) - 1
        first, last = ends[column]
        assert first <= int(text.replace(",", "")) <= last


@pytest.mark.parametrize("sink", [0, 3001])
def test_a_sink_in_a_map_of_bins_is_wider_than_a_pixel(sink):
    sinks = torch.arange(4096)[None] == sink
    report = synthetic_report(prompts=1, positions=4096, sink_mask=sinks)
    (cells,) = plot.position_map(report).data
    (column,) = [i for i, text in enumerate(cells.text[0]) if text.startswith(f"position {sink}:")]
    edges = np.asarray(cells.x)
    telephone = 300  # pixels of a map
    assert (edges[column + 1] - edges[column]) / (edges[-1] - edges[0]) * telephone > 2
    np.testing.assert_allclose(
        cells.customdata[:, column], report.received_attention[:, :, sink].mean(1), rtol=1e-5
    )


def test_cosine_map_is_linear_and_signed():
    report = synthetic_report()
    (cells,) = plot.position_map(report, "cosine_to_sink").data
    np.testing.assert_allclose(cells.z, report.cosine_to_sink.numpy())
    assert cells.zmin == -cells.zmax


def test_position_embeddings_are_compared_with_their_median():
    norms = torch.ones(64)
    norms[0] = 5.0
    figure = plot.position_embedding_norms(synthetic_report(position_embedding_norm=norms))
    assert drawn(figure) == pytest.approx(dict(enumerate(norms.tolist())))
    assert figure.layout.title.text == "Position embeddings: the first is 5 × the median"


def test_position_embedding_norms_of_a_tensor_need_a_word_on_whose_they_are():
    norms = torch.arange(1.0, 9.0)
    figure = plot.position_embedding_norms(norms, about="bert-large")
    assert drawn(figure) == pytest.approx(dict(enumerate(norms.tolist())))
    assert figure.layout.title.subtitle.text == "bert-large"
    with pytest.raises(ReportError, match="pass about="):
        plot.position_embedding_norms(norms)


def test_strange_layers_heads_and_metrics_are_refused():
    report = synthetic_report()
    with pytest.raises(ReportError, match="no layer 4 .* run from 0 to 3"):
        plot.by_position(report, layer=4)
    with pytest.raises(ReportError, match="no kv_head 2 .* run from 0 to 1"):
        plot.by_position(report, "value_norm", layer=0, head=2)
    with pytest.raises(ReportError, match="expected a metric with layer and position"):
        plot.by_position(report, "honor", layer=0)
    with pytest.raises(ReportError, match="was not measured"):
        plot.position_embedding_norms(only(report, "residual_norm"))
