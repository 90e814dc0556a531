"""Panels of the waiver laboratory's conditions: their order, scale and what they hold."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.experiments.waiver import Designation, PositionEdit, PositionNorms
from sinkscope.experiments.which_part import WhichPart
from tests.plot.found import CHANGES, P, conditions


def titles(figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_many_changes_stand_in_rows_with_the_starts_side_by_side() -> None:
    found = conditions(PositionEdit, CHANGES)
    figure = found.figures()["residual_norm-by-position"]
    assert titles(figure) == [f"{s}: {c}" for c in CHANGES for s in ("special", "random")]
    # The fourth panel is "random: first replaced", which is condition 4.
    dots = [t for t in figure.data if t.name == "sequence 1" and t.xaxis == "x4"]
    assert list(dots[0].y) == [41, 42, 43, 44, 45, 46]
    matches = [axis.matches for axis in figure.select_yaxes()]
    assert matches.count(None) == 1 and len(set(matches)) == 2, "all panels share one scale"


def test_one_change_stands_beside_the_unchanged() -> None:
    """(a) special, unchanged (b) special, changed (c) random, unchanged (d) random, changed."""
    found = conditions(Designation, ("unchanged", "designated"))
    figure = found.figures()["received_attention-by-position"]
    assert titles(figure) == list(found.names)
    assert figure.layout.yaxis.title.text == "received attention [probability]"


def test_the_attention_that_words_count_is_drawn_and_the_other_says_whose_it_is() -> None:
    """`paid` is the attention of the queries after P; `received_attention` is that of all."""
    found = conditions(Designation, ("unchanged", "designated"))
    layers = found.paid.shape[2]
    to_p = torch.arange(layers) * 0.1 + 0.05
    found.paid[1, ..., 1] = to_p[:, None]
    drawn = found.figures()
    figure = drawn["attention-by-layer"]
    assert figure.layout.title.text == f"Attention of the queries after {P}, by layer"
    (line,) = [t for t in figure.data if t.name == f"position {P}" and t.xaxis == "x2"]
    assert list(line.y) == pytest.approx(to_p.tolist())
    assert float(found.attention_to(1, 1).mean()) == pytest.approx(line.y[found.layers].mean())
    told = drawn["received_attention-by-position"].layout.title.subtitle.text.replace("<br>", " · ")
    first, last = found.layers[0], found.layers[-1]
    assert f"mean over layers {first} to {last}, of all queries that see a position" in told
    said = [figure.layout.title.text for figure in drawn.values()]
    assert len(set(said)) == len(said)


def test_parts_name_the_position_in_each_title() -> None:
    cases = ("untouched", "masked")
    found = WhichPart(
        about="synthetic",
        position=P,
        peak_layer=0,
        dims=(1,),
        dims_by_rule=True,
        cases=(*cases, *cases),
        targets=(0, 0, P, P),
        paid=torch.rand(4, 3),
        peak=torch.rand(4, 3),
    )
    assert [figure.layout.title.text for figure in found.figures().values()] == [
        f"Attention to position {P}, by condition", f"Residual peak at position {P}, by condition",
        "Attention to position 0, by condition", "Residual peak at position 0, by condition",
    ]  # fmt: skip


def test_many_cases_run_downwards() -> None:
    """Seven names do not fit side by side."""
    rows = [
        (f"case {case}", prompt, -1, P, "sink_attention", 0.1 * case + 0.01 * prompt)
        for case in range(7)
        for prompt in range(3)
    ]
    columns = ["condition", "prompt", "layer", "position", "metric", "value"]
    figure = plot.before_after(
        pd.DataFrame(rows, columns=columns), "sink_attention", about="synthetic", by="condition"
    )
    *sequences, mean = figure.data
    assert list(mean.y) == [f"case {case}" for case in range(7)]
    assert list(mean.x) == pytest.approx([0.1 * case + 0.01 for case in range(7)])
    assert list(sequences[2].x) == pytest.approx([0.1 * case + 0.02 for case in range(7)])
    assert mean.error_x.array is not None and mean.error_y.array is None
    assert figure.layout.xaxis.title.text == "sink attention [probability]"
    assert figure.layout.yaxis.autorange == "reversed"


def test_norms_of_position_vectors_mark_the_first_and_the_median() -> None:
    norm = torch.tensor([5.0, 1.0, 1.2, 0.8, 1.0])
    figure = PositionNorms(about="synthetic", norm=norm).figures()["norms"]
    heights = {
        float(x): float(y)
        for bar in figure.data
        if bar.type == "bar"
        for x, y in zip(bar.x, bar.y, strict=True)
    }
    assert heights == {i: pytest.approx(float(x)) for i, x in enumerate(norm)}
    assert list(figure.data[0].x) == [0] and figure.data[0].name == "the first"
    assert "5 × the median" in figure.layout.title.text
