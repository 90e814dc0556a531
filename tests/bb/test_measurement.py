"""The three phenomena against plain loops over prompts, queries and keys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sinkscope.bb import (
    BackcopyTransformer,
    BigramBackcopy,
    BigramSource,
    ModelConfig,
    knockouts,
    to_bridge,
)
from sinkscope.bb import measure as measured
from sinkscope.bb.model import recorder
from sinkscope.capture.scan import scan
from sinkscope.errors import UnsupportedError
from sinkscope.models.anatomy import read_anatomy
from sinkscope.models.capabilities import capabilities
from sinkscope.models.probe import CANDIDATES, probe
from sinkscope.models.signals import find_signals
from sinkscope.prompts.tokens import token_ids


@pytest.fixture(scope="module")
def task() -> BigramBackcopy:
    return BigramBackcopy(BigramSource.synthetic(6, seed=2, concentration=0.5), triggers=(1, 4))


@pytest.fixture(scope="module")
def tokens(task) -> torch.Tensor:
    return task.sample(5, 12, seed=4)


def build(**changes) -> BackcopyTransformer:
    config = {"layers": 2, "heads": 2, "width": 8, "context": 12, "vocab": 8, **changes}
    return BackcopyTransformer(ModelConfig(**config), seed=3).eval()


def queries(tokens: torch.Tensor, triggers: bool) -> list[tuple[int, int]]:
    """(prompt, position) of trigger or non-trigger queries; the sink is none."""
    return [
        (b, t)
        for b, row in enumerate(tokens.tolist())
        for t, token in enumerate(row)
        if t > 0 and (token in (1, 4)) == triggers
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("attention", ["softmax", "relu", "off-by-one"])
def test_attention_and_gap_by_loops(attention, task, tokens):
    model = build(attention=attention)
    found = measured(model, task, tokens)
    recorded, record = recorder("hook_attn_scores", "hook_pattern")
    with torch.no_grad():
        model(tokens, tap=record)
    for layer in range(2):
        pattern = recorded[f"blocks.{layer}.attn.hook_pattern"].double()
        scores = recorded[f"blocks.{layer}.attn.hook_attn_scores"].double()
        for head in range(2):
            idle, work = queries(tokens, False), queries(tokens, True)
            rows = [pattern[b, head, t].tolist() for b, t in idle]
            expected = {
                "sink_attention": mean([row[0] for row in rows]),
                "sink_share": mean([row[0] / sum(row) if sum(row) else 0.0 for row in rows]),
                "spare_attention": mean([1 - sum(row) for row in rows]),
                "trigger_attention": mean([pattern[b, head, t, 0].item() for b, t in work]),
            }
            gaps: dict[int, list[float]] = {}
            for b, t in idle:
                if t >= 2:
                    others = mean([scores[b, head, t, j].item() for j in range(1, t)])
                    gap = scores[b, head, t, 0].item() - others
                    gaps.setdefault(int(tokens[b, t]), []).append(gap)
            expected["logit_gap"] = mean([mean(gap) for gap in gaps.values()])
            for name, value in expected.items():
                assert getattr(found, name)[layer, head].item() == pytest.approx(value, abs=1e-5), (
                    name
                )
            band = sorted(mean(gap) for gap in gaps.values())
            assert band[0] <= found.logit_gap_low[layer, head] <= found.logit_gap[layer, head]
            assert found.logit_gap[layer, head] <= found.logit_gap_high[layer, head] <= band[-1]


def test_values_and_residuals_by_loops(task, tokens):
    model = build()
    found = measured(model, task, tokens)
    recorded, record = recorder("hook_v", "hook_resid_post")
    with torch.no_grad():
        model(tokens, tap=record)
    for layer in range(2):
        output = model.layers[layer].attn.o.weight.detach()  # [dim, head d_head]
        value = recorded[f"blocks.{layer}.attn.hook_v"]
        for head in range(2):
            written = [
                [
                    (output[:, 4 * head : 4 * head + 4] @ value[b, t, head]).norm().item()
                    for t in range(12)
                ]
                for b in range(5)
            ]
            sink = mean([row[0] for row in written])
            others = mean([norm for row in written for norm in row[1:]])
            assert found.value_norm[layer, head].item() == pytest.approx(sink, rel=1e-5)
            assert found.value_drain[layer, head].item() == pytest.approx(sink / others, rel=1e-5)
        state = recorded[f"blocks.{layer}.hook_resid_post"]
        norms = [[math.sqrt(sum(v * v for v in x)) for x in row] for row in state.tolist()]
        sink = mean([row[0] for row in norms])
        others = sorted(norm for row in norms for norm in row[1:])
        assert found.residual_norm[layer].item() == pytest.approx(sink, rel=1e-5)
        assert found.residual_excess[layer].item() == pytest.approx(sink - mean(others), abs=1e-4)
        assert found.residual_peak[layer].item() == pytest.approx(sink / others[27 - 0], rel=1e-5)


def test_risks_by_loops(task, tokens):
    model = build()
    found = measured(model, task, tokens)
    with torch.no_grad():
        log_p = model(tokens).double().log_softmax(-1)
    copied = [
        -log_p[b, t, tokens[b, t - 1]].item() if tokens[b, t - 1] < 6 else 0.0
        for b, t in queries(tokens, True)
    ]
    bigram, entropy = [], []
    for b, t in queries(tokens, False):
        row = task.source.transition[tokens[b, t]].tolist()
        bigram.append(-sum(p * log_p[b, t, c].item() for c, p in enumerate(row)))
        entropy.append(-sum(p * math.log(p) for p in row))
    assert found.backcopy_risk == pytest.approx(mean(copied), rel=1e-6)
    assert found.bigram_risk == pytest.approx(mean(bigram), rel=1e-6)
    assert found.bigram_excess == pytest.approx(mean(bigram) - mean(entropy), rel=1e-5)


def test_a_perfect_model_has_no_excess_risk(task, tokens):
    class Oracle(BackcopyTransformer):
        def forward(self, ids, tap):
            super().forward(ids, tap=tap)
            logits = torch.full((*ids.shape, 8), -1e4)
            logits[..., :6] = (task.oracle(ids) + 1e-300).log().float()
            return logits

    model = build()
    model.__class__ = Oracle
    found = measured(model, task, tokens)
    assert found.backcopy_excess == pytest.approx(0, abs=1e-6)
    assert found.bigram_excess == pytest.approx(0, abs=1e-6)


def test_layers_without_attention_are_nan(task, tokens):
    found = measured(build(no_attention=(0,)), task, tokens)
    assert found.sink_attention[0].isnan().all() and found.sink_attention[1].isfinite().all()
    assert found.residual_norm.isfinite().all()


def test_knockouts_do_what_they_say(task, tokens):
    model = build()
    table = knockouts(model, task, tokens).set_index(["intervention", "layer", "head"])
    with torch.no_grad():
        halved = build()
        halved.layers[1].attn.o.weight[:, :4] = 0  # head 0 of layer 1 writes nothing
    plain = measured(halved, task, tokens)
    assert table.loc[("zero attention", 1, 0), "backcopy_risk"] == pytest.approx(
        plain.backcopy_risk, rel=1e-6
    )
    silent = build()
    with torch.no_grad():
        silent.layers[0].mlp.fc_out.weight.zero_()
    plain = measured(silent, task, tokens)
    assert table.loc[("zero feed-forward", 0, -1), "bigram_risk"] == pytest.approx(
        plain.bigram_risk, rel=1e-6
    )
    assert table.loc[("none", -1, -1), "bigram_risk"] == pytest.approx(
        measured(model, task, tokens).bigram_risk
    )
    assert len(table) == 1 + 2 * 2 * 3 + 2


def test_clean_pattern_by_hand():
    from sinkscope.bb.knockout import clean

    forced = clean(torch.full((1, 3, 3), 0.3), torch.tensor([[False, False, True]]))
    assert forced[0].tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


# What a scan says of bridges whose attention is not a plain softmax, against loops over the
# model's own queries, keys and values.

OPERATORS = {
    "softmax": lambda s: [math.exp(x) / sum(map(math.exp, s)) for x in s],
    "relu": lambda s: [max(x, 0.0) / len(s) for x in s],
    "sigmoid": lambda s: [1 / (1 + len(s) * math.exp(-x)) for x in s],
    "off-by-one": lambda s: [math.exp(x) / (1 + sum(map(math.exp, s))) for x in s],
    "softpick": lambda s: [
        max(math.exp(x) - 1, 0) / (sum(abs(math.exp(y) - 1) for y in s) + 1e-8) for x in s
    ],
    "none": lambda s: [0.0] * len(s),
}


def dot(x, y) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def size(x) -> float:
    return math.sqrt(dot(x, x))


def looped(model, tokens, operator: str) -> dict[str, list[float]]:
    """Figures of a scan with its sink at 0, one a prompt, layer and head, in plain Python."""
    recorded, record = recorder("hook_q", "hook_k", "hook_v", "hook_gate")
    with torch.no_grad():
        model(tokens, tap=record)
    found: dict[str, list[float]] = {}
    for b in range(len(tokens)):
        for layer in range(2):
            for head in range(2):
                q, k, v, gate = (
                    recorded[name][b, :, head].double().tolist() if name in recorded else None
                    for name in (f"blocks.{layer}.attn.hook_{x}" for x in ("q", "k", "v", "gate"))
                )
                nothing = [[0.0] * 4] * tokens.shape[1]
                rule = OPERATORS[operator if q else "none"]
                figures = of_a_head(q or nothing, k or nothing, v or nothing, gate, rule)
                for name, figure in figures.items():
                    found.setdefault(name, []).append(figure)
    return found


def of_a_head(q, k, v, gate, rule) -> dict[str, float]:
    scores = [[dot(q[i], k[j]) / 2 for j in range(i + 1)] for i in range(len(q))]
    rows = [rule(row) for row in scores]
    z = [[sum(a * v[j][d] for j, a in enumerate(row)) for d in range(4)] for row in rows]
    if gate is not None:
        z = [[x * g for x, g in zip(*both, strict=True)] for both in zip(z, gate, strict=True)]
    gates = {}
    if gate is not None:
        means = [mean(factors) for factors in gate]
        gates = {
            "gate_mean": mean(means),
            "gate_closed": mean([x < 0.1 for factors in gate for x in factors]),
            "gated_sink_attention": mean([rows[i][0] * means[i] for i in range(1, len(q))]),
        }
    weighted = [[a * size(v[j]) for j, a in enumerate(row)] for row in rows[1:]]
    later = range(1, len(q))
    return gates | {
        "sink_attention": mean([rows[i][0] for i in later]),
        "first_token_attention": mean([row[0] for row in rows]),
        "value_drain": size(v[0]) / (mean([size(v[i]) for i in later]) or math.nan),
        "first_value_norm": size(v[0]),
        "head_output_norm": mean([size(x) for x in z]),
        "last_output_norm": size(z[-1]),
        "sink_logit_gap": mean([scores[i][0] - mean(scores[i][1:i]) for i in range(2, len(q))]),
        "value_weighted_sink_share": mean(
            [w[0] / sum(w) for w in weighted if sum(w) > 0] or [math.nan]
        ),
        "attention_entropy": mean([-sum(a * math.log(a) for a in row if a > 0) for row in rows]),
    }


SCANNED = {
    "softmax": {},
    "gated": {"attention": "gated"},
    "relu": {"attention": "relu"},
    "sigmoid": {"attention": "sigmoid"},
    "off-by-one": {"attention": "off-by-one"},
    "softpick": {"attention": "softpick"},
    "a layer without attention": {"no_attention": (0,)},
}


@pytest.mark.parametrize("kind", SCANNED)
def test_a_scan_measures_any_attention_by_loops(kind, tokens):
    model = build(**SCANNED[kind])
    with torch.no_grad():  # scores far from zero, so that ReLU and softpick cut some off
        for block in model.layers:
            if block.attn is not None:
                block.attn.q.weight.mul_(6)
    report = scan(to_bridge(model), token_ids(tokens), progress=False)
    operator = kind if kind in OPERATORS else "softmax"
    expected = looped(model, tokens, operator)
    if kind not in ("softmax", "gated", "off-by-one"):
        assert report.attention_entropy is None
        del expected["attention_entropy"]
    assert report.settings.attention == "eager"
    for name, figures in expected.items():
        want = torch.tensor(figures, dtype=torch.float64)
        got = report[name].double().flatten()
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4, equal_nan=True, msg=name)
    assert len(set(expected["sink_attention"])) > 8, "the case has to tell heads apart"


def test_received_attention_of_relu_by_loops(tokens):
    model = build(attention="relu")
    recorded, record = recorder("hook_pattern")
    with torch.no_grad():
        model(tokens, tap=record)
    report = scan(to_bridge(model), token_ids(tokens), metrics="received", progress=False)
    for layer in range(2):
        pattern = recorded[f"blocks.{layer}.attn.hook_pattern"].double()
        assert (pattern[:, :, 11] == 0).any(), "a query that sees all reads some keys not at all"
        for head in range(2):
            for key in (0, 5, 11):
                paid = [pattern[b, head, i, key].item() for b in range(5) for i in range(key, 12)]
                got = report.received_attention[layer, head, key].item()
                assert got == pytest.approx(mean(paid), abs=1e-6)


def test_what_is_not_defined_is_refused_in_a_sentence(tokens):
    relu, gated = (to_bridge(build(attention=kind)) for kind in ("relu", "gated"))
    texts = token_ids(tokens)
    with pytest.raises(UnsupportedError, match="not a softmax .* not distributions"):
        scan(relu, texts, metrics="entropy", progress=False)
    with pytest.raises(UnsupportedError, match="no gate stands behind the heads"):
        scan(relu, texts, metrics="gates", progress=False)
    with pytest.raises(UnsupportedError, match="use eager attention"):
        scan(relu, texts, metrics="sink_attention", attention="streaming", progress=False)
    assert "not distributions" in capabilities(relu).unavailable["entropy"]
    assert not any("streaming" in why for why in capabilities(relu).unavailable.values())
    assert capabilities(gated).gate == "identity" and not capabilities(relu).gated
    assert "gated outputs" in str(capabilities(gated))
    assert "not a softmax" in str(capabilities(relu))


def test_a_pattern_that_reads_hidden_keys_is_not_believed(tokens):
    """ReLU patterns may be nought anywhere, so the check of the mask must not become lax."""
    bridge = to_bridge(build(attention="relu"))
    anatomy = read_anatomy(bridge)
    names = {hook.format(layer=layer) for hook in CANDIDATES for layer in range(2)}
    seen = probe(bridge, names.__contains__)
    hook = "blocks.1.attn.hook_{}".format

    def found(**changed):
        kept = seen.kept | {hook(name): value for name, value in changed.items()}
        return find_signals(replace(seen, kept=kept), anatomy, causal=True, tolerance=2e-3)

    pattern, scores = seen.kept[hook("pattern")], seen.kept[hook("attn_scores")]
    lower = torch.ones(12, 12, dtype=torch.bool).tril()
    assert (pattern.sum((0, 1))[lower] == 0).any(), "a visible key that nobody reads"
    assert "pattern" in found().signals
    ahead = pattern.clone()
    ahead[..., 3, 7] = 1e-3
    assert "pattern" in found(pattern=ahead).reasons
    assert "pattern" in found(pattern=-pattern).reasons
    assert "pattern" in found(attn_scores=scores.clamp(min=-1.0)).reasons  # no mask to be seen
