"""Every figure in a real browser: drawn, quiet, and with its words on it."""

from __future__ import annotations

import base64
import inspect

import pytest
import torch

import sinkscope.plot as plot
from sinkscope.plot.export import CONFIG
from tests.plot import frames
from tests.report.factory import synthetic_report, with_nulls

ABOUT = frames.ABOUT


def pattern() -> torch.Tensor:
    mask = torch.ones(12, 12).tril()
    return mask / mask.sum(1, keepdim=True)


def arguments(figure: str) -> list[str]:
    """The arguments that a figure cannot do without."""
    parameters = inspect.signature(getattr(plot, figure)).parameters.values()
    return [one.name for one in parameters if one.default is one.empty]


def all_figures(theme: str) -> dict:
    report = synthetic_report(prompts=3)
    other = synthetic_report(prompts=3, positions=8, seed=5)
    training, law = frames.training()
    look = dict(theme=theme)
    told = dict(theme=theme, about=ABOUT)
    of_a_report = {
        name: getattr(plot, name)(report, **look)
        for name in sorted(frames.FIGURES - {"chance_levels"})
        if arguments(name) == ["report"]
    }
    return {
        **of_a_report,
        "head_map, signed": plot.head_map(report, "sink_logit_gap", **look),
        "head_change": plot.head_change(report, report, **look),
        "by_position": plot.by_position(report, layer=1, **look),
        "position_embedding_norms": plot.position_embedding_norms(report, **look),
        "attention_pattern": plot.attention_pattern(pattern(), list("abcdefghijkl"), **told),
        "by_layer": plot.by_layer(report, "sink_cosine", "other_cosine", **look),
        "chance_levels": plot.chance_levels(with_nulls(report), **look),
        "chance_levels, peaks": plot.chance_levels(with_nulls(report), "residual_peak", **look),
        "chance_levels, drains": plot.chance_levels(with_nulls(report), "value_drain", **look),
        "sink_rate": plot.sink_rate(report, **look),
        "sink_rate_by_length": plot.sink_rate_by_length([report, other], **look),
        "before_after": plot.before_after(frames.conditions(), "residual_norm", **told),
        "peak_trace": plot.peak_trace(frames.trace(), **told),
        "sink_life": plot.sink_life(frames.life(), **told),
        "transplant_effects": plot.transplant_effects(frames.transplanted(), **told),
        "domain_scatter": plot.domain_scatter(frames.domains(), "prose", "code", **told),
        "ablation_effect": plot.ablation_effect(frames.domains(), **told),
        "loss_by_share_ablated": plot.loss_by_share_ablated(frames.sleep(), **told),
        "training_curves": plot.training_curves(training, laws=law, **told),
        "perplexity_along": plot.perplexity_along(frames.along(), **told),
        "perplexity_by_window": plot.perplexity_by_window(frames.windows(), **told),
        "perplexity_by_scheme": plot.perplexity_by_scheme(frames.stored(), **told),
        "shift_errors": plot.shift_errors(frames.shifted(), **told),
        "shift_errors_by_key": plot.shift_errors_by_key(frames.shifted_keys(), **told),
        "bench_ratios": plot.bench_ratios(frames.timings(), **told),
        "mitigations": plot.mitigations(frames.cured(), **told),
        "knockout_risks": plot.knockout_risks(frames.knocked_out(), **told),
        "expert_map": plot.expert_map(frames.experts(), marked=[(1, 3)], **told),
        "vocabulary_shares": plot.vocabulary_shares(frames.vocabulary(), threshold=10.0, **told),
        "vocabulary_norms": plot.vocabulary_norms(frames.trajectories(), threshold=10.0, **told),
        "vocabulary_map": plot.vocabulary_map(frames.vocabulary()[:60], threshold=10.0, **told),
        "pre_attention_spikes": plot.pre_attention_spikes(frames.spikes(), **told),
        "damage_map": plot.damage_map(frames.precision(), **told),
        "kept_tokens": plot.kept_tokens(frames.precision(), **told),
        "guess_and_result": plot.guess_and_result(
            {"one": 0.4, "other": None},
            {"one": 0.7, "other": 0.1},
            "attention [probability]",
            **told,
        ),
        "sweep_curves": plot.sweep_curves(frames.sweep(), **told),
        "head_maps": plot.head_maps({"T = 12": report, "T = 8": other}, **told),
    }


def test_no_figure_of_the_package_is_left_out():
    drawn = {name.split(",")[0] for name in all_figures("light")}
    left_out = frames.FIGURES - drawn
    assert not left_out, f"add {', '.join(sorted(left_out))} to all_figures() in this file"


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_is_drawn_quietly_at_notebook_width(open_page, theme):
    figures = all_figures(theme)
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=not index, config=CONFIG)
        for index, figure in enumerate(figures.values())
    ]
    page = open_page(f"<meta charset='utf-8'><body>{''.join(parts)}", width=780)
    page.page.wait_for_function(
        f"document.querySelectorAll('.plotly-graph-div .main-svg .gtitle').length === {len(parts)}"
    )
    assert page.said == [] and page.requests == []
    titles = page.page.locator(".gtitle").all_text_contents()
    subtitles = page.page.locator(".gtitle-subtitle").all_text_contents()
    assert all(titles)
    assert all("ε = 0.3" in line and "T = " in line and "BOS" in line for line in subtitles)
    outside = page.page.evaluate(
        """[...document.querySelectorAll('.plotly-graph-div')].flatMap(figure => {
            const {right, bottom} = figure.getBoundingClientRect();
            return [...figure.querySelectorAll('.gtitle-subtitle, .xtitle, .legendtext')]
                .filter(text => text.getBoundingClientRect().right > right + 1
                    || text.getBoundingClientRect().bottom > bottom + 1)
                .map(text => text.textContent);
        })"""
    )
    assert outside == []
    overlapping = page.page.evaluate(
        """[...document.querySelectorAll('.plotly-graph-div')].flatMap(figure => {
            const boxes = ['.gtitle', '.gtitle-subtitle', '.legend'].map(name =>
                figure.querySelector(name)?.getBoundingClientRect()).filter(Boolean);
            const cross = (a, b) => a.top < b.bottom - 2 && b.top < a.bottom - 2
                && a.left < b.right && b.left < a.right;
            return boxes.some((a, i) => boxes.some((b, j) => i < j && cross(a, b)))
                ? [figure.querySelector('.gtitle').textContent] : [];
        })"""
    )
    assert overlapping == []


def pixels(page, at: list[list[float]]) -> list[list[int]]:
    """Red, green, blue of some places of what is on the screen."""
    picture = base64.b64encode(page.page.screenshot()).decode()
    return page.page.evaluate(
        """async ([picture, at]) => {
            const image = new Image();
            image.src = "data:image/png;base64," + picture;
            await image.decode();
            const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
            canvas.drawImage(image, 0, 0);
            return at.map(([x, y]) => [...canvas.getImageData(x, y, 1, 1).data.slice(0, 3)]);
        }""",
        [picture, at],
    )


@pytest.mark.parametrize("width", [390, 900])
@pytest.mark.parametrize("figure", ["map", "pattern"])
def test_the_sink_of_a_long_text_is_painted(open_page, width, figure):
    length = 4096
    if figure == "map":
        received = torch.full((4, 6, length), 1e-4)
        received[..., 0] = 0.5
        drawn = plot.position_map(synthetic_report(positions=length, received_attention=received))
    else:
        attention = torch.full((length, length), 0.1 / length).tril()
        attention[:, 0] = 0.99
        drawn = plot.attention_pattern(attention, about=ABOUT)
    page = open_page(drawn.to_html(config=CONFIG), width=width)
    page.page.wait_for_selector(".heatmaplayer image")
    box = page.page.locator(".nsewdrag").first.bounding_box()
    low = box["y"] + 0.8 * box["height"]
    sink, others = pixels(page, [[box["x"] + 0.5, low], [box["x"] + 0.4 * box["width"], low]])
    assert sink[0] > 200 and sink[1] > 200 and sink[2] < 80, "yellow, as the top of the scale"
    assert max(others) < 100


def test_the_hover_of_a_pattern_names_both_tokens(open_page):
    length = 48
    attention = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    tokens = [f" w{position}" for position in range(length)]
    page = open_page(plot.attention_pattern(attention, tokens, about=ABOUT).to_html(config=CONFIG))
    page.page.wait_for_selector(".heatmaplayer image")
    box = page.page.locator(".nsewdrag").first.bounding_box()
    for query, key in ((47, 0), (30, 11)):
        across, down = (key + 0.5) / length, (query + 0.5) / length
        page.page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        page.page.wait_for_timeout(300)
        said = page.page.locator(".hoverlayer").text_content().translate({0x2068: "", 0x2069: ""})
        assert f"query {query} ␣w{query}, key {key} ␣w{key}" in said
        assert f"{1 / (query + 1):.3g}" in said


def test_threshold_slider_works_without_a_kernel(open_page):
    report = synthetic_report(prompts=3)
    figure = plot.head_map(report)
    page = open_page(figure.to_html(config=CONFIG))
    page.page.wait_for_selector(".slider-grip-rect")
    before = page.page.text_content(".gtitle")
    box = page.page.locator(".slider-rail-touch-rect").bounding_box()
    page.page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    page.page.wait_for_function(f"document.querySelector('.gtitle').textContent !== {before!r}")
    title = page.page.text_content(".gtitle")
    threshold = float(title.rsplit(" ", 1)[1])
    above = (report.sink_attention.double().mean(0) > threshold).double().mean()
    assert f"{above:.0%} of 24 heads" in title
    assert page.said == [] and page.requests == []


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<svg"), (".png", b"\x89PNG")])
def test_pictures_are_drawn_where_chrome_is(chromium_path, tmp_path, monkeypatch, suffix, start):
    pytest.importorskip("kaleido", reason="pip install 'sinkscope[image]'")
    monkeypatch.setenv("BROWSER_PATH", chromium_path)
    path = plot.save(plot.head_map(synthetic_report()), tmp_path / f"x{suffix}")
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 10_000
