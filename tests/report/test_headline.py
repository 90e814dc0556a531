"""The sentences on top of a report, and the one count of sink heads."""

from __future__ import annotations

import re

import pytest
import torch

import sinkscope as ss
from sinkscope.html.report_page import to_html
from sinkscope.report.headline import headline, numbers
from sinkscope.report.key_numbers import key_numbers
from tests.report.factory import only, synthetic_report

EVEN = sum(1 / (i + 1) for i in range(1, 16)) / 15
"""Causal attention over 16 positions, spread evenly by each query after position 0."""


def report(attention: torch.Tensor, **changes):
    """2 prompts, 4 layers, 6 heads, 16 positions, without windows."""
    settings = {"windows": (None,) * 4} | changes.pop("settings", {})
    return synthetic_report(2, sink_attention=attention, settings=settings, **changes)


def heads(*means: float) -> torch.Tensor:
    """Sink attention whose mean over two prompts is this, head by head; the rest is 0.1."""
    attention = torch.full((2, 4, 6), 0.1)
    for index, mean in enumerate(means):
        attention[0].view(-1)[index], attention[1].view(-1)[index] = mean - 0.1, mean + 0.1
    return attention


def test_a_strong_sink_its_writer_and_its_values():
    peak = torch.tensor([1.2, 179.4, 150.0, 6.0]).expand(2, 4)
    drain = torch.full((2, 4, 2), 0.241)
    attention = heads(*[0.8] * 12)
    said = headline(
        report(attention, residual_peak=peak, value_drain=drain, learned_sink_mass=None)
    )
    ratio = float(attention.mean()) / EVEN
    assert said == (
        "synthetic has a strong sink at position 0: half of its heads (12 of 24) pay it more than "
        f"0.3 of their attention; the mean over heads, 0.45, is {ratio:.2g} times that of uniform "
        "attention. Block 1 writes the residual peak (179 times the others' norm, dim 3). The "
        "sink's values have about a quarter of the others' norm (0.24)."
    )


def test_heads_at_epsilon_are_no_sink_heads_and_prompts_are_averaged_first():
    attention = torch.full((2, 4, 6), 0.25)  # exact in binary
    attention[:, 0, 0] = torch.tensor([0.0, 0.75])  # mean 0.375, though one prompt pays nothing
    made = report(attention, settings={"epsilon": 0.25})
    assert made.sink_heads().nonzero().tolist() == [[0, 0]]
    assert made.sink_heads(0.375).sum() == 0
    assert "synthetic has a sink at position 0: 1 of its 24 heads pays it more" in headline(made)


def test_no_sink_head_is_said_with_the_largest():
    said = headline(only(report(heads(0.2)), "sink_attention"))
    assert said.startswith(
        "synthetic has no sink head at position 0: no head pays it more than 0.3"
    )
    assert "(at most 0.2)" in said


def test_several_sinks_and_moving_ones_are_named():
    sinks = torch.zeros(2, 16, dtype=torch.bool)
    sinks[:, 0] = sinks[1, 5] = True
    said = headline(report(heads(*[0.8] * 24), sink_mask=sinks, settings={"sinks": "auto"}))
    assert "has strong sinks at positions 0 and 5 (in 1 of 2 prompts): all of its 24 heads" in said
    assert "pay them together more than 0.3" in said


def test_no_sink_found_and_nothing_after_the_sink():
    none = report(torch.full((2, 4, 6), torch.nan), sink_mask=torch.zeros(2, 16, dtype=torch.bool))
    assert headline(only(none, "sink_attention")) == (
        "No position of these texts is a sink of synthetic."
    )
    alone = report(torch.full((2, 4, 6), torch.nan))
    assert "no query comes after it" in headline(only(alone, "sink_attention"))
    assert numbers(only(alone, "sink_attention")) == []


def test_no_peak_equal_values_and_what_was_not_measured():
    plain = report(
        heads(0.8), residual_peak=torch.full((2, 4), 2.431), value_drain=torch.ones(2, 4, 2)
    )
    said = headline(only(plain, "residual_peak", "value_drain"))
    assert said == (
        "The sink has no residual peak: at most 2.4 times the others' norm. The sink's values have "
        "the others' norm."
    )
    assert headline(only(plain)) == ""


def test_prompts_in_which_uniform_attention_exceeds_epsilon_are_too_short():
    short = only(report(heads(0.8), settings={"epsilon": 0.05}), "sink_attention")
    said = headline(short)
    assert "too short to tell whether" in said and "already exceeds ε = 0.05" in said
    assert "strong" not in said


def test_an_even_number_of_drains_has_the_mean_of_the_middle_two_as_median():
    drain = torch.tensor([0.05, 0.15, 0.35, 0.95] * 2).reshape(4, 2).expand(2, 4, 2)
    made = only(report(heads(0.8), value_drain=drain), "value_drain")
    assert "(0.25)" in headline(made)
    assert key_numbers(made)["value_drain"] == pytest.approx(0.25)


def test_what_masks_of_interventions_do_not_change_is_said():
    under = {"interventions": ("WindowedAttention(8)",)}
    said = headline(only(report(heads(0.8), settings=under), "sink_attention"))
    assert "uniform attention under the model's own mask" in said


@pytest.mark.parametrize(
    ("peak", "said"),
    [
        ([1.0, 12.0, 40.0, 3.0], "Block 2 writes the residual peak (40 times the others' norm)."),
        (
            [40.0, 39.0, 38.0, 1.0],
            "The residual peak is there after block 0 (40 times the others' norm).",
        ),
        ([1.0, 40.0, 49.0, 3.0], "Block 1 writes the residual peak (40 times the others' norm)."),
        (
            [8.0, 15.0, 24.0, 40.0],
            "The residual peak grows over many blocks, up to block 3 (40 times the others' norm).",
        ),
    ],
)
def test_a_block_writes_the_peak_only_if_it_adds_most_of_it(peak: list[float], said: str):
    peaks = torch.tensor(peak).expand(2, 4)
    assert headline(only(report(heads(0.8), residual_peak=peaks), "residual_peak")) == said


@pytest.mark.parametrize("causal", [True, False])
def test_the_even_spread_is_that_of_the_mask(causal: bool):
    made = only(report(heads(*[0.8] * 24), settings={"causal": causal}), "sink_attention")
    even = EVEN if causal else 1 / 16
    assert f"is {float(f'{0.8 / even:.2g}'):g} times that of uniform attention" in headline(made)


def test_terminal_notebook_page_and_figure_count_the_same_heads():
    made = synthetic_report(prompts=4)
    count = int((made.sink_attention.double().mean(0) > 0.3).sum())
    assert f"({count} of 24)" in headline(made) or f"{count} of its 24" in headline(made)
    assert re.search(rf"Sink heads\s+{count} of 24", repr(made))
    assert f"{count} of 24" in made._repr_html_() and f"{count} of 24" in to_html(made)
    assert f"{count / 24:.0%} of 24 heads above 0.3" in ss.plot.head_map(made).layout.title.text


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ([(0, 2, 5)], "In layer 2, position 5 is a secondary sink"),
        (
            [(0, 1, 5), (1, 3, 7)],
            "In some of the layers 1 to 3, 2 other positions are secondary sinks",
        ),
    ],
)
def test_secondary_sinks_have_a_sentence_of_their_own(places, sentence):
    found = synthetic_report(settings={"sinks": "auto"})
    secondary = torch.zeros(3, 4, 16, dtype=torch.bool)
    assert "secondary" not in headline(synthetic_report(secondary_sinks=secondary))
    for place in places:
        secondary[place] = True
    assert sentence in headline(synthetic_report(secondary_sinks=secondary))
    assert "secondary" not in headline(found)
