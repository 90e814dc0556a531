"""The tables and tokens of the one-file report."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from sinkscope.html import tables, tokens
from tests.report.factory import synthetic_report

LENGTHS = [16, 12, 7]


def received() -> torch.Tensor:
    """Most at the ends of prompts, which few queries see; little elsewhere; nan in the padding."""
    figures = torch.full((3, 16), torch.nan)
    for prompt, length in enumerate(LENGTHS):
        for position in range(length):
            figures[prompt, position] = 0.01 * position + (0.5 if position >= length - 2 else 0)
    return figures


def listed(**fields) -> tuple[dict[int, int], str]:
    """How many prompts each position is listed with, and what is said of the table."""
    report = synthetic_report(lengths=LENGTHS, received_peak=received(), **fields)
    table = tables.tables(report)["tokens"]
    return {row[0]: row[1] for row in table["rows"]}, table["about"]


def test_the_ends_of_causal_prompts_are_not_among_the_tokens_that_receive_most():
    places, about = listed()
    stops = (12, 9, 6)  # of each prompt's first three quarters
    assert places == {k: sum(k < stop for stop in stops) for k in range(12)}
    assert "last quarter" in about


def test_a_sink_is_listed_wherever_it_is_and_bidirectional_prompts_whole():
    sinks = torch.zeros(3, 16, dtype=torch.bool)
    sinks[:, 5] = sinks[0, 15] = True
    places, _ = listed(sink_mask=sinks)
    assert places[15] == 1 and 14 not in places and places[6] == 2
    places, about = listed(settings={"causal": False})
    assert places == {k: sum(k < length for length in LENGTHS) for k in range(16)}
    assert about == ""


@pytest.mark.parametrize(("prompts", "length"), [(4, 40), (200, 64), (700, 64), (300, 600)])
def test_the_page_carries_so_many_tokens_and_no_more(prompts: int, length: int):
    report = synthetic_report(prompts=prompts, positions=length)
    carried = tokens.tokens(report)
    assert carried["of"] == prompts
    held = len(carried["prompts"])
    assert sum(map(len, carried["prompts"])) <= 2**15
    assert len(carried["lengths"]) == held == min(prompts, 128)
    for stored, name in zip(carried["quantities"], tables.token_fields(report), strict=True):
        shape = stored["values"]["shape"]
        assert shape == [held, min(length, 256)]
        values = np.frombuffer(base64.b64decode(stored["values"]["data"]), "<f4").reshape(shape)
        np.testing.assert_array_equal(values, report[name][: shape[0], : shape[1]].numpy())


def test_a_position_that_is_strong_in_every_prompt_is_one_row():
    strong = torch.full((3, 16), 0.1)
    strong[:, 0] = torch.tensor([0.5, 0.9, 0.7])
    texts = [["a"] * 16, ["b"] * 16, ["a"] * 16]
    report = synthetic_report(received_peak=strong, token_text=texts, residual_outlier=None)
    row = tables.tables(report)["tokens"]["rows"][0]
    assert row == [0, 3, 1, "a, b", pytest.approx(0.9)]


def test_massive_activations_are_one_row_a_dim_and_position():
    report = synthetic_report(prompts=3)  # dims 3 and 7, at position 0 after layer 1, in each
    table = tables.tables(report)["massive"]
    values = report.massive.value
    assert [row[:4] for row in table["rows"]] == [[3, 0, "1", 3], [7, 0, "1", 3]]
    assert table["rows"][0][4] == pytest.approx(float(values[::2].max()), rel=1e-5)


def test_wordpieces_are_told_from_tokens_that_bring_their_spaces():
    for words, spaced in ((["the", "##me", "s"], False), (["the", " me", "s"], True)):
        report = synthetic_report(2, positions=3, token_text=[words, words])
        assert tokens.tokens(report)["spaced"] is spaced
        assert tokens.tokens(report)["prompts"][0] == words
