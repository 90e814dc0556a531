"""The summary on the terminal and in a notebook, and the comparison of two reports."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sinkscope.capture.scan import scan
from sinkscope.errors import ReportError
from sinkscope.prompts.tokens import token_ids
from sinkscope.report.comparison import compare
from sinkscope.report.fields import MassiveActivations
from sinkscope.report.summary import number, uniform
from tests.families.architectures import BY_NAME
from tests.report.factory import only, synthetic_report

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m[bold]&\ud800\0"


class Page(HTMLParser):
    """The tags and the text of a piece of HTML; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def line(text: str, label: str) -> str:
    """One fact of the summary, its wrapped lines joined."""
    lines = text.splitlines()
    start = next(i for i, entry in enumerate(lines) if entry.startswith(label))
    joined = lines[start].removeprefix(label).strip()
    for entry in lines[start + 1 :]:
        if not entry.startswith("   "):
            break
        joined += " " + entry.strip()
    return joined


def test_the_summary_says_what_stands_out():
    report = synthetic_report(
        sink_importance=torch.tensor([0.2, 0.4]).repeat(12).reshape(1, 4, 6).expand(3, 4, 6)
    )
    text = repr(report)
    assert text.splitlines()[0] == "Attention sinks of synthetic"
    assert line(text, "Model") == "LlamaForCausalLM, 4 layers × 6 heads (2 KV heads), float32"
    assert line(text, "Text") == "prose, 3 prompts of 16 tokens, BOS auto (<s>)"
    mean = report.sink_attention.mean().item()
    assert f"mean attention {mean:.3f} [" in line(text, "Sinks")
    heads = int((report.sink_attention.double().mean(0) > 0.3).sum())
    assert line(text, "Sink heads") == f"{heads} of 24, whose mean sink attention exceeds ε = 0.3"
    assert (
        line(text, "Sink rate") == "50.0 % of (prompt, layer, head) have importance above ε = 0.3"
    )
    peak = report.residual_peak.mean(0)
    assert line(text, "Residual peak") == (
        f"{number(peak.max().item())} × the median of the others after layer {peak.argmax()}; "
        "first above 10 × after layer 1"
    )
    assert line(text, "Massive dims") == "3 (401, layer 1), 7 (-149, layer 1)"
    assert line(text, "Non-mixture dims") == "layer 1: 3"
    assert "marks 3 of 48 tokens as sink or outlier, at positions 0 (×3)" in text
    tensors = [getattr(report, name) for name in report.measured()]
    tensors += [getattr(report.massive, name) for name in report.massive.measured()]
    held = sum(x.numel() * x.element_size() for x in tensors)
    assert line(text, "Size") == f"{len(report.measured())} fields, {held / 1e6:.3g} MB in memory"
    assert line(text, "Made with").startswith("eager attention on cpu, revision 0123abcd, seed 0; ")
    strongest = report.top_heads(1)[0]
    row = next(row for row in text.splitlines() if f"{strongest['sink_attention']:.3f}" in row)
    assert row.split()[:2] == [str(strongest["layer"]), str(strongest["head"])]
    assert max(map(len, text.splitlines())) <= 100


def test_layers_of_massive_dims_are_runs():
    entries = dict(prompt=[0] * 4, layer=[1, 2, 3, 7], position=[0] * 4, dim=[9] * 4)
    massive = MassiveActivations(
        **{name: torch.tensor(values) for name, values in entries.items()},
        value=torch.tensor([200.0, -22513.0, 300, 400]),
        ratio=torch.full((4,), 2e3),
        count=torch.zeros(3, 4, dtype=torch.int64),
    )
    assert line(repr(synthetic_report(massive=massive)), "Massive dims") == (
        "9 (-22,513, layers 1-3, 7)"
    )


def test_nothing_measured_nothing_said():
    text = repr(only(synthetic_report()))
    assert "Massive" not in text and "Strongest" not in text and "Made with" in text
    Page(only(synthetic_report())._repr_html_())


def test_no_peak_no_dims_no_marks_is_said():
    report = synthetic_report(
        residual_peak=torch.ones(3, 4),
        ffn_sink=torch.ones(3, 4, 12),
        received_peak=torch.zeros(3, 16),
        residual_outlier=torch.ones(3, 16),
    )
    text = repr(report)
    assert line(text, "Residual peak").startswith("none above 10 ×; largest 1 ×")
    assert line(text, "Non-mixture dims") == "none"
    assert "marks none of 48 tokens" in text


def test_sinks_found_automatically_are_listed():
    sinks = torch.zeros(3, 16, dtype=torch.bool)
    sinks[:, 0] = sinks[1, 5] = True
    report = synthetic_report(settings={"sinks": "auto"}, sink_mask=sinks)
    assert line(repr(report), "Sinks").startswith("positions found: 0 (×3), 5 (×1)")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("places", [[0], [0, 1, 2], [4], [1, 6]])
def test_the_uniform_baseline_is_that_of_the_figure_beside_it(causal: bool, places: list[int]):
    """The share of sinks among the keys of each query after the sinks, counted one by one."""
    lengths, windows = [9, 7], (None, 3, 3)
    sinks = torch.zeros(2, 9, dtype=torch.bool)
    sinks[:, places] = True
    settings = {"causal": causal, "windows": windows}
    report = synthetic_report(
        2, layers=3, positions=9, lengths=lengths, sink_mask=sinks, settings=settings
    )
    means = []
    for length in lengths:
        for window in windows:
            shares = []
            for query in set(range(length)) - set(places):
                if causal and query < places[0]:
                    continue
                keys = [key for key in range(length) if not causal or key <= query]
                keys = [key for key in keys if window is None or abs(query - key) < window]
                shares.append(len(set(keys) & set(places)) / len(keys))
            means.append(np.mean(shares))
    assert uniform(report) == pytest.approx(np.mean(means))


@pytest.mark.parametrize("sinks", [[0], [0, 1, 2, 3, 4, 5], [10]])
def test_a_model_with_uniform_attention_has_the_uniform_baseline(sinks: list[int]):
    family = BY_NAME["llama"]
    model = family.build()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    report = scan(model, token_ids(family.tokens()), sinks=sinks, progress=False)
    mean = report.sink_attention.mean().item()
    assert uniform(report) == pytest.approx(mean, rel=1e-5)
    assert line(repr(report), "Sinks").endswith(f"uniform attention would give {number(mean)}")


def test_a_prompt_without_queries_after_the_sink_has_no_baseline():
    assert uniform(synthetic_report(2, positions=3, lengths=[3, 1])) == pytest.approx(
        (1 / 2 + 1 / 3) / 2
    )


def test_hostile_tokens_stay_text():
    report = synthetic_report(
        1,
        positions=2,
        token_text=[[HOSTILE, "x"]],
        settings={"model": HOSTILE, "source": HOSTILE, "bos": HOSTILE},
    )
    text = repr(report)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "[bold]" in text  # not swallowed as markup
    text.encode("utf-8")
    page = Page(report._repr_html_())
    assert page.tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert "<img src=x onerror=alert(1)>" in page.text


def test_html_says_what_the_terminal_says_and_keeps_the_notebooks_colours():
    report = synthetic_report()
    html = report._repr_html_()
    page, text = Page(html), repr(report)
    for label in ("Sinks", "Residual peak", "Massive dims", "Non-mixture dims", "Made with"):
        assert line(text, label) in page.text, label
    assert "background:transparent" in html and "color:inherit" in html
    assert "http" not in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123, "0.00123"),
        (999.7, "1,000"),
        (22513.0, "22,513"),
        (-1234567.0, "-1,234,567"),
        (12.0, "12"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str):
    assert number(value) == text


# -- comparison


@pytest.fixture
def pair():
    before = synthetic_report(8)
    shift = torch.rand(8, 4, 6, generator=torch.Generator().manual_seed(5)) - 2
    after = dataclasses.replace(
        before,
        sink_attention=before.sink_attention + shift,
        residual_norm=before.residual_norm * 0.5,
        honor=None,
        settings=dataclasses.replace(before.settings, attention="streaming"),
    )
    return before, after, shift


def test_differences_are_paired(pair):
    """The interval is that of the shift alone, however much prompts differ among themselves."""
    before, after, shift = pair
    mean, low, high = compare(before, after).difference("sink_attention")
    np.testing.assert_allclose(mean, shift.mean(0), atol=1e-6)
    rng = np.random.default_rng(0)
    draws = [shift.numpy()[rng.integers(8, size=8)].mean(0) for _ in range(4000)]
    expected_low, expected_high = np.quantile(draws, [0.025, 0.975], axis=0)
    width = expected_high - expected_low
    assert (np.abs(low.numpy() - expected_low) < 0.15 * width).all()
    assert (np.abs(high.numpy() - expected_high) < 0.15 * width).all()


def test_means_over_prompts_have_a_difference_and_no_interval(pair):
    before, after, _ = pair
    mean, low, high = compare(before, after).difference("residual_norm")
    torch.testing.assert_close(mean, -0.5 * before.residual_norm)
    assert low.isnan().all() and high.isnan().all()


def test_comparison_as_a_frame(pair):
    before, after, _ = pair
    frame = compare(before, after).to_frame("sink_attention")
    unit = "[probability]"
    assert list(frame) == [
        "layer", "head", *(f"{t} {unit}" for t in ("before", "after", "difference", "low", "high")),
    ]  # fmt: skip
    row = frame[(frame["layer"] == 3) & (frame["head"] == 2)]
    assert row[f"before {unit}"].item() == pytest.approx(
        before.sink_attention[:, 3, 2].mean().item(), rel=1e-6
    )
    assert row[f"after {unit}"].item() == pytest.approx(
        after.sink_attention[:, 3, 2].mean().item(), rel=1e-6
    )
    assert len(frame) == 24


def test_the_largest_change_is_over_prompts_with_both_values():
    """Here the mean after is lower, but only since a prompt with a large value has none there."""
    before = torch.full((2, 4, 6), 0.2)
    before[1] = 0.6
    after = before + 0.1
    after[1] = torch.nan
    pair = [only(synthetic_report(2, sink_attention=x), "sink_attention") for x in (before, after)]
    row = next(row for row in compare(*pair)._table()[1] if row[0].startswith("sink_attention"))
    assert row[3].startswith("0.1 at layer")


def test_comparison_names_what_changed(pair):
    before, after, _ = pair
    comparison = compare(before, after)
    assert "honor" not in comparison.names and "sink_attention" in comparison.names
    assert comparison.changed_settings == {"attention": ("eager", "streaming")}
    text = repr(comparison)
    assert "attention: eager → streaming" in text
    assert "sink_attention [probability]" in text and "residual_norm [activation]" in text
    assert "attention_entropy" not in text
    place = before.residual_norm.argmax().item()
    assert f"at layer {place // 16}, position {place % 16}" in text
    Page(comparison._repr_html_())
    assert "No value changed." in repr(compare(before, before))


def test_other_tokens_cannot_be_compared(pair):
    before, _, _ = pair
    other = before.tokens.clone()
    other[0, 3] += 1
    with pytest.raises(ReportError, match="because their tokens differ"):
        compare(before, dataclasses.replace(before, tokens=other))
    with pytest.raises(ReportError, match="because their tokens differ"):
        compare(before, synthetic_report(7))


def test_models_of_other_sizes_are_compared_where_they_agree(pair):
    before, _, _ = pair
    smaller = synthetic_report(8, layers=3)
    smaller = dataclasses.replace(smaller, tokens=before.tokens)
    comparison = compare(before, smaller)
    assert "sink_rate" in comparison.names and "sink_attention" not in comparison.names
    with pytest.raises(ReportError, match="cannot be compared: it has the shape"):
        comparison.difference("sink_attention")
    left_out = repr(comparison).splitlines()[-1]
    assert left_out.startswith("Left out, since their sizes differ: ")
    assert "sink_attention" in left_out and "sink_rate," not in left_out


def test_the_largest_change_is_named_by_its_threshold(pair):
    before, _, _ = pair
    curve = before.sink_rate_curve.clone()
    curve[2] += 0.25
    after = dataclasses.replace(before, sink_rate_curve=curve)
    threshold = before.to_frame("sink_rate_curve")["epsilon"].unique()[2]
    (row,) = [line for line in repr(compare(before, after)).splitlines() if "epsilon" in line]
    assert f"at epsilon {threshold:g}" in row


def test_a_report_names_what_was_in_force():
    report = synthetic_report()
    under = dataclasses.replace(
        report.settings, interventions=("ZeroValue(positions=0)", "SelfOnlyMask(position=5)")
    )
    masked = dataclasses.replace(report, settings=under)
    words = " ".join(repr(masked).split())
    assert "float32, under ZeroValue(positions=0) and SelfOnlyMask(position=5)" in words
    assert "interventions: none → ZeroValue(positions=0), Self" in repr(compare(report, masked))
    with pytest.raises(ReportError, match="cannot be merged because their interventions differs"):
        report.merge(masked)


def test_text_stays_text_where_rich_would_draw_it_in_the_notebook(monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "Strongest sink heads\n" in repr(synthetic_report())
    assert "sink attention" in repr(synthetic_report()).partition("Strongest sink heads")[2]
    assert capsys.readouterr().out == ""
