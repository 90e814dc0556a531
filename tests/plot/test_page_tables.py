"""The tables and tokens of the one-file report."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from sinkscope.html import data as tables
from tests.unit.report_factory import synthetic_report

LENGTHS = [16, 12, 7]


def received() -> torch.Tensor:
    """Most at the ends of prompts, which few queries see; little elsewhere; nan in the padding."""
    figures = torch.full((3, 16), torch.nan)
    for prompt, length in enumerate(LENGTHS):
        for position in range(length):
            figures[prompt, position] = 0.01 * position + (0.5 if position >= length - 2 else 0)
    return figures


def listed(**fields) -> tuple[set[tuple[int, int]], str]:
    report = synthetic_report(lengths=LENGTHS, received_peak=received(), **fields)
    table = tables.tables(report)["tokens"]
    return {(row[0], row[1]) for row in table["rows"]}, table["about"]


def test_the_ends_of_causal_prompts_are_not_among_the_tokens_that_receive_most():
    places, about = listed()
    first_three_quarters = {0: 12, 1: 9, 2: 6}
    assert places == {(p, k) for p, stop in first_three_quarters.items() for k in range(stop)}
    assert "last quarter" in about


def test_a_sink_is_listed_wherever_it_is_and_bidirectional_prompts_whole():
    sinks = torch.zeros(3, 16, dtype=torch.bool)
    sinks[:, 5] = sinks[0, 15] = True
    places, _ = listed(sink_mask=sinks)
    assert (0, 15) in places and (0, 14) not in places and (2, 6) not in places
    places, about = listed(settings={"causal": False})
    assert places == {(p, k) for p, length in enumerate(LENGTHS) for k in range(length)}
    assert about == ""


@pytest.mark.parametrize(("prompts", "length"), [(4, 40), (200, 64), (700, 64), (300, 600)])
def test_the_page_carries_so_many_tokens_and_no_more(prompts: int, length: int):
    report = synthetic_report(prompts=prompts, positions=length)
    carried = tables.tokens(report)
    assert carried["of"] == prompts
    held = len(carried["prompts"])
    assert sum(map(len, carried["prompts"])) <= 2**15
    assert len(carried["lengths"]) == held == min(prompts, 128)
    for stored, name in zip(carried["quantities"], tables.QUANTITIES, strict=True):
        shape = stored["values"]["shape"]
        assert shape == [held, min(length, 256)]
        values = np.frombuffer(base64.b64decode(stored["values"]["data"]), "<f4").reshape(shape)
        np.testing.assert_array_equal(values, report[name][: shape[0], : shape[1]].numpy())
