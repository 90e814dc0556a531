"""Title, line of settings and legend of a figure: each has room and says what it has to."""

import pandas as pd
import pytest

import sinkscope.plot as plot
from tests.plot import frames
from tests.report.factory import synthetic_report

ABOUT = frames.ABOUT
KEPT = ("none", "0 sinks", "1 sink", "2 sinks", "4 sinks", "8 sinks", "255 as it is", "everything")


def windows(kept: tuple[str, ...]) -> pd.DataFrame:
    rows = [(name, window, 12.0 + place) for place, name in enumerate(kept) for window in (64, 128)]
    return pd.DataFrame(rows, columns=["kept", "window", "perplexity"])


def below(figure) -> bool:
    return figure.layout.legend.yref == "container" and figure.layout.legend.y < 0.1


def test_a_legend_of_several_rows_stands_below_and_one_row_above() -> None:
    many, few = (
        plot.perplexity_by_window(windows(names), about=ABOUT) for names in (KEPT, KEPT[:3])
    )
    assert below(many) and not below(few)
    assert many.layout.margin.t < few.layout.margin.t, "no room above for what is below"
    assert many.layout.height > few.layout.height


def test_a_long_line_of_settings_breaks_between_its_parts_and_the_plot_makes_room() -> None:
    parts = [f"part {n} of a long line" for n in range(9)]
    short, long = (
        plot.perplexity_by_window(windows(KEPT[:3]), about=" · ".join(some))
        for some in (parts[:2], parts)
    )
    lines = long.layout.title.subtitle.text.split("<br>")
    assert len(lines) == 2 and " · ".join(lines) == " · ".join(parts)
    assert long.layout.margin.t >= short.layout.margin.t + 12, "a line of 12 pixels"


def test_rates_of_several_reports_stand_in_the_legend() -> None:
    reports = {
        f"a model of a long name, {n}": synthetic_report(prompts=2, seed=n) for n in range(4)
    }
    figure = plot.sink_rate(reports)
    assert figure.layout.title.text == "Sink rate against ε"
    names = [trace.name for trace in figure.data if trace.showlegend]
    for name, (own, report) in zip(names, reports.items(), strict=True):
        rate = (report["sink_importance"] > 0.3).float().mean()
        assert name == f"{own}, {rate:.1%} at 0.3"
    assert below(figure)


def test_figures_of_one_metric_have_titles_of_their_own() -> None:
    frame = frames.conditions()
    drawn = [
        plot.before_after(frame, "received_attention", about=ABOUT, by=by)
        for by in ("position", "layer", "condition")
    ]
    titles = [figure.layout.title.text for figure in drawn]
    assert titles == [f"Received attention by {by}" for by in ("position", "layer", "condition")]
    own = plot.before_after(frame, "received_attention", about=ABOUT, title="Attention to <b>")
    assert own.layout.title.text == "Attention to &lt;b&gt;"


@pytest.mark.parametrize(
    ("metric", "words"), [("sink_residual_norm", "after"), ("value_drain", "in")]
)
def test_a_trace_says_where_it_was_read(metric: str, words: str) -> None:
    figure = plot.peak_trace(frames.trace().assign(metric=metric), metric, about=ABOUT)
    assert figure.layout.xaxis.title.text == f"read {words} block"
    assert f"read {words} block %{{x}}" in figure.data[0].hovertemplate


def test_a_trace_says_that_its_colours_end_below_some_shares() -> None:
    frame = frames.trace()
    grown = (frame["removed"] == 2) & (frame["part"] == "ffn")
    above = frame.assign(value=frame["value"].where(~grown, 3.62 * frame["value"]))
    bar = plot.peak_trace(above, about=ABOUT).layout.coloraxis.colorbar
    assert dict(zip(bar.tickvals, bar.ticktext, strict=True))[2] == "≥ 2"
    assert plot.peak_trace(frame, about=ABOUT).layout.coloraxis.colorbar.ticktext is None
    whole = plot.peak_trace(above, about=ABOUT, relative=False).layout.coloraxis
    assert whole.colorbar.ticktext is None and whole.cmax is None, "norms are not cut at 2"


def test_one_head_is_not_heads() -> None:
    report = synthetic_report(prompts=2, layers=1, heads=1)
    assert " of 1 head against " in plot.head_scatter(report).layout.title.text
    one = frames.domains(layers=1, heads=1)
    figure = plot.domain_scatter(one, "prose", "code", about=ABOUT)
    assert " of 1 head: " in figure.layout.title.text
