"""Figures of the experiments' frames: the values, labels and units they show."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from sinkscope.plot.guesses import guessed_numbers
from tests.plot import frames

ABOUT = frames.ABOUT


def traces(figure, start: str) -> list:
    return [trace for trace in figure.data if (trace.name or "").startswith(start)]


def test_a_guess_is_drawn_beside_the_result():
    guess, result = {"a": 0.2, "<b>": None}, {"a": 0.7, "<b>": 3.0, "further": 1.0}
    figure = plot.guess_and_result(guess, result, "attention [probability]", about=ABOUT)
    bars, diamonds = figure.data
    assert list(bars.x) == [0.7, 3.0] and list(bars.y) == ["a", "&lt;b&gt;"]
    assert list(diamonds.x) == [0.2] and list(diamonds.y) == ["a"]
    none = plot.guess_and_result({"a": None}, result, "attention [probability]", about=ABOUT)
    assert len(none.data) == 1 and "no guess" in none.layout.title.text
    with pytest.raises(ReportError, match="no result for 'c'; results are of a, <b>, further"):
        plot.guess_and_result({"c": 1.0}, result, "attention", about=ABOUT)


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        (0.5, "The guess is 0.5; expected a number, or None, for each name, such as {'a': 0.5}."),
        ({"a": None, "b": "stays"}, "the guess for 'b' is 'stays'; expected a finite number."),
        ({"a": [0.5]}, "the guess for 'a' is [0.5]; expected a finite number."),
    ],
)
def test_a_guess_that_is_no_number_is_refused(guess, message):
    with pytest.raises(ReportError) as refused:
        guessed_numbers(guess, {"a": 0.7, "b": 0.1})
    assert str(refused.value) == message


def test_a_guess_may_be_a_tensor_of_one_number():
    assert guessed_numbers({"a": torch.tensor(0.25), "b": 1}, {}) == {"a": 0.25, "b": 1.0}


def test_old_names_work_and_warn():
    before = frames.sleep().rename(columns={"share_ablated": "share_removed"})
    for old, new, drawn in (
        ("cures", "mitigations", frames.cured()),
        ("removal_cost", "ablation_effect", frames.domains()),
        ("sleeping_heads", "loss_by_share_ablated", before),
    ):
        with pytest.warns(DeprecationWarning, match=f"plot.{old} is now plot.{new}"):
            figure = getattr(plot, old)(drawn, about=ABOUT)
        frame = drawn.rename(columns={"share_removed": "share_ablated"})
        assert figure == getattr(plot, new)(frame, about=ABOUT)


def test_every_figure_names_what_it_was_measured_on():
    training, _ = frames.training()
    figures = [
        plot.before_after(frames.conditions(), "received_attention", about=ABOUT),
        plot.peak_trace(frames.trace(), about=ABOUT),
        plot.sink_life(frames.life(), about=ABOUT),
        plot.transplant_effects(frames.transplanted(), about=ABOUT),
        plot.domain_scatter(frames.domains(), "prose", "code", about=ABOUT),
        plot.ablation_effect(frames.domains(), about=ABOUT),
        plot.loss_by_share_ablated(frames.sleep(), about=ABOUT),
        plot.training_curves(training, about=ABOUT),
        plot.perplexity_by_window(frames.windows(), about=ABOUT),
        plot.perplexity_along(frames.along(), about=ABOUT),
        plot.perplexity_by_scheme(frames.stored(), about=ABOUT),
        plot.bench_ratios(frames.timings(), about=ABOUT),
        plot.mitigations(frames.cured(), about=ABOUT),
        plot.knockout_risks(frames.knocked_out(), about=ABOUT),
        plot.damage_map(frames.precision(), about=ABOUT),
        plot.kept_tokens(frames.precision(), about=ABOUT),
    ]
    for figure in figures:
        assert figure.layout.title.subtitle.text == ABOUT.replace("<s>", "&lt;s&gt;")
        assert figure.layout.title.text


def test_before_after_has_a_panel_a_condition_and_a_dot_a_sequence_and_position():
    frame = frames.conditions()
    figure = plot.before_after(frame, "received_attention", about=ABOUT)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "special start, 7 unchanged", "special start, 7 designated", "random start &lt;x&gt;",
    ]  # fmt: skip
    dots = traces(figure, "sequence 2")
    assert len(dots) == 3
    own = frame[(frame["prompt"] == 2) & (frame["metric"] == "received_attention")]
    own = own[own["condition"] == "special start, 7 designated"]
    np.testing.assert_allclose(dots[1].y, own.groupby("position")["value"].mean())
    assert figure.layout.yaxis.title.text == "received attention [probability]"


def test_before_after_by_layer_draws_the_prominent_positions():
    frame = frames.conditions()
    figure = plot.before_after(frame, "residual_norm", about=ABOUT, by="layer")
    designated = [t for t in traces(figure, "position 7") if t.xaxis == "x2"]
    rows = frame[(frame["metric"] == "residual_norm") & (frame["position"] == 7)]
    rows = rows[rows["condition"] == "special start, 7 designated"]
    assert list(designated[0].y) == pytest.approx(rows.groupby("layer")["value"].mean().tolist())
    assert {t.name for t in figure.data if t.name} == {"position 0", "position 7"}
    assert figure.layout.yaxis.type == "log"


def test_before_after_by_condition_joins_each_sequence():
    figure = plot.before_after(frames.conditions(), "loss", about=ABOUT, by="condition")
    *sequences, mean = figure.data
    assert len(sequences) == 4
    assert list(sequences[1].y) == pytest.approx([2.1, 2.15, 2.2])
    assert list(mean.y) == pytest.approx([2.15, 2.2, 2.25])
    assert (np.asarray(mean.error_y.array) > 0).all()


def test_peak_trace_shows_the_share_that_is_left():
    figure = plot.peak_trace(frames.trace(), about=ABOUT)
    attention, ffn = figure.data
    np.testing.assert_allclose(attention.z, 1)
    expected = np.ones((4, 4))
    expected[1, 1:] = 0.1
    np.testing.assert_allclose(ffn.z, expected)
    np.testing.assert_allclose(ffn.customdata, 100.5)
    assert figure.layout.coloraxis.cmid == 1
    absolute = plot.peak_trace(frames.trace(), about=ABOUT, relative=False)
    assert absolute.data[1].z[1][2] == pytest.approx(10.05)


def test_sink_life_has_six_panels_and_says_what_is_missing():
    frame = frames.life()
    figure = plot.sink_life(frame, about=ABOUT)
    ffn = next(trace for trace in figure.data if trace.name == "FFN")
    assert list(ffn.y) == [0, 100, 0, -60]
    (peak,) = (t for t in traces(figure, "sink") if t.xaxis == "x")
    assert list(peak.y) == [1.05, 100.05, 100.05, 40.05]
    losses = next(t for t in figure.data if t.orientation == "h")
    assert list(losses.y) == ["as it is", "FFN 1"] and list(losses.x) == [2.05, 4.05]
    assert not any("not measured" in a.text for a in figure.layout.annotations)
    few = plot.sink_life(frame[~frame["metric"].isin(["loss", "trigger"])], about=ABOUT)
    assert sum("not measured" in a.text for a in few.layout.annotations) == 2


def test_a_transplant_is_compared_with_the_baseline_prompt_by_prompt():
    frame = frames.transplanted()
    figure = plot.transplant_effects(frame, about=ABOUT)
    attention, change, divergence = figure.data
    words = ["baseline", "no transplant", "key and value", "key, value zero", "value, host's key"]
    assert list(attention.y) == [*words, "slot: key and value", "slot: key, value zero"]
    np.testing.assert_allclose(attention.x[:2], [0.61, 0.11])
    np.testing.assert_allclose(change.x[:4], [0, 1.65, 0, 1.1], atol=1e-12)
    assert change.error_x.array[1] < 0.2, "of the difference, not of losses that differ by prompt"
    np.testing.assert_allclose(divergence.x[1], 2.2)
    with pytest.raises(ReportError, match="baseline"):
        plot.transplant_effects(frame[frame["condition"] != "baseline"], about=ABOUT)
    before = frame.replace({"condition": {"baseline": "untouched"}})  # its name in older files
    assert plot.transplant_effects(before, about=ABOUT) == figure


def test_peak_trace_of_some_blocks_has_a_row_for_each_of_them_and_no_other():
    trace = frames.trace()
    some = trace[trace["removed"].isin([-1, 1, 3])]
    figure = plot.peak_trace(some, about=ABOUT)
    assert list(figure.data[1].y) == ["1", "3"]
    assert figure.layout.yaxis.type == "category"
    np.testing.assert_allclose(figure.data[1].z[0], [1, 0.1, 0.1, 0.1])


def test_peak_trace_says_in_words_which_part_is_gone():
    trace = frames.trace()
    both = trace[trace["part"] == "ffn"].assign(part="both")
    figure = plot.peak_trace(pd.concat([trace, both]), about=ABOUT)
    said = [cells.hovertemplate.split(" of block")[0] for cells in figure.data]
    parts = ["attention", "FFN", "attention and FFN"]
    assert said == [f"without the {part}" for part in parts]
    assert [title.text for title in figure.layout.annotations] == parts


def test_domain_scatter_names_the_heads_that_differ():
    figure = plot.domain_scatter(frames.domains(), "prose", "code", about=ABOUT)
    (dots,) = figure.data
    which = [tuple(where) for where in dots.customdata.tolist()].index((1, 2))
    assert (dots.x[which], dots.y[which]) == pytest.approx((0.9, 0.1))
    assert [text for text in dots.text if text] == ["L1 H2"]
    assert "1 dormant on one only" in figure.layout.title.text
    assert list(dots.error_x.array) == pytest.approx([0.02] * 12)
    with pytest.raises(ReportError, match="no domain 'poems'; it has prose, code"):
        plot.domain_scatter(frames.domains(), "prose", "poems", about=ABOUT)


def test_ablation_effect_gives_the_rank_correlation():
    figure = plot.ablation_effect(frames.domains(), about=ABOUT)
    assert "prose ρ = -1.00, code ρ = -1.00" in figure.layout.title.text
    assert [trace.name for trace in figure.data] == ["prose", "code"]
    assert figure.layout.yaxis.title.text.endswith("[nat]")


def test_ablation_effect_shows_gains_and_losses_over_decades():
    frame = frames.domains()
    cost = [-0.02, 0, *np.geomspace(0.001, 3, 10)] * 2
    frame = frame.assign(loss_change=cost, loss_change_low=-0.05, loss_change_high=4.0)
    figure = plot.ablation_effect(frame, about=ABOUT)
    for domain, dots in zip(("prose", "code"), figure.data, strict=True):
        rows = frame[frame["domain"] == domain]
        np.testing.assert_allclose(dots.customdata[:, 2], rows["loss_change"])
        assert list(np.argsort(dots.y)) == list(np.argsort(rows["loss_change"].to_numpy()))
        assert (np.sign(dots.y) == np.sign(rows["loss_change"])).all()
        tops = dots.y + dots.error_y.array
        np.testing.assert_allclose(tops, math.log10(1 + 4.0 / 0.01))  # the median is 0.02
    ticks = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    assert list(ticks) == ["-0.1", "-0.01", "0", "+0.01", "+0.1", "+1", "+10"]
    assert ticks["+1"] == pytest.approx(math.log10(101))
    assert ticks["-0.01"] == pytest.approx(-math.log10(2))


def test_loss_by_share_ablated_draws_each_prompts_change_and_random_heads_last():
    figure = plot.loss_by_share_ablated(frames.sleep(), about=ABOUT)
    (score,), (random,) = traces(figure, "AHON"), traces(figure, "random")
    assert figure.data[-1] is random and random.line.dash == "dot"
    shares = np.array([0, 0.05, 0.1, 0.2])
    # Prompts differ by 0.02 nat, and their changes not at all: no interval is left.
    for trace, slope in ((score, 1), (random, 20)):
        want = slope * shares**2 / 2.01
        np.testing.assert_allclose(trace.customdata, np.stack([want] * 3, axis=1), atol=1e-12)
        np.testing.assert_allclose(10**trace.y - 1, 100 * want, atol=1e-9)
    assert 10 ** figure.layout.shapes[0].y0 - 1 == pytest.approx(1)  # 1 %, in units of 1 %
    untouched = frames.sleep().query("share_ablated > 0 or prompt > 0")
    with pytest.raises(ReportError, match="give every prompt a row whose share_ablated is 0"):
        plot.loss_by_share_ablated(untouched, about=ABOUT)


def test_loss_by_share_ablated_puts_the_best_score_first_and_tells_sixteen_apart():
    rows = [frames.sleep().query("score == 'random'").assign(score=f"s{n:02}") for n in range(15)]
    frame = pd.concat([frames.sleep(), *rows])
    slope = {f"s{n:02}": 1 + (n * 7) % 15 for n in range(15)} | {"random": 1, "AHON-LN": 0.5}
    change = frame["score"].map(slope) * frame["share_ablated"] ** 2
    figure = plot.loss_by_share_ablated(frame.assign(loss=2 + change), about=ABOUT)
    lines = [trace for trace in figure.data if trace.name]
    names = [line.name for line in lines]
    assert names == [*sorted(slope, key=lambda name: slope[name] + 99 * (name == "random"))]
    assert len({(line.line.color, line.line.dash) for line in lines}) == len(lines)


def test_training_curves_average_seeds_and_overlay_laws():
    training, law = frames.training()
    figure = plot.training_curves(training, ["logit_gap"], about=ABOUT, laws=law)
    (softmax,) = traces(figure, "softmax")
    expected = [2 * np.log1p(step) + 0.425 for step in (10, 100, 1000)]
    assert list(softmax.x) == [10, 100, 1000]
    assert list(softmax.y) == pytest.approx(expected)
    (fitted,) = traces(figure, "a + b ln t")
    assert fitted.line.dash == "dash" and fitted.y[2] == 9.2
    assert figure.layout.annotations[0].text == "logit gap [logit]"
    everything = plot.training_curves(training, about=ABOUT, log_steps=False)
    assert len(everything.layout.annotations) == 3
    assert list(traces(everything, "relu")[0].x) == [0, 10, 100, 1000]


def test_training_curves_of_one_run_name_only_what_tells_lines_apart():
    training, _ = frames.training()
    one = training[(training["run"] == "softmax") & (training["seed"] == 42)]
    figure = plot.training_curves(one, about=ABOUT)
    assert not any(trace.showlegend for trace in figure.data)
    two_layers = one.assign(layer=one["layer"] + 1)
    figure = plot.training_curves(pd.concat([one, two_layers]), ["logit_gap"], about=ABOUT)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["layer 0", "layer 1"]
    assert "head 0" in figure.data[0].hovertemplate


def test_perplexity_has_a_line_a_setting_and_a_level():
    figure = plot.perplexity_by_window(frames.windows(), about=ABOUT)
    none, four, everything = figure.data
    assert list(none.y) == [900.0] * 3 and list(none.x) == [256, 512, 1024]
    assert list(four.y) == pytest.approx([10 + 100 / w for w in (256, 512, 1024)])
    assert list(everything.y) == [9.5] * 3
    assert "KV megabytes" in none.hovertemplate


def test_perplexity_along_a_text_has_a_line_a_setting_and_everything_dashed():
    figure = plot.perplexity_along(frames.along(), about=ABOUT)
    everything, none, one = figure.data
    assert everything.line.dash == "dash" and everything.name == "everything"
    assert list(none.x) == [128, 384, 640] and list(none.y) == [9, 900, 900]
    assert one.name == "1 sink &lt;x&gt;" and none.line.width > one.line.width
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.dtick == "D2"
    level = frames.along().assign(perplexity=9.0)
    within = plot.perplexity_along(level, about=ABOUT).layout.yaxis
    assert within.type == "log" and within.dtick is None, "D2 would leave it without a tick"
    assert figure.layout.xaxis.title.text == "position in the text"


def test_bench_says_what_did_not_run():
    figure = plot.bench_ratios(frames.timings(), about=ABOUT)
    (stock,) = traces(figure, "eager core")
    assert list(stock.text) == ["3.00", "did not run"]
    assert stock.x[0] == "llama-1b<br>100 × 64"
    assert stock.customdata[0].tolist() == [150.0, 1.5]


def test_cures_say_yes_no_or_unclear_in_words():
    figure = plot.mitigations(frames.cured(), about=ABOUT)
    (cells,) = figure.data
    assert list(cells.y) == ["softmax · adamw", "softmax · sgd", "relu · adamw"]
    assert np.asarray(cells.z).tolist() == [[1, 1], [1, 0.5], [0, 0]]
    assert cells.text[0][0] == "<b>yes</b>, 0.81<br>0.78 to 0.84"
    assert cells.text[2][1] == "<b>no?</b>, 1.1"


def test_knockouts_show_both_risks():
    figure = plot.knockout_risks(frames.knocked_out(), about=ABOUT)
    back, bigram = figure.data
    assert list(back.y) == ["none", "zero attention, layer 0, head 0", "zero feed-forward, layer 0"]
    assert list(back.x) == [0.0, 7.7, 3.2] and list(bigram.x) == [0.0, 0.0, 2.0]


def test_a_missing_column_is_named():
    with pytest.raises(ReportError, match="metric is missing from condition, prompt"):
        plot.before_after(frames.conditions().drop(columns="metric"), "loss", about=ABOUT)
    with pytest.raises(ReportError, match="without rows"):
        plot.ablation_effect(frames.domains().iloc[:0], about=ABOUT)
    with pytest.raises(ReportError, match="no metric 'nothing'"):
        plot.before_after(frames.conditions(), "nothing", about=ABOUT)


def test_an_impossible_interval_over_seeds_is_not_written():
    """An interval of two seeds may leave the probabilities: its ends say nothing."""
    columns = ["attention", "optimizer", "phenomenon", "mean", "low", "high", "present"]
    rows = [
        ("softmax", "adam", "sink", 0.25, -1.99, 2.49, "unclear"),
        ("softmax", "adam", "drain", 0.5, 0.4, 0.6, "yes"),
        ("softmax", "adam", "peak", 30.0, 12.0, 1234.5, "yes"),
    ]
    figure = plot.mitigations(pd.DataFrame(rows, columns=columns), about="synthetic")
    assert figure.data[0].text.tolist() == [
        ["<b>unclear</b>, 0.25<br>too few seeds", "<b>yes</b>, 0.5<br>0.4 to 0.6",
         "<b>yes</b>, 30<br>12 to 1,234"]
    ]  # fmt: skip


def test_kept_tokens_draws_paired_gains_and_no_dot_for_a_destroyed_run():
    frame = frames.precision()
    figure = plot.kept_tokens(frame, about=ABOUT)
    (sinks,) = traces(figure, "sinks kept")
    runs = frame[(frame["what"] == "all") & (frame["scheme"] == "int8-tensor")]
    losses = runs.pivot(index="prompt", columns="kept", values="loss")
    gain = losses["nothing"] - losses["sinks"]
    assert sinks.y.tolist() == pytest.approx([gain.mean()])
    assert list(sinks.text) == ["int8-tensor"]
    assert 0 < sinks.error_y.array[0] < gain.max() - gain.min()
    (note,) = figure.layout.annotations
    assert (note.text, note.x) == ("destroyed", 1)
    with pytest.raises(ReportError, match="no kept 'nothing'"):
        plot.kept_tokens(frame[frame["kept"] != "nothing"], about=ABOUT)


def test_damage_map_has_a_panel_a_rule_in_one_scale():
    frame = frames.precision()
    figure = plot.damage_map(frame, about=ABOUT)
    assert [note.text for note in figure.layout.annotations] == ["nothing kept", "sinks kept"]
    cells = frame[frame["what"] == "cell"]
    for panel, kept in zip(figure.data, ("nothing", "sinks"), strict=True):
        own = cells[(cells["kept"] == kept) & (cells["layer"] == 1)]
        want = own.groupby("tensor")["divergence"].mean()[list(panel.x)]
        np.testing.assert_allclose(panel.customdata[1], want)
        np.testing.assert_allclose(panel.z[1], np.log10(want))
        assert list(panel.x) == ["attn_in", "value", "neurons"] and list(panel.y) == list("0123")
    whole = frame[frame["what"] == "all"]
    with pytest.raises(ReportError, match="no what 'cell'"):
        plot.damage_map(whole, about=ABOUT)


def test_perplexity_by_scheme_has_a_line_a_rule_from_many_bits_to_few():
    figure = plot.perplexity_by_scheme(frames.stored(), about=ABOUT)
    assert [trace.name for trace in figure.data] == [
        "0 sinks kept", "1 sink kept", "pivots kept", "full precision",
    ]  # fmt: skip
    sink = figure.data[1]
    assert list(sink.x) == ["int8-token", "int2-group64-asym"]
    assert list(sink.y) == pytest.approx([12.06, 24.0])
    assert list(figure.data[3].y) == [12.0, 12.0]
