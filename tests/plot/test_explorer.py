"""The explorer without a notebook around it: what clicks and controls do to its figures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ReportError, SinkscopeError
from sinkscope.explorer.session import INTERVENTIONS
from sinkscope.explorer.widgets import PlainViews
from tests.report.factory import only, synthetic_report

pytest.importorskip("ipywidgets", reason="pip install 'sinkscope[notebook]'")


def heights(explorer, name: str) -> list[float]:
    sink, others = explorer.figures[name].data[:2]
    return [*sink.y, *others.y]


@pytest.fixture
def explorer():
    return ss.explore(synthetic_report(prompts=4), widgets=True)


def click(explorer, layer: int, column: int) -> None:
    """What Plotly's widget reports when a cell of the map is clicked."""
    from plotly.callbacks import InputDeviceState, Points

    (trace, *_) = explorer.figures["map"].data
    points = Points([(layer, column)], [column], [layer], trace.name, 0)
    trace._dispatch_on_click(points, InputDeviceState(0, 0, 1, 0, 0, 0))


def send(explorer, text: str) -> None:
    """What the page sends when Measure is clicked with this text in the box."""
    explorer.panel.ask._handle_custom_msg({"text": text}, [])


def test_starts_at_a_strong_head_that_is_no_flat_line_with_every_figure_but_the_pattern(explorer):
    mean = explorer.report.sink_attention.mean(0)
    mean[mean > 0.9] = 0
    assert (explorer.layer, explorer.head) == divmod(int(mean.argmax()), 6)
    assert set(explorer.figures) == {"map", "received", "values", "residual", "tokens"}


def test_click_changes_the_linked_figures(explorer):
    click(explorer, 2, 4)
    report = explorer.report
    assert (explorer.layer, explorer.head) == (2, 4)
    assert heights(explorer, "received") == pytest.approx(report.received_attention[2, 4].tolist())
    assert heights(explorer, "values") == pytest.approx(report.value_norm[2, 1].tolist())
    assert heights(explorer, "residual") == pytest.approx(report.residual_norm[2].tolist())
    assert explorer.panel.layer.value == 2 and explorer.panel.head.value == 4
    assert explorer.panel.said.value.startswith("Layer 2, head 4: sink attention")
    click(explorer, 0, 1)  # the handler outlives a redraw
    assert (explorer.layer, explorer.head) == (0, 1)


def test_click_on_a_kv_head_chooses_its_first_query_head(explorer):
    explorer.choose(metric="value_drain")
    click(explorer, 1, 1)
    assert (explorer.layer, explorer.head) == (1, 3)
    assert explorer.panel.said.value.startswith("Layer 1, KV head 1: value drain")


def test_controls_choose_and_show_what_is_chosen(explorer):
    explorer.panel.metric.value = "honor"
    assert np.shape(explorer.figures["map"].data[0].z) == (4, 6)
    assert "HONOR" in explorer.figures["map"].layout.title.text
    assert explorer.panel.epsilon.disabled
    explorer.panel.metric.value = "sink_attention"
    explorer.panel.epsilon.value = 0.55
    assert "above 0.55" in explorer.figures["map"].layout.title.text
    explorer.panel.prompt.value = 3
    assert "prompt 3" in explorer.figures["tokens"].layout.title.text
    frame = explorer.figures["map"].layout.shapes[0]
    explorer.panel.layer.value = 3
    moved = explorer.figures["map"].layout.shapes[0]
    assert (moved.y0, moved.x0) == (2.5, frame.x0)


def test_a_head_that_is_not_there_is_refused(explorer):
    with pytest.raises(ReportError, match="no layer 4"):
        explorer.choose(layer=4)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(metric="foo"), "no metric 'foo' of every head; choose from 'sink_attention'"),
        (dict(metric="residual_norm"), "no metric 'residual_norm' of every head"),
        (dict(shown="foo"), "shown is 'foo'; choose from 'before' until"),
        (dict(shown="after"), "shown is 'after'; choose from 'before' until"),
        (dict(foo=1), "no 'foo' to choose in the explorer; choose from layer, head"),
        (dict(layer=3, metric="foo"), "no metric 'foo'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_and_changes_nothing(explorer, choice, message):
    before = (explorer.layer, explorer.metric, explorer.shown)
    with pytest.raises(SinkscopeError, match=message):
        explorer.choose(**choice)
    assert (explorer.layer, explorer.metric, explorer.shown) == before


def test_fields_that_were_not_measured_have_no_figure():
    explorer = ss.explore(only(synthetic_report(), "sink_attention"), widgets=True)
    assert set(explorer.figures) == {"map"}
    with pytest.raises(SinkscopeError, match="no metric per head"):
        ss.explore(only(synthetic_report(), "residual_norm"), widgets=True)


def test_without_a_model_it_says_how_to_get_one(explorer):
    with pytest.raises(SinkscopeError, match=r"explore\(report, model=model\)"):
        explorer.measure("Hello")


def test_what_is_sent_to_the_page_is_json(explorer):
    def plain(value):
        if isinstance(value, np.ndarray):
            return value.tolist() if value.ndim > 1 or value.dtype == object else []
        raise TypeError(type(value))

    for figure in explorer.figures.values():
        json.dumps(figure.to_plotly_json(), default=plain, allow_nan=False)


def test_outside_a_notebook_come_plain_figures_that_say_why():
    views = ss.explore(synthetic_report())
    assert isinstance(views, PlainViews)
    assert "sink_attention" in views.figures and "received_peak" in views.figures
    assert "instead of the linked explorer" in repr(views)
    assert "JupyterLab" in repr(views)


def test_plain_figures_can_be_asked_for():
    views = ss.explore(only(synthetic_report(), "residual_norm"), widgets=False)
    assert isinstance(views, PlainViews) and views.figures == {}


def tiny_llama():
    """A tiny Llama, random but the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return ss.load_model(tiny_llama(), name="tiny")


@pytest.fixture
def with_model(model):
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    return ss.explore(model, ss.token_ids(tokens.tolist()), widgets=True)


def test_model_gives_the_pattern_of_the_chosen_head(with_model):
    with_model.choose(layer=2, head=3, prompt=1)
    drawn = np.array(with_model.figures["pattern"].data[0].z, dtype=float)
    tokens = with_model.report.tokens[1:2]
    with torch.no_grad():
        expected = tiny_llama()(tokens, output_attentions=True).attentions[2][0, 3].numpy()
    seen = np.tril_indices(12)
    np.testing.assert_allclose(drawn[seen], expected[seen], atol=1e-5)
    assert np.isnan(drawn[np.triu_indices(12, 1)]).all()


def test_intervention_shows_what_changed(with_model):
    before = with_model.report.sink_attention
    with_model.intervene("Self-only mask at the position", 5)
    assert with_model.shown == "change"
    change = np.array(with_model.figures["map"].data[0].z, dtype=float)
    expected = (with_model.after.sink_attention - before).double().mean(0).numpy()
    np.testing.assert_allclose(change, expected, atol=1e-6)
    assert np.abs(change).max() > 1e-4
    with_model.choose(shown="before")
    assert with_model.report is with_model.before
    with_model.choose(shown="after")
    shown = np.array(with_model.figures["map"].data[0].z, dtype=float)
    np.testing.assert_allclose(shown, with_model.after.sink_attention.double().mean(0), rtol=1e-5)


def test_the_pattern_follows_before_after_and_change(with_model):
    with_model.choose(layer=1, head=2)
    with_model.intervene("Self-only mask at the position", 5)
    drawn = {}
    for shown in ("before", "after", "change"):
        with_model.choose(shown=shown)
        drawn[shown] = np.array(with_model.figures["pattern"].data[0].z, dtype=float)
        assert shown in with_model.figures["pattern"].layout.title.text
    assert drawn["before"][5, 0] > 0.01
    assert drawn["after"][5, :6].tolist() == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6)
    seen = np.tril_indices(12)
    np.testing.assert_allclose(
        drawn["change"][seen], (drawn["after"] - drawn["before"])[seen], atol=1e-6
    )


def test_a_prompt_of_two_rows_keeps_both():
    explorer = ss.explore(synthetic_report(2, positions=30), widgets=True)
    tokens = explorer.figures["tokens"]
    assert list(tokens.data[1].y) == [0] * 12 + [1] * 12 + [2] * 6
    assert tokens.layout.yaxis.ticktext == ("0", "12", "24")
    assert tokens.layout.yaxis.range == (2.5, -0.5) and tokens.layout.yaxis.type is None


def test_an_intervention_that_is_not_there_is_refused(with_model):
    with pytest.raises(SinkscopeError, match="no intervention 'foo'; choose from 'Self-only mask"):
        with_model.intervene("foo")
    with_model.intervene("Zero the value at the position", 5)
    with pytest.raises(SinkscopeError, match="shown is 'foo'; choose from 'before', 'after'"):
        with_model.choose(shown="foo")


def test_a_prompt_is_measured_as_the_shown_report_was():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate("<s> <unk> a b c d e f g h".split())}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    model = ss.load_model(tiny_llama(), name="tiny", tokenizer=tokenizer)
    first = ss.scan(
        model,
        ss.texts(["a b c d e f"], bos="always"),
        metrics=["sink_attention", "entropy"],
        sinks=[2],
        epsilon=0.2,
        progress=False,
    )
    explorer = ss.explore(first, model=model, widgets=True)
    explorer.measure("h g f e d c b a")
    new = explorer.report
    assert new.tokens.tolist() == [[0, 9, 8, 7, 6, 5, 4, 3, 2]]  # with the first report's BOS
    assert (new.settings.epsilon, new.settings.sinks) == (0.2, "2")
    assert new.settings.metrics == first.settings.metrics
    assert new.sink_mask.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(n_layers=30), "tiny .LlamaForCausalLM, 30 layers × 4 heads, 2 KV heads., and the"),
        (dict(n_kv_heads=4), "and the model is tiny .LlamaForCausalLM, 3 layers × 4 heads, 2 KV"),
        (dict(architecture="GPT2LMHeadModel"), "This report is of tiny .GPT2LMHeadModel"),
    ],
)
def test_a_model_that_the_report_is_not_of_is_refused(with_model, changed, said):
    report = with_model.report
    settings = dataclasses.replace(report.settings, **changed)
    with pytest.raises(SinkscopeError, match=f"{said}.*pass the model that was scanned"):
        ss.explore(dataclasses.replace(report, settings=settings), model=with_model.model)


def test_another_revision_is_refused_and_none_is_taken(model, with_model):
    from sinkscope.models.provenance import ModelSource, attach_source, model_source

    source, report = model_source(model), with_model.report
    try:
        attach_source(model, ModelSource("tiny", "hub", "a" * 40))
        ss.explore(report, model=model, widgets=True)  # a report without one
        settings = dataclasses.replace(report.settings, revision="b" * 40)
        with pytest.raises(SinkscopeError, match="revision bbbbbbbbbbbb.*revision aaaaaaaaaaaa"):
            ss.explore(dataclasses.replace(report, settings=settings), model=model)
    finally:
        attach_source(model, source)


@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_the_same_tokens_are_measured_in_the_same_way_and_called_the_same(model, path):
    texts = ss.random_tokens(prompts=2, length=12, seed=7)
    before = ss.scan(model, texts, attention=path, progress=False)
    explorer = ss.explore(before, model=model, widgets=True)
    explorer.intervene("Zero the value at the position", 5)
    for name in ("attention", "source", "bos", "seed", "length", "epsilon", "sinks", "metrics"):
        assert getattr(explorer.after.settings, name) == getattr(before.settings, name), name
    drawn = ss.plot.head_change(before, explorer.after)
    assert "BOS: never · " in drawn.layout.title.subtitle.text
    assert "random tokens" in drawn.layout.title.subtitle.text


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_runs_or_says_why_not(with_model, name):
    with_model.panel.what.value = name
    with_model.panel.position.value = 3
    with_model.panel.apply.click()
    if name == "First position's embedding at the position":
        assert "no learned position embeddings" in with_model.panel.said.value
        assert with_model.after is None
    else:
        assert with_model.after is not None
        assert with_model.after.sink_attention.shape == with_model.before.sink_attention.shape


def test_a_prompt_that_cannot_be_measured_is_said_beside_the_controls(with_model):
    before = with_model.before
    send(with_model, "hello")  # this model has no tokenizer
    assert with_model.panel.said.value.startswith("<b>")
    assert with_model.before is before
    assert not with_model.panel.ask.disabled


def test_the_text_that_comes_with_the_click_is_measured(explorer, monkeypatch):
    measured = []
    monkeypatch.setattr(explorer, "measure", measured.append)
    send(explorer, "first")
    send(explorer, "second")
    assert measured == ["first", "second"]
