"""MiniLM: the first position's vector makes the sink, wherever it is put."""

from __future__ import annotations

import pytest

import sinkscope as ss
from sinkscope.experiments.nonmixture import nonmixture
from sinkscope.experiments.waiver import (
    PositionEdit,
    position_embeddings,
    position_norms,
    structured_mask,
)

pytestmark = pytest.mark.real

STARTS = ("special", "random")


@pytest.fixture(scope="module")
def edited(minilm) -> PositionEdit:
    return position_embeddings(minilm, ss.texts("prose", prompts=4, length=300), progress=False)


def row(found: PositionEdit, start: str, change: str) -> int:
    pairs = list(zip(found.starts, found.changes, strict=True))
    return pairs.index((start, change))


def test_the_first_vector_stands_far_out(minilm) -> None:
    found = position_norms(minilm).statistics()
    assert found["first_over_median"] > 4
    assert found["deviations"] > 30
    assert found["first"] > 2 * found["largest_of_others"]


@pytest.mark.parametrize("start", STARTS)
def test_the_first_vector_makes_a_sink_of_any_position(edited: PositionEdit, start: str) -> None:
    unchanged, replaced = row(edited, start, "unchanged"), row(edited, start, "first replaced")
    assert edited.attention_to(unchanged, 0).min() > 0.08
    assert edited.attention_to(unchanged, 1).max() < 0.01
    first, other = edited.attention_to(replaced, 0), edited.attention_to(replaced, 1)
    assert (other > 0.9 * first).all() and other.min() > 0.05
    for layer in (1, 2, 3, 4, 5):  # every layer but the first
        received = edited.received_attention[replaced, :, layer]
        assert received[:, 255].mean() > 10 * received[:, 100:200].mean()


def test_swapped_it_takes_the_sink_away_from_a_random_start(edited: PositionEdit) -> None:
    swapped = row(edited, "random", "first swapped")
    assert edited.attention_to(swapped, 1).min() > 0.08
    assert edited.attention_to(swapped, 0).max() < 0.02
    # [CLS] keeps some of it without its position vector: token and position both mark it.
    special = row(edited, "special", "first swapped")
    assert edited.attention_to(special, 0).min() > 0.03
    assert edited.attention_to(special, 1).min() > 0.05


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("how", ["replaced", "swapped"])
def test_the_last_vector_makes_no_sink(edited: PositionEdit, start: str, how: str) -> None:
    last = row(edited, start, f"last {how}")
    assert edited.attention_to(last, 1).max() < 0.02
    assert edited.attention_to(last, 0).min() > 0.08


def test_one_dim_marks_the_first_position(minilm) -> None:
    found = nonmixture(minilm, ss.texts("prose", prompts=4, length=128), progress=False)
    assert found.first_writers() == {99: 0}
    assert found.neurons()[0]["neuron"] == 856 and found.neurons()[0]["share"] > 0.95


def test_a_mask_makes_no_lasting_sink_here(minilm) -> None:
    """The other model's control does not work on this one: selection is by position."""
    texts = ss.texts("prose", prompts=4, length=300)
    found = structured_mask(minilm, texts, starts=["given"], progress=False)
    assert found.attention_to(1, 1).mean() < 0.5 * found.attention_to(1, 0).mean()
