"""A scan tells the truth about attention that is not the model's own any more.

Hooks of the user edit scores or patterns, interventions hide keys or shift logits, transformers
hands over masks of its own making. The oracle is plain numpy on what `hook_attn_scores` and
`hook_pattern` show after the edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.errors import UnsupportedError

from .architectures import BY_NAME, COMMON, FULL, GROUPED, SLIDING, Family

EDITABLE = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert"]
METRICS = ("sink_attention", "received", "entropy", "logit_gap", "value_share")


def lower_scores(scores: Tensor, hook: object) -> Tensor:
    """A shift of the sink's logit, also where it is hidden: the least number stays the least."""
    shift = torch.zeros_like(scores)
    shift[..., 0] = 3.0
    return torch.where(scores > -1e30, scores - shift, scores)


def halve_pattern(pattern: Tensor, hook: object) -> Tensor:
    """Weights that no softmax gives."""
    weights = torch.ones_like(pattern)
    weights[..., 0] = 0.5
    return pattern * weights


EDITS = {"hook_attn_scores": lower_scores, "hook_pattern": halve_pattern}


def seen_after(model, tokens: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, patterns [layer prompt head query key] and value norms, whatever hooks are on."""
    kept: dict[str, dict[int, np.ndarray]] = {"scores": {}, "pattern": {}, "value": {}}

    def keep(name: str, layer: int) -> Callable[..., None]:
        return lambda x, hook: kept[name].__setitem__(layer, x.detach().double().numpy())

    points = {"scores": "hook_attn_scores", "pattern": "hook_pattern", "value": "hook_rot_v"}
    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{i}.attn.{p}", keep(n, i)) for i in layers for n, p in points.items()]
    with torch.no_grad(), ss.streaming(model):
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    scores, pattern, value = (np.stack([kept[name][i] for i in layers]) for name in points)
    return scores, pattern, np.linalg.norm(value, axis=-1)


def expected(model, tokens: Tensor, causal: bool) -> dict[str, np.ndarray]:
    """Figures of sink 0, query by query."""
    scores, pattern, size = seen_after(model, tokens)
    layers, prompts, heads, length, _ = pattern.shape
    size = size.repeat(heads // size.shape[-1], axis=-1)
    found = {name: np.zeros((prompts, layers, heads)) for name in ("attention", "entropy", "share")}
    found["gap"] = np.full((prompts, layers, heads), np.nan)
    for layer, prompt, head in np.ndindex(layers, prompts, heads):
        rows, logits = pattern[layer, prompt, head], scores[layer, prompt, head]
        norms = size[layer, prompt, :, head]
        positive = np.where(rows > 0, rows, 1)
        found["entropy"][prompt, layer, head] = -(rows * np.log(positive)).sum(-1).mean()
        found["attention"][prompt, layer, head] = rows[1:, 0].mean()
        weighed = (rows * norms)[1:]
        found["share"][prompt, layer, head] = (weighed[:, 0] / weighed.sum(-1)).mean()
        gaps = []
        for query in range(1, length):
            seen = [key for key in range(length) if logits[query, key] > -1e30]
            others = [key for key in seen if key not in (0, query)]
            if 0 in seen and others:
                gaps.append(logits[query, 0] - logits[query, others].mean())
        found["gap"][prompt, layer, head] = np.mean(gaps)
    return found


def check(report: ss.SinkReport, want: dict[str, np.ndarray]) -> None:
    near = dict(atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(report.sink_attention, want["attention"], **near)
    np.testing.assert_allclose(report.attention_entropy, want["entropy"], **near)
    np.testing.assert_allclose(report.value_weighted_sink_share, want["share"], **near)
    if report.sink_logit_gap is not None:
        np.testing.assert_allclose(report.sink_logit_gap, want["gap"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("point", EDITS)
@pytest.mark.parametrize("name", EDITABLE)
def test_hooks_of_the_user_are_measured(name: str, point: str) -> None:
    """One layer stays as it is: there the log-sum-exp is read, in the others the pattern."""
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens()
    hooks = [(f"blocks.{layer}.attn.{point}", EDITS[point]) for layer in (0, 2)]
    with ss.streaming(model), model.hooks(fwd_hooks=hooks):
        untouched = ss.scan(family.build(), tokens, metrics=["sink_attention"], progress=False)
        report = ss.scan(model, tokens, metrics=METRICS, progress=False)
        want = expected(model, tokens, family.causal)
    assert report.settings.attention == "streaming"
    assert (report.sink_attention - untouched.sink_attention).abs().max() > 0.01, "it is an edit"
    check(report, want)


def interventions(model) -> dict[str, object]:
    return {
        "self-only": ss.SelfOnlyMask(model, position=15),
        "early": ss.SelfOnlyMask(model, position=[1, 2]),
        "shift": ss.ShiftSinkLogit(model, -3.0),
        "both": ss.SelfOnlyMask(model, position=9, layers=[0, 2]),
    }


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("which", ["self-only", "early", "shift", "both"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_interventions_are_measured(name: str, which: str, path: str) -> None:
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens()
    shift = ss.ShiftSinkLogit(model, -1.0) if which == "both" else nullcontext()
    with interventions(model)[which], shift:
        report = ss.scan(model, tokens, metrics=METRICS, attention=path, progress=False)
        want = expected(model, tokens, family.causal)
    check(report, want)


def test_a_shift_of_the_logit_shifts_the_gap() -> None:
    family = BY_NAME["llama"]
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens()
    for path in ("eager", "streaming"):
        ask = dict(metrics=["logit_gap"], attention=path, progress=False)
        before = ss.scan(model, tokens, **ask).sink_logit_gap
        with ss.ShiftSinkLogit(model, -3.0):
            after = ss.scan(model, tokens, **ask).sink_logit_gap
        # The first layer's queries and keys know nothing of it yet.
        torch.testing.assert_close(after[:, 0], before[:, 0] - 3, atol=1e-4, rtol=0)


def test_a_window_that_transformers_only_shows_as_a_dense_mask() -> None:
    """Gemma 3 as an encoder: its mask is none that streaming knows by name."""
    kinds = [SLIDING, SLIDING, FULL]
    settings = GROUPED | dict(head_dim=8, sliding_window=9, layer_types=kinds)
    settings["use_bidirectional_attention"] = True
    family = Family("encoder", "Gemma3ForCausalLM", settings)
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens()
    report = ss.scan(model, tokens, progress=False)
    assert (report.settings.attention, report.settings.causal) == ("streaming", False)
    _, pattern, _ = seen_after(model, tokens)
    paid, seeing = pattern.sum(axis=3), (pattern > 0).any(axis=2).sum(axis=2)  # over queries
    received = (paid / seeing[:, :, None]).transpose(1, 0, 2, 3)
    np.testing.assert_allclose(report.sink_importance, received[..., 0], atol=1e-5)
    np.testing.assert_allclose(report.received_attention, received.mean(0), atol=1e-5)
    stock = ss.scan(model, tokens, attention="eager", progress=False)
    for field in ("uniform_ratio", "sink_logit_gap", "sink_cosine", "other_cosine", "sink_rate"):
        torch.testing.assert_close(report[field], stock[field], atol=2e-5, rtol=1e-5)


def test_a_prompt_without_a_sink_is_left_out_of_the_cosine() -> None:
    family = BY_NAME["llama"]
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens(prompts=6)

    def scanned(*rows: int) -> ss.SinkReport:
        ask = dict(metrics=["received", "cosine"], sinks="auto", epsilon=0.1, progress=False)
        return ss.scan(model, tokens[list(rows)], **ask)

    whole = scanned(*range(6))
    with_sink = whole.sink_mask.any(dim=1).nonzero()[:, 0].tolist()
    assert 0 < len(with_sink) < 6, "some have a sink, some have none"
    alone = torch.stack([scanned(row).cosine_to_sink for row in with_sink])
    torch.testing.assert_close(whole.cosine_to_sink, alone.mean(dim=0))
    assert whole.prompts_with_sink_at.tolist() == [len(with_sink)] * tokens.shape[1]
    merged = scanned(0, 1).merge(scanned(2, 3, 4, 5))
    torch.testing.assert_close(merged.cosine_to_sink, whole.cosine_to_sink)


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_around_a_scan_changes_nothing(name: str, path: str) -> None:
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build(), device="cpu"), family.tokens()
    plain = ss.scan(model, tokens, attention=path, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ss.scan(model, tokens, attention=path, progress=False)
        with ss.streaming(model), torch.no_grad():
            logits = model(tokens)
    assert inside.sink_attention.dtype == torch.float32
    torch.testing.assert_close(inside.sink_attention, plain.sink_attention)
    with torch.no_grad():
        assert (logits.float() - model(tokens)).abs().max() < 0.2, "bf16 of the same model"


def test_where_the_stock_bridge_shows_no_values_attention_is_still_measured() -> None:
    """OLMo clips queries, keys and values after the hooks that show them."""
    family = Family("olmo", "OlmoForCausalLM", GROUPED | dict(clip_qkv=0.5))
    original, tokens = family.build(), family.tokens()
    with torch.no_grad():
        attentions = original(tokens, output_attentions=True).attentions
    want = torch.stack([a[:, :, 1:, 0].mean(-1) for a in attentions], dim=1)
    model = ss.load_model(original, device="cpu")
    for path in ("eager", "auto"):
        report = ss.scan(model, tokens, attention=path, progress=False)
        torch.testing.assert_close(report.sink_attention, want, atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError, match="value"):
        ss.scan(model, tokens, attention="eager", metrics=["value_share"])


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_rows_that_no_position_uses_are_no_positions(pad: int) -> None:
    """RoBERTa numbers positions from its padding id on."""
    family = Family("roberta", "RobertaForMaskedLM", COMMON | dict(pad_token_id=pad), causal=False)
    original = family.build()
    table = original.roberta.embeddings.position_embeddings.weight.detach()
    model = ss.load_model(original, device="cpu")
    report = ss.scan(model, family.tokens(), metrics="core", progress=False)
    torch.testing.assert_close(report.position_embedding_norm, table[pad + 1 :].norm(dim=-1))


def test_layers_of_different_geometry_are_measured_but_for_what_has_no_table() -> None:
    """Gemma 4 may have fewer KV heads in its global layers."""
    settings = dict(head_dim=8, global_head_dim=16, num_global_key_value_heads=1)
    settings |= dict(attention_k_eq_v=True, sliding_window=8, layer_types=[SLIDING, FULL, SLIDING])
    family = Family("gemma4", "Gemma4ForCausalLM", GROUPED | settings)
    original, tokens = family.build(), family.tokens()
    with torch.no_grad():
        attentions = original(tokens, output_attentions=True).attentions
    want = torch.stack([a[:, :, 1:, 0].mean(-1) for a in attentions], dim=1)
    model = ss.load_model(original, device="cpu")
    report = ss.scan(model, tokens, progress=False)
    torch.testing.assert_close(report.sink_attention, want, atol=1e-5, rtol=0)
    assert report.value_norm is None
    with pytest.raises(UnsupportedError, match="different numbers of KV heads"):
        ss.scan(model, tokens, metrics=["values"])


def columns_side_by_side(x: Tensor, hook: object) -> Tensor:
    """The same numbers in another layout, as a product of matrices may leave them."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert"])
@pytest.mark.parametrize("point", ["hook_rot_q", "hook_rot_k", "hook_rot_v"])
def test_the_layout_that_a_hook_leaves_changes_nothing(name: str, point: str) -> None:
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build()), family.tokens()
    want = ss.scan(model, tokens, attention="streaming", progress=False)
    with (
        ss.streaming(model),
        model.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", columns_side_by_side)]),
    ):
        got = ss.scan(model, tokens, attention="streaming", progress=False)
    for field in want.measured():
        torch.testing.assert_close(got[field], want[field], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["bert", "opt"])
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_an_edit_that_the_stock_bridge_ignores_is_refused(name: str, point: str) -> None:
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build()), family.tokens()
    name = f"blocks.1.attn.{point}"
    want = ss.scan(model, tokens, attention="eager", progress=False)
    with model.hooks(fwd_hooks=[(name, halve_pattern)]):
        with pytest.raises(UnsupportedError, match="ignores edits of hook_attn_scores"):
            ss.scan(model, tokens, attention="eager", progress=False)
        ss.scan(model, tokens, attention="streaming", progress=False)
    with model.hooks(fwd_hooks=[(name, lambda x, hook: None)]):  # who only looks may
        looked = ss.scan(model, tokens, attention="eager", progress=False)
    assert looked.settings.hooks == (name,)
    assert dataclasses.replace(looked, settings=want.settings).equals(want)


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_scores_edited_after_another_operator_was_entered_are_the_ones_it_takes(
    name: str, path: str
) -> None:
    """σ(s − ln n) by hand, of the scores as the last edit left them."""
    family = BY_NAME[name]
    model, tokens = ss.load_model(family.build()), family.tokens()
    layers = range(model.cfg.n_layers)
    edits = [(f"blocks.{i}.attn.hook_attn_scores", lower_scores) for i in layers]
    with ss.ReplaceSoftmax(model, "sigmoid"), model.hooks(fwd_hooks=edits):
        scores, pattern, _ = seen_after(model, tokens)
        report = ss.scan(model, tokens, attention=path, metrics=list(METRICS[:2]), progress=False)
    seen = scores > -1e30
    logits = np.where(seen, scores, 0) - np.log(seen.sum(-1, keepdims=True))
    by_hand = seen / (1 + np.exp(-logits))
    np.testing.assert_allclose(pattern, by_hand, atol=1e-5)
    want = by_hand[:, :, :, 1:, 0].mean(-1).swapaxes(0, 1)
    np.testing.assert_allclose(report.sink_attention.numpy(), want, atol=1e-5)
