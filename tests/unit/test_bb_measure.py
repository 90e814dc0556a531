"""The three phenomena against plain loops over prompts, queries and keys."""

from __future__ import annotations

import math

import pytest
import torch

from sinkscope.bb import BackcopyTransformer, BigramBackcopy, BigramSource, ModelConfig, knockouts
from sinkscope.bb import measure as measured
from sinkscope.bb.model import recorder


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
