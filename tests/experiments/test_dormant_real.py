"""What the experiments on dormant heads find on SmolLM2-135M, in a small version.

The bounds come from 128 windows of 128 tokens of each kind on an H100 (docs/inactive-heads.md):
each leaves room for what so few windows and another Python's manual may change.
"""

from __future__ import annotations

import pytest
import torch

import sinkscope as ss
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.experiments.mixing import mixing
from sinkscope.interventions import AblateHeads
from sinkscope.statistics import max_t

pytestmark = [pytest.mark.real, pytest.mark.slow]


def prose(prompts: int, length: int, **options: object):
    return ss.texts("prose", prompts=prompts, length=length, **options)


def test_removal_equals_whole_passes(smollm2) -> None:
    """Three heads, against AblateHeads in whole forward passes and losses in float64."""
    texts = prose(2, 64).tokenize(smollm2)
    heads = [(0, 4), (14, 2), (29, 8)]
    found = ablate_heads(smollm2, texts, heads=heads, progress=False)
    for layer, head in heads:
        with AblateHeads(smollm2, [(layer, head)]), torch.no_grad():
            logits = smollm2(texts.tokens).double()
        nll = logits[:, :-1].log_softmax(-1).gather(-1, texts.tokens[:, 1:, None])
        want = -nll.mean(dim=(1, 2)).float()
        got = found.ablated_loss[:, layer, head]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert (got - found.loss).abs().max() > 1e-3


def kind(domain: str):
    return ss.texts(domain, prompts=20, length=96)


@pytest.fixture(scope="module")
def sink_attention(smollm2) -> dict[str, torch.Tensor]:
    """On prose and on code [prompt layer head]."""
    found = {}
    for domain in ("prose", "code"):
        report = ss.scan(smollm2, kind(domain), metrics=["sink_attention"], progress=False)
        found[domain] = report["sink_attention"]
    return found


def test_many_heads_park_more_on_code(sink_attention) -> None:
    """192 of 270 heads differ; 128 are dormant on code and 97 on prose; 5.7 by 0.30."""
    mean = {domain: x.mean(dim=0) for domain, x in sink_attention.items()}
    assert (mean["code"] > 0.5).sum() > (mean["prose"] > 0.5).sum() > 60
    p = max_t(sink_attention["prose"], sink_attention["code"])
    assert (p < 0.05).sum() > 30
    assert mean["code"][5, 7] > mean["prose"][5, 7] + 0.12
    assert p[26, 0] < 0.02 and mean["code"][26, 0] > mean["prose"][26, 0] + 0.1
    # The same kind of text against itself: no head.
    halves = sink_attention["prose"][::2], sink_attention["prose"][1::2]
    assert max_t(*halves).min() > 0.005


def test_what_removal_says_of_heads_that_park(smollm2, sink_attention) -> None:
    """18.8 is dormant on any text; 5.7 and 26.0 matter half as much on code, where they park."""
    never, sometimes = (18, 8), [(5, 7), (26, 0)]
    effect = {}
    for domain, attention in sink_attention.items():
        assert attention[:, *never].mean() > 0.95
        heads = [never, *sometimes]
        found = ablate_heads(smollm2, kind(domain), "resample", heads=heads, progress=False)
        change = found.loss_change.abs()
        assert change[:, *never].max() < 0.003, "nat, on any prompt"
        effect[domain] = sum(change[:, *head].mean() for head in sometimes)
    assert effect["prose"] > 1.1 * effect["code"]
    assert effect["code"] > 0.003, "nat: they do little there, not nothing"


def test_sleep_is_cheap_where_the_sink_says_so_and_not_at_random(smollm2) -> None:
    """Of the loss: AWFT 2 % −0.1 %, 10 % +6 %; random 10 % +12 %, 30 % +60 %; HONOR 30 % +14 %."""
    found = ablate_inactive(
        smollm2,
        prose(5, 96),
        scores=["AWFT", "AHON-LN"],
        shares=[0.02, 0.1, 0.3],
        draws=1,
        progress=False,
    )
    rise = (found.ablated_loss - found.loss).mean(-1) / found.loss.mean()
    awft, honor, random = rise
    assert awft[0].abs() < 0.01
    assert random[1] > 1.1 * awft[1] > 0
    assert random[2] > 1.5 * honor[2] > 0.05


def test_without_its_sink_the_model_mixes_more(smollm2) -> None:
    found = mixing(
        smollm2, prose(4, 96, bos="never"), conditions=["no bos", "no sink"], progress=False
    )
    assert found.front_rate[0] > 0.4 > 0.2 > found.front_rate[1]
    middle = found.spread.shape[2] // 2
    spread = found.spread[:, :, middle].mean(dim=1)  # over prompts
    assert spread[1] > 1.1 * spread[0]
    assert (found.rank_share[1, :, middle] < found.rank_share[0, :, middle]).all()
