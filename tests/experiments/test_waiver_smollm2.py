"""SmolLM2: an element that is made to mix nothing becomes the sink that position 0 was."""

from __future__ import annotations

import pytest

import sinkscope as ss
from sinkscope.experiments.nonmixture import nonmixture
from sinkscope.experiments.waiver import Designation, structured_mask
from sinkscope.experiments.which_part import which_part

pytestmark = pytest.mark.real

PEAK_LAYER, DIM = 11, 507
"""Where the peak is written, and in which dim; measured on these very weights."""
P = 48


@pytest.fixture(scope="module")
def designated(smollm2) -> Designation:
    """Position 255, with special and with random start tokens."""
    texts = ss.texts("prose", prompts=2, length=280)
    return structured_mask(smollm2, texts, progress=False)


@pytest.mark.parametrize("start", ["special", "random"])
def test_the_designated_element_becomes_a_sink(designated: Designation, start: str) -> None:
    before = designated.names.index(f"{start} start · 255 unchanged")
    after = designated.names.index(f"{start} start · 255 designated")
    sink = designated.attention_to(before, 0)
    assert sink.min() > 0.3
    assert designated.attention_to(before, 1).max() < 0.03, "it was a sink before"
    gained, kept = designated.attention_to(after, 1), designated.attention_to(after, 0)
    assert (gained > 0.7 * kept).all(), "not comparable with position 0"
    assert (kept < 0.75 * sink).all(), "position 0 does not give way"


@pytest.mark.parametrize("start", ["special", "random"])
def test_it_gets_the_sinks_peak_drain_and_dims(designated: Designation, start: str) -> None:
    before = designated.names.index(f"{start} start · 255 unchanged")
    after = designated.names.index(f"{start} start · 255 designated")
    assert designated.peak(before, 255).max() < 3
    assert (designated.peak(after, 255)[:, PEAK_LAYER] > 100).all()
    assert designated.drain(before, 255).min() > 0.6
    assert designated.drain(after, 255).max() < 0.35
    for index in (before, after):
        assert (PEAK_LAYER, DIM) in {dim[:2] for dim in designated.nonmixture_dims(index, 0)}
    assert designated.nonmixture_dims(before, 1) == []
    assert (PEAK_LAYER, DIM) in {dim[:2] for dim in designated.nonmixture_dims(after, 1)}
    assert designated.same_dims(after)[PEAK_LAYER] > 0.99
    assert designated.same_dims(before)[PEAK_LAYER] < 0.5


@pytest.mark.parametrize("start", ["special", "random"])
def test_the_loss_changes_by_little(designated: Designation, start: str) -> None:
    after = designated.names.index(f"{start} start · 255 designated")
    change = designated.loss_change(after)
    assert change is not None
    assert abs(change["after_it"].mean) < 0.15
    assert change["after_it"].low <= change["after_it"].mean <= change["after_it"].high
    # What came before the element never sees it, and the element itself is blind to the text.
    unchanged = designated.loss[after, :, :255] - designated.loss[after - 1, :, :255]
    assert unchanged.abs().max() < 1e-3
    assert change["at_the_position"].mean > 0.5


def test_other_positions_can_be_designated(smollm2) -> None:
    texts = ss.texts("prose", prompts=2, length=80, seed=3)
    for position in (17, 48):
        found = structured_mask(smollm2, texts, position, starts=["given"], progress=False)
        assert (found.attention_to(1, 1) > 0.6 * found.attention_to(1, 0)).all()
        assert (found.peak(1, position)[:, PEAK_LAYER] > 100).all()


def test_which_dims_and_neurons_mark_the_first_position(smollm2) -> None:
    found = nonmixture(smollm2, ss.texts("prose", prompts=3, length=64), progress=False)
    assert found.first_writers() == {DIM: PEAK_LAYER}
    written = next(record for record in found.found if record["layer"] == PEAK_LAYER)
    assert written["value"] > 10_000 and written["share"] == 1.0
    neurons = [n for n in found.neurons() if (n["layer"], n["dim"]) == (PEAK_LAYER, DIM)]
    assert {neuron["neuron"] for neuron in neurons[:2]} == {1229, 1487}
    assert sum(neuron["share"] for neuron in neurons[:2]) == pytest.approx(1, abs=0.03)
    # What layer 11 writes, the last two layers take back.
    assert all(record["value"] < 0 for record in found.found if record["layer"] > 27)


def test_which_part_makes_it(smollm2) -> None:
    """Masking the layers up to the peak is enough; after it, or the norm alone, does nothing."""
    texts = ss.texts("prose", prompts=2, length=80, seed=3)
    found = which_part(smollm2, texts, P, first_layers=(3,), progress=False)
    left = {
        (name, target): found.left(case)
        for case, (name, target) in enumerate(zip(found.cases, found.targets, strict=True))
    }
    assert found.peak_layer == PEAK_LAYER and found.dims == (DIM,) and found.dims_by_rule
    designated = left["masked in every layer", P]
    assert designated > 0.4
    assert left["unchanged", P] < 0.1
    assert left["masked in layers 0 to 2", P] < 0.1, "the mask has to last longer"
    assert left[f"masked up to the peak (layer {PEAK_LAYER})", P] > 0.8 * designated
    assert left["masked only after the peak", P] < 0.2 * designated
    assert left["unmasked, only the norm set to the sink's", P] < 0.2 * designated
    assert left["only the norm, set to an ordinary one", 0] < 0.2
    assert left["the peak's dims set to their mean", 0] == pytest.approx(1, abs=0.05)
    loss = dict(zip(found.cases, found.loss.mean(1).tolist(), strict=False))
    assert loss["the peak's dims set to 0"] > loss["unchanged"] + 5, "the model survived"
    assert loss["the peak's dims set to their mean"] == pytest.approx(loss["unchanged"], abs=0.05)
