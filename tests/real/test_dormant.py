"""What the experiments on dormant heads find on SmolLM2-135M, in a small version."""

from __future__ import annotations

import pytest
import torch

import sinkscope as ss
from sinkscope.experiments.dormant import dormancy
from sinkscope.experiments.mixing import mixing
from sinkscope.experiments.removal import removal
from sinkscope.experiments.sleep import sleep
from sinkscope.interventions import AblateHeads

pytestmark = [pytest.mark.real, pytest.mark.slow]


def prose(prompts: int, length: int, **options: object):
    return ss.texts("prose", prompts=prompts, length=length, **options)


def test_removal_equals_whole_passes(smollm2) -> None:
    """Three heads, against AblateHeads in whole forward passes and losses in float64."""
    texts = prose(2, 64).tokenize(smollm2)
    heads = [(0, 4), (14, 2), (29, 8)]
    found = removal(smollm2, texts, heads=heads, progress=False)
    for layer, head in heads:
        with AblateHeads(smollm2, [(layer, head)]), torch.no_grad():
            logits = smollm2(texts.tokens).double()
        nll = logits[:, :-1].log_softmax(-1).gather(-1, texts.tokens[:, 1:, None])
        want = -nll.mean(dim=(1, 2)).float()
        got = found.loss_without[:, layer, head]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert (got - found.loss).abs().max() > 1e-3


def test_more_heads_sleep_on_code_and_one_of_them_works_on_prose(smollm2) -> None:
    found = dormancy(smollm2, prompts=32, length=128, progress=False)
    asleep = {domain: int(found.dormant(domain).sum()) for domain in found.reports}
    assert asleep["code"] > asleep["prose"] > 40
    named = {(head["layer"], head["head"]): head for head in found.differing()}
    assert (5, 7) in named, "the head that differs most"
    assert named[5, 7]["dormant_on"] == "code" and named[5, 7]["active_on"] == "prose"
    one, other = named[5, 7]["sink_attention"]
    assert one.low > other.high


@pytest.mark.parametrize("head", [(26, 0), (26, 7)], ids=["26.0", "26.7"])
def test_a_head_that_sleeps_more_on_code_matters_more_on_prose(smollm2, head) -> None:
    """Confirmed by removal (on 64 fresh prompts of each kind: p < 0.001 for either head)."""
    layer, index = head
    asleep, effect = {}, {}
    for domain in ("prose", "code"):
        texts = ss.texts(domain, prompts=20, length=128)
        report = ss.scan(smollm2, texts, metrics=["sink_attention"], progress=False)
        asleep[domain] = report.sink_attention[:, layer, index].mean()
        found = removal(smollm2, texts, "resample", heads=[head], progress=False)
        effect[domain] = found.loss_change[:, layer, index].abs().mean()
    assert asleep["code"] > asleep["prose"] + 0.1
    assert effect["prose"] > 1.2 * effect["code"]


def test_honor_finds_sleepers_that_chance_does_not(smollm2) -> None:
    found = sleep(
        smollm2, prose(4, 96), scores=["AHON-LN"], shares=[0.05, 0.1], draws=2, progress=False
    )
    rise = (found.loss_asleep - found.loss).mean(-1) / found.loss.mean()
    honor, random = rise
    assert (honor < 0.02).all(), "a tenth of the heads for less than 2 % of the loss"
    assert (random > 3 * honor).all()


def test_without_its_sink_the_model_mixes_more(smollm2) -> None:
    found = mixing(
        smollm2, prose(4, 96, bos="never"), conditions=["no bos", "no sink"], progress=False
    )
    assert found.front_rate[0] > 0.4 > 0.2 > found.front_rate[1]
    middle = found.spread.shape[2] // 2
    assert (found.spread[1, :, middle] > found.spread[0, :, middle]).all()
    assert (found.rank_share[1, :, middle] < found.rank_share[0, :, middle]).all()
