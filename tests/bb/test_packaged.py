"""The packaged toy model shows sink, drain and peak; a classroom run forms a sink of its own."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import torch

import sinkscope as ss
from sinkscope import bb
from sinkscope.bb.packaged import packaged_file
from sinkscope.errors import ModelError, UnsupportedError


@pytest.fixture(scope="module")
def model():
    return ss.load_model("bb-3l", device="cpu")


@pytest.fixture(scope="module")
def report(model):
    return ss.scan(model, bb.task_texts(prompts=8, length=256, seed=1), progress=False)


def test_scan_shows_the_sink_the_drain_and_the_peak(report):
    sink = report.sink_attention.mean(0)
    assert sink.max() > 0.6 and int(sink.argmax()) == 2  # the last layer's head
    assert report.value_drain.shape == (8, 3, 1)  # prompt, layer, kv_head
    assert report.value_drain[:, 2].max() < 0.1
    assert report.residual_peak[:, 0].min() > 1.8


def test_the_readme_says_what_a_scan_of_it_says(model):
    stated = re.search(
        r"L2H0 sends (\.\d+) of all its attention to BOS \(`bb.measure`: (\.\d+) on\s"
        r"non-trigger queries\), the value of BOS is ([\d.]+) of the others', the residual norm "
        r"of BOS is ([\d.]+) times the others'\smedian after layer 0",
        files("sinkscope.bb").joinpath("README.md").read_text("utf-8"),
    )
    assert stated is not None
    texts = bb.task_texts()
    report = ss.scan(model, texts, progress=False)
    found = (
        report.sink_attention[:, 2, 0].mean(),
        bb.measure(*bb.load_model(packaged_file("bb-3l")), texts.tokens).sink_attention[2, 0],
        report.value_drain[:, 2, 0].mean(),
        report.residual_peak[:, 0].mean(),
    )
    for text, value in zip(stated.groups(), found, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == round(value.item(), digits)


def test_scan_agrees_with_the_laboratorys_own_measurement(model, report):
    """Two implementations of the same quantities: hooks on the bridge, and taps on the module."""
    module, task = bb.load_model(packaged_file("bb-3l"))
    tokens = bb.task_texts(prompts=8, length=256, seed=1).tokens
    found = bb.measure(module, task, tokens)
    at_work = task.is_trigger[tokens][:, 1:].float().mean().item()
    both = (1 - at_work) * found.sink_attention + at_work * found.trigger_attention
    # The scan averages over prompts first; trigger shares differ a little from prompt to prompt.
    torch.testing.assert_close(report.sink_attention.mean(0), both, atol=5e-3, rtol=0)
    # The scan takes the median of each prompt, the laboratory that of all positions together.
    assert report.residual_peak.shape == (8, 3)
    peaks = report.residual_peak.mean(0)
    torch.testing.assert_close(peaks, found.residual_peak, rtol=0.15, atol=0)


def test_the_recipe_says_how_it_was_made():
    recipe = bb.packaged_recipe()
    assert recipe["config"]["steps"] == 8000 and recipe["config"]["model"]["layers"] == 3
    assert recipe["triggers"] == [" ", "e", "t"]
    last = {(m, layer): v for step, m, layer, head, v in recipe["log"] if step == 8000}
    module, task = bb.load_model(packaged_file("bb-3l"))
    found = bb.measure(module, task, task.sample(64, 256, seed=11))
    assert found.sink_attention[2, 0].item() == pytest.approx(last["sink_attention", 2], abs=0.01)
    assert found.value_drain[2, 0].item() == pytest.approx(last["value_drain", 2], rel=0.05)
    assert found.residual_peak[0].item() == pytest.approx(last["residual_peak", 0], rel=0.05)
    assert found.backcopy_excess < 1e-3 and found.bigram_excess < 5e-3


def test_the_task_is_the_one_in_the_file():
    assert torch.equal(bb.packaged_task().source.transition, bb.BigramSource.english().transition)


def test_its_head_is_active_on_triggers_and_dormant_elsewhere(model):
    module, task = bb.load_model(packaged_file("bb-3l"))
    table = bb.knockouts(module, task, task.sample(16, 256, seed=3))
    table = table.set_index(["intervention", "layer"])
    assert table.loc[("zero attention", 2), "backcopy_excess"].item() > 3
    assert table.loc[("zero attention", 2), "bigram_excess"].item() < 5e-3
    assert table.loc[("clean pattern", 2), "backcopy_excess"].item() < 1e-3


def test_any_text_can_be_shown_to_it(model):
    tokens = model.to_tokens("the cat\n§")
    task = bb.packaged_task()
    symbols = task.source.symbols
    expected = [task.bos_id, *(symbols.index(c) for c in "the cat\n"), task.delimiter_id]
    assert tokens.tolist() == [expected]
    texts = ss.texts("prose", prompts=2, length=64).tokenize(model)
    assert texts.tokens.shape == (2, 64) and (texts.tokens[:, 0] == task.bos_id).all()
    report = ss.scan(model, texts, progress=False)
    assert report.sink_attention[:, 2].mean() > 0.4


def test_experiments_take_it_or_say_why_not(model):
    """Losses of an experiment are those of its logits; it has no cache for a long text."""
    from sinkscope.experiments.streaming_context import streaming_context
    from sinkscope.experiments.waiver import structured_mask
    from sinkscope.experiments.which_part import which_part

    texts = bb.task_texts(prompts=2, length=24)
    found = structured_mask(model, texts, 9, starts=["given"], progress=False)
    logits = model(texts.tokens, return_type="logits").detach().double()
    for prompt, tokens in enumerate(texts.tokens.tolist()):
        for query in range(23):
            row = logits[prompt, query]
            want = torch.log(torch.exp(row).sum()) - row[tokens[query + 1]]
            assert float(found.loss[0, prompt, query]) == pytest.approx(float(want), abs=1e-4)
    assert found.loss[1, :, 9].sub(found.loss[0, :, 9]).abs().max() > 1e-3, "the mask is in force"
    assert which_part(model, texts, 9, start="given", progress=False).loss is not None
    with pytest.raises(UnsupportedError, match="without a cache"):
        streaming_context(
            model, texts, tokens=24, designated=None, counted=["absolute"], progress=False
        )


@pytest.mark.parametrize("name", ["bb-1l", "bb-1l-gated", "bb-1l-learned-sink"])
def test_the_three_of_one_layer_solve_the_task_with_sinks_as_the_lesson_says(name):
    module, task = bb.load_model(packaged_file(name))
    recipe = bb.packaged_recipe(name)["config"]
    attention = {"bb-1l": "softmax"}.get(name, name.removeprefix("bb-1l-"))
    assert recipe["model"]["attention"] == attention and recipe["steps"] == 450
    found = bb.measure(module, task, task.sample(32, 64, seed=2))
    assert found.backcopy_excess < 0.02 and found.bigram_excess < 0.08
    report = ss.scan(ss.load_model(name), bb.task_texts(prompts=8, length=64), progress=False)
    if name == "bb-1l-gated":
        assert report.sink_attention.mean() < 0.4
        assert report.gated_sink_attention.mean() < 0.1 < 0.7 < report.value_drain.mean()
    else:
        assert report.sink_attention.mean() > 0.6 and report.value_drain.mean() < 0.3
        assert report.gate_mean is None
    assert (report.learned_sink_mass is not None) == (attention == "learned-sink")


def test_other_names_are_refused():
    with pytest.raises(ModelError, match="no packaged toy model 'bb-9l'"):
        bb.load_packaged("bb-9l")


@pytest.mark.slow
def test_a_classroom_grows_a_sink():
    run = bb.train(bb.TrainConfig.classroom(steps=400), device="cpu", progress=False)
    log = run.to_frame()
    curve = log[log.metric == "sink_attention"].set_index("step").value
    assert curve[0] < 0.1 and curve[400] > 0.8
    drain = log[log.metric == "value_drain"].set_index("step").value
    assert drain[400] < 0.35 * drain[0]
    risk = log[log.metric == "backcopy_excess"].set_index("step").value
    assert risk[400] < 0.05 < 3 < risk[0]
