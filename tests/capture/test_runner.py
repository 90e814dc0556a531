"""The runner leaves a model as it found it, and keeps all of a batch or nothing of it."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

import sinkscope as ss
from sinkscope.capture import observers, runner
from sinkscope.capture.observers import massive
from sinkscope.capture.scan import _positions, checked
from sinkscope.errors import ModelError, SinkscopeError, TextError, UnsupportedError
from tests.families.architectures import BY_NAME


@pytest.fixture
def model():
    return ss.load_model(BY_NAME["llama"].build())


@pytest.fixture
def tokens():
    return ss.token_ids(BY_NAME["llama"].tokens(prompts=6, length=16))


def state(model) -> dict:
    """Everything about a bridge that a scan could leave changed."""
    return {
        "weights": {name: p.clone() for name, p in model.original_model.state_dict().items()},
        "hooks": {
            name: (len(point.fwd_hooks), len(point._forward_hooks))
            for name, point in model.hook_dict.items()
        },
        "training": [module.training for module in model.original_model.modules()],
        "attention": model.original_model.config._attn_implementation,
        # TransformerLens notes on its modules that they ran; all else must be as it was.
        "attributes": {
            name: set(vars(module)) - {"_fired_hook_out", "_stop_at_layer_idx"}
            for name, module in model.original_model.named_modules()
        },
    }


def assert_same(before: dict, after: dict) -> None:
    for name, weight in before.pop("weights").items():
        assert torch.equal(weight, after["weights"][name]), name
    after.pop("weights")
    assert before == after


@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_the_model_comes_out_as_it_went_in(model, tokens, path) -> None:
    seen = []
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.shape))
    model.original_model.model.layers[1].train()  # flags need not be uniform
    before = state(model)
    logits = model(tokens.tokens)
    ss.scan(model, tokens, attention=path, progress=False)
    assert_same(before, state(model))
    assert torch.equal(model(tokens.tokens), logits)
    assert len(seen) >= 3, "the caller's own hook must survive and fire"


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_nothing_behind(model, tokens, path, error, monkeypatch) -> None:
    before = state(model)
    real, calls = runner.forward, []

    def failing(model, batch):
        calls.append(batch)
        real(model, batch)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(runner, "forward", failing)
    with pytest.raises(error):
        ss.scan(model, tokens, attention=path, batch=2, progress=False)
    assert len(calls) == 2
    assert_same(before, state(model))


def test_out_of_memory_halves_the_batch_and_changes_no_figure(model, tokens, monkeypatch) -> None:
    whole = ss.scan(model, tokens, progress=False)
    real, sizes = runner.forward, []

    def short_of_memory(model, batch):
        real(model, batch)  # the hooks have fired: what they kept must be dropped
        sizes.append(len(batch.rows))
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(runner, "forward", short_of_memory)
    backed_off = ss.scan(model, tokens, batch=6, progress=False)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    for name in whole.measured():
        torch.testing.assert_close(
            backed_off[name], whole[name], atol=1e-5, rtol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_a_batch_that_was_too_large_leaves_nothing_in_memory(model, tokens, path) -> None:
    """A layer's scores wait for its pattern: there memory runs out, before the pattern is read."""
    too_large, left = [], []

    def scores(x, hook):
        if len(x) > 3:
            too_large.append(weakref.ref(x))

    def pattern(x, hook):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    def first(x, hook):
        gc.collect()
        left.extend(kept for kept in too_large if kept() is not None)

    points = {"blocks.1.attn.hook_attn_scores": scores, "blocks.1.attn.hook_pattern": pattern}
    with model.hooks(fwd_hooks=[*points.items(), ("blocks.0.hook_resid_pre", first)]):
        ss.scan(model, tokens, batch=6, attention=path, progress=False)
    assert too_large and not left


def test_a_cpu_that_runs_out_of_memory_backs_off_too(model, tokens, monkeypatch) -> None:
    real, sizes = runner.forward, []

    def short_of_memory(model, batch):
        sizes.append(len(batch.rows))
        if len(batch.rows) > 3:
            torch.empty(2**50)  # torch's own words for it
        real(model, batch)

    monkeypatch.setattr(runner, "forward", short_of_memory)
    ss.scan(model, tokens, batch=6, progress=False)
    assert sizes == [6, 3, 3]


@pytest.mark.parametrize(("least", "times"), [(96, 3), (97, 0)])
def test_large_batches_hand_memory_back_after_every_layer(
    model, tokens, least: int, times: int, monkeypatch
) -> None:
    """Holes between what is kept made `core` at 8,192 tokens grow eight times as much."""
    calls = []
    monkeypatch.setattr(runner, "trim", lambda: calls.append(1))
    monkeypatch.setattr(runner, "_LARGE", least)
    ss.scan(model, tokens, metrics="core", progress=False)
    assert tokens.tokens.numel() == 96 and len(calls) == times


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("path", ["eager", "streaming"])
def test_float64_is_measured_by_every_metric(family: str, path: str) -> None:
    """Prompts of two lengths; every field agrees with float32, which other tests hold to eager."""
    single, double = BY_NAME[family].build(), BY_NAME[family].build().double()
    ids = BY_NAME[family].tokens(prompts=2, length=9).tolist()
    ids[1] = ids[1][:6]
    ask = dict(attention=path, progress=False)
    one, two = ss.scan(single, ids, **ask), ss.scan(double, ids, **ask)
    assert two.settings.dtype == "float64"
    assert set(one.settings.metrics) == set(two.settings.metrics)
    for name in one.variables():
        found, wanted = getattr(two, name), getattr(one, name)
        if isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
            torch.testing.assert_close(
                found.double(), wanted.double(), atol=2e-4, rtol=2e-4, equal_nan=True
            )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3", "gpt2"])
def test_eager_logit_gaps_in_float64(family: str) -> None:
    """From transformers' own pattern: ln A_ij is s_ij but for a number that all keys share."""
    original, tokens = BY_NAME[family].build().double(), BY_NAME[family].tokens()
    with torch.no_grad():
        patterns = original(tokens, output_attentions=True).attentions
    wanted = torch.zeros(len(tokens), len(patterns), patterns[0].shape[1], dtype=torch.float64)
    for layer, pattern in enumerate(patterns):
        for prompt, head in itertools.product(*map(range, pattern.shape[:2])):
            gaps = []
            for query in range(1, tokens.shape[1]):
                row = pattern[prompt, head, query].log()
                others = [row[k] for k in range(1, len(row)) if k != query and row[k].isfinite()]
                if others and row[0].isfinite():
                    gaps.append(row[0] - sum(others) / len(others))
            wanted[prompt, layer, head] = sum(gaps) / len(gaps)
    asked = dict(attention="eager", metrics=["logit_gap"], progress=False)
    found = ss.scan(original, tokens, **asked).sink_logit_gap
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_running_out_of_memory_while_folding_is_an_error(model, tokens, monkeypatch) -> None:
    """Some observers have folded the batch by then: another try would fold it twice."""

    def full(self, finished, batch):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(massive.Massive, "add", full)
    with pytest.raises(ModelError, match="no longer fit in the memory of cpu"):
        ss.scan(model, tokens, batch=2, progress=False)


def test_positions_may_come_from_any_iterable(model, tokens) -> None:
    wanted = ss.scan(model, tokens, sinks=[0, 2], metrics="core", progress=False)
    for sinks in ((i for i in (0, 2)), range(0, 4, 2)):
        found = ss.scan(model, tokens, sinks=sinks, metrics="core", progress=False)
        assert found.settings.sinks == "0,2"
        assert torch.equal(found.sink_attention, wanted.sink_attention)


def test_positions_are_a_set(model, tokens) -> None:
    """Told in whatever order and however often, they are the same sinks."""
    asked = [[0, 3], [3, 0], [3, 0, 3]]
    reports = [ss.scan(model, tokens, sinks=p, metrics="core", progress=False) for p in asked]
    assert {report.settings.sinks for report in reports} == {"0,3"}
    merged = reports[0].merge(reports[1]).merge(reports[2])
    assert len(merged.sink_attention) == 3 * len(tokens)
    once = ss.scan(model, tokens, sinks=[0, 0], metrics="core", progress=False)
    assert "Sinks             position 0;" in repr(once)


def test_hooks_that_edit_in_place_change_nothing_seen_before(model, tokens, monkeypatch) -> None:
    """Massive activations are looked at late on a GPU; here, too, since the hook is ours."""

    def massive_at_0(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        x[:, 0, 3] = 1e4
        return x

    def wipe(x: torch.Tensor, hook: object) -> torch.Tensor:
        x[:, 0] = 0
        return x

    monkeypatch.setattr(massive, "_late", lambda x: 100)
    hooks = [("blocks.0.hook_resid_post", massive_at_0), ("blocks.1.hook_resid_pre", wipe)]
    with model.hooks(fwd_hooks=hooks):
        found = ss.scan(model, tokens, metrics=["massive"], progress=False).massive
    assert found.count[:, 0].tolist() == [1] * 6


@pytest.mark.parametrize("late", [0, 1, 3, 100])
def test_massive_activations_looked_at_late(model, tokens, late, monkeypatch) -> None:
    """As on a GPU, where answers are awaited across layers and batches; one batch is dropped."""

    def massive_at_0(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        x[:, 0, 3] = 1e4
        return x

    real, calls = runner.forward, []

    def short_of_memory_once(model, batch):
        real(model, batch)
        calls.append(len(batch.rows))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(runner, "forward", short_of_memory_once)
    monkeypatch.setattr(massive, "_late", lambda x: late)
    monkeypatch.setattr(runner, "has_hooks", lambda point: False)  # as if the model itself did it
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", massive_at_0)]):
        found = ss.scan(model, tokens, metrics=["massive"], batch=2, progress=False).massive
    assert calls == [2, 2, 1, 1, 1, 1]
    layers = model.cfg.n_layers
    assert found.count.tolist() == [[1] * layers] * 6
    assert found.prompt.tolist() == [prompt for prompt in range(6) for _ in range(layers)]
    assert found.layer.tolist() == list(range(layers)) * 6
    assert set(found.position.tolist()) == {0} and set(found.dim.tolist()) == {3}
    torch.testing.assert_close(found.value[::layers], torch.full((6,), 1e4))


def test_one_prompt_that_does_not_fit_is_an_error(model, tokens, monkeypatch) -> None:
    def never_fits(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(runner, "forward", never_fits)
    with pytest.raises(ModelError, match="16 positions does not fit"):
        ss.scan(model, tokens, progress=False)


def test_other_runtime_errors_are_not_taken_for_memory(model, tokens, monkeypatch) -> None:
    def broken(model, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(runner, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        ss.scan(model, tokens, progress=False)


def test_nan_in_the_residual_stream_is_an_error(model, tokens) -> None:
    hook = ("blocks.1.hook_resid_post", lambda x, hook: x * torch.nan)
    with (
        model.hooks(fwd_hooks=[hook]),
        pytest.raises(ModelError, match="layer 1 contains nan"),
    ):
        ss.scan(model, tokens, progress=False)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(metrics="entropie"), UnsupportedError, "There is no metric 'entropie'"),
        (dict(metrics=["learned_sink"]), UnsupportedError, "has no learned sink"),
        (dict(attention="fast"), UnsupportedError, "attention is 'fast'"),
        (dict(sinks=[16]), TextError, "run from 0 to 15"),
        (dict(sinks=[]), TextError, "expected positions"),
        (dict(sinks=[True]), TextError, "expected positions"),
        (dict(batch=0), SinkscopeError, "batch is 0"),
        (dict(epsilon=1.5), SinkscopeError, "epsilon is 1.5"),
    ],
)
def test_bad_arguments_end_in_one_sentence(model, tokens, arguments, kind, message) -> None:
    with pytest.raises(kind, match=message) as caught:
        ss.scan(model, tokens, progress=False, **arguments)
    assert "\n" not in str(caught.value)


def test_every_metric_measures_its_fields_and_a_field_leads_to_its_metric(model, tokens) -> None:
    can = ss.capabilities(model)
    assert set(can.available) == set(observers.metrics()) - {"learned_sink", "gates", "latent"}
    for metric in can.available:
        report = ss.scan(model, tokens, metrics=[metric], progress=False)
        assert report.settings.metrics == (metric,)
        for field in can.fields[metric]:
            assert getattr(report, field) is not None, field
            if field not in can.available:
                named = f"field of the metric '{metric}'; request"
                with pytest.raises(UnsupportedError, match=named):
                    ss.scan(model, tokens, metrics=[field], progress=False)
    with pytest.raises(UnsupportedError, match="nonmixture_dims is a field of the metric 'ffn'"):
        ss.scan(model, tokens, metrics="nonmixture_dims", progress=False)


def test_core_measures_what_it_says_and_no_more(model, tokens) -> None:
    report = ss.scan(model, tokens, metrics="core", progress=False)
    assert report.sink_attention is not None and report.massive is not None
    assert report.received_attention is None and report.attention_entropy is None


def test_groups_of_metrics_stand_beside_names(model, tokens) -> None:
    more = ss.scan(model, tokens, metrics=["received", "core"], progress=False)
    core = ss.scan(model, tokens, metrics="core", progress=False)
    everything = ss.scan(model, tokens, metrics=["all", "entropy"], progress=False)
    assert set(more.settings.metrics) == {*core.settings.metrics, "received"}
    assert more.received_attention is not None and more.massive is not None
    assert everything.settings.metrics == ss.scan(model, tokens, progress=False).settings.metrics


def test_several_sinks_and_found_sinks() -> None:
    """Two sinks: attention adds up; found sinks are those that `find_sinks` names."""
    family = BY_NAME["llama"]
    tokens = ss.token_ids(family.tokens(prompts=2, length=24))
    model = ss.load_model(family.build())
    one, other, both = (
        ss.scan(model, tokens, sinks=sinks, metrics=["sink_attention", "residual"], progress=False)
        for sinks in ([2], [5], [2, 5])
    )
    # Queries after position 5 see both; queries 3 and 4 see only the first sink.
    _, cache = model.run_with_cache(tokens.tokens, names_filter="blocks.0.attn.hook_pattern")
    pattern = cache["blocks.0.attn.hook_pattern"]
    queries = [3, 4, *range(6, 24)]
    want = (pattern[:, :, queries, 2] + pattern[:, :, queries, 5]).mean(-1)
    torch.testing.assert_close(both.sink_attention[:, 0], want, atol=1e-5, rtol=0)
    assert torch.equal(both.sink_mask, one.sink_mask | other.sink_mask)


def test_found_sinks_are_measured_as_if_they_had_been_named(tmp_path) -> None:
    """Every value is that of a scan of the prompt alone whose sink is its primary one."""
    family = BY_NAME["llama"]
    model, tokens = ss.load_model(family.build()), family.tokens(prompts=3, length=40, seed=2)
    ask = dict(metrics=["sink_attention", "values", "residual", "received"], progress=False)
    found = ss.scan(model, tokens, sinks="auto", epsilon=0.04, **ask)
    assert found.secondary_sinks is not None and found.secondary_sinks.any()
    assert not (found.secondary_sinks & found.sink_mask[:, None]).any()
    assert found.sink_mask.sum(dim=1).tolist() == [1, 1, 0], "one prompt has no sink"
    for row, position in found.sink_mask.nonzero().tolist():
        alone = ss.scan(model, tokens[[row]], sinks=[position], epsilon=0.04, **ask)
        for name in ("sink_attention", "value_drain", "residual_peak", "sink_importance"):
            torch.testing.assert_close(found[name][row], alone[name][0])
    assert ss.scan(model, tokens, **ask).secondary_sinks is None
    # Layer by layer against the importance of one prompt, compared number by number.
    one = ss.scan(model, tokens[:1], sinks="auto", epsilon=0.04, **ask)
    received, keys = one.received_attention, tokens.shape[1]
    even = [sum(1 / (i + 1) for i in range(k, keys)) / (keys - k) for k in range(keys)]
    assert one.secondary_sinks[0].any(dim=0).sum() == 2
    for layer, position in one.secondary_sinks[0].nonzero().tolist():
        strong = [bool(a > max(0.04, 2 * even[position])) for a in received[layer, :, position]]
        assert sum(strong) >= 0.1 * len(strong)
    parts = [
        ss.scan(model, tokens[rows], sinks="auto", epsilon=0.04, **ask)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert torch.equal(parts[0].merge(parts[1]).secondary_sinks, found.secondary_sinks)
    one.save(tmp_path / "r.nc")
    assert ss.load_report(tmp_path / "r.nc").equals(one)
    text = repr(one)
    assert "Secondary sinks" in text and "separate from the primary sinks" in text


@pytest.mark.parametrize("sinks", [[], None, "first", [0.0], [True], [-1], 1.0])
def test_sinks_that_are_no_positions(sinks: object) -> None:
    """Called directly: in these tests annotations are checked before scan() itself is."""
    with pytest.raises(TextError, match="expected positions"):
        _positions(sinks)


@pytest.mark.parametrize(
    ("metrics", "epsilon", "batch"),
    [(None, 0.3, 1), ("all", "a", 1), ("all", 0.3, "foo"), ("all", 0.3, 2.5), ("all", 0.3, True)],
)
def test_arguments_of_the_wrong_kind(metrics: object, epsilon: object, batch: object) -> None:
    with pytest.raises(SinkscopeError, match="expected"):
        checked(metrics, (0,), epsilon, "auto", batch)
