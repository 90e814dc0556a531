"""A prompt's tokens as cells."""

import numpy as np
import plotly.colors
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError
from tests.report.factory import synthetic_report


def test_a_strip_says_where_its_prompt_is_seen_by_few_queries():
    report = synthetic_report(prompts=2, lengths=[16, 12])
    for prompt, metric, tokens, said in (
        (0, "received_peak", 16, "from 12 on seen by few queries"),
        (1, "received_peak", 16, "from 9 on seen by few queries"),
        (0, "received_peak", 12, None),
        (0, "residual_outlier", 16, None),
    ):
        figure = plot.token_strip(report, prompt, metric, tokens=tokens)
        line = figure.layout.title.subtitle.text
        assert line.endswith(said) if said else "few" not in line


def strip_cells(figure) -> list[tuple[str, float]]:
    """Text and colour value of the token cells in reading order."""
    cells, words = figure.data
    assert np.isnan(np.ravel(cells.z)[len(words.text) :]).all()
    return list(zip(words.text, np.ravel(cells.z).tolist(), strict=False))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_are_read_on_every_colour_of_the_strip(theme):
    values = torch.linspace(0.001, 1, 100).log()[None].sub(torch.tensor(0.001).log())
    values[0, 99] = torch.nan
    report = synthetic_report(prompts=1, positions=100, received_peak=values)
    cells, words = plot.token_strip(report, log=False, theme=theme).data
    scale = plotly.colors.get_colorscale("Viridis")

    def luminance(colour: str) -> float:  # WCAG 2
        if colour.startswith("#"):
            parts = [int(c, 16) / 15 for c in colour[1:]]
        else:
            parts = [part / 255 for part in plotly.colors.unlabel_rgb(colour)]
        red, green, blue = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for value, ink in list(zip(np.ravel(cells.z), words.textfont.color, strict=True))[:99]:
        share = (value - cells.zmin) / (cells.zmax - cells.zmin)
        (under,) = plotly.colors.sample_colorscale(scale, [float(share)])
        dark, bright = sorted([luminance(ink), luminance(under)])
        assert (bright + 0.05) / (dark + 0.05) > 4.5, (share, ink)
    assert words.textfont.color[99] == plot.theme.palette(theme).ink


def test_token_strip_shows_each_token_with_its_figure():
    report = synthetic_report(prompts=2, lengths=[16, 13])
    cells = strip_cells(plot.token_strip(report, 1, log=False))
    assert [text.strip("\u2068\u2069") for text, _ in cells] == report.token_text[1]
    assert [value for _, value in cells] == pytest.approx(report.received_peak[1, :13].tolist())


def test_token_strip_is_logarithmic_by_default():
    report = synthetic_report()
    cells = strip_cells(plot.token_strip(report, 0, "residual_outlier"))
    expected = report.residual_outlier[0].double().log10().tolist()
    assert [value for _, value in cells] == pytest.approx(expected, rel=1e-5)


def test_token_strip_of_a_long_prompt_says_which_part_it_shows():
    report = synthetic_report(prompts=1, layers=1, positions=1000)
    figure = plot.token_strip(report, start=500, tokens=100)
    assert len(strip_cells(figure)) == 100
    assert "positions 500 to 599 of 1,000" in figure.layout.title.text
    assert "position 500: " in figure.data[0].customdata[0][0]
    with pytest.raises(ReportError, match="no position 1000"):
        plot.token_strip(report, start=1000)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        (" the", "␣the"),
        ("a ", "a␣"),
        ("\n\t\x00", "⏎⇥␀"),
        ("", "∅"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("שלום", "שלום"),
        ("x" * 40, "x" * 31 + "…"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_token_text_is_data(token, shown):
    report = synthetic_report(prompts=1, positions=2, token_text=[[token, "b"]])
    hover = plot.token_strip(report).data[0].customdata[0][0]
    assert hover.startswith(f"position 0: \u2068{shown}\u2069<br>")
