"""Nulls against loops over transformers' own patterns, and their level at initialisation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sinkscope as ss
from sinkscope.errors import ReportError, SinkscopeError, TextError, UnsupportedError
from sinkscope.interventions import ScaleValue
from sinkscope.prompts.tokens import Texts
from sinkscope.report.chance import QUANTITIES, p_values
from sinkscope.report.report import SinkReport
from tests.families.architectures import BY_NAME, Family
from tests.families.reference import reference

DRAWS = 3
NULLS = ("initial", "random", "shuffled")


def stream(*number: int) -> int:
    """The seed of a random stream: of the scan's seed, the null, and the model or prompt."""
    return int(np.random.SeedSequence(number).generate_state(1)[0])


def generator(null: int, row: int, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, null, row))


def initial(plain: Any, draw: int, seed: int = 0) -> Any:
    """The model of a draw, by transformers alone."""
    torch.manual_seed(stream(seed, 0, draw))
    return type(plain)(copy.deepcopy(plain.config)).eval()


def texts(lengths: tuple[int, ...] = (16, 11, 16)) -> Texts:
    tokens = torch.randint(1, 90, (len(lengths), 16), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    return Texts(tokens * mask, mask, "as given", "token ids")


def patterns(model: Any, prompts: Texts) -> list[Tensor]:
    """Attention of every prompt, alone [layer head query key]."""
    found = []
    for row, real in zip(prompts.tokens, prompts.mask, strict=True):
        with torch.no_grad():
            out = model(row[real][None], output_attentions=True)
        found.append(torch.stack(out.attentions)[:, 0].double())
    return found


def sees(family: Family, layer: int, query: int, key: int) -> bool:
    window = family.windows[layer] if family.windows else None
    if family.causal and key > query:
        return False
    return window is None or abs(query - key) < window


def loop(family: Family, pattern: Tensor, row: int, null: str) -> np.ndarray:
    """The null's sink attention of one prompt [layer head draw], query by query."""
    layers, heads, length, _ = pattern.shape
    found = np.full((layers, heads, DRAWS), np.nan)
    draw_of = generator(1 + (null == "shuffled"), row)
    if null == "random":
        places = [1 + int(i) for i in torch.randint(length // 2 - 1, (DRAWS,), generator=draw_of)]
    else:
        ranks = torch.rand(DRAWS, length, generator=draw_of)
    for layer in range(layers):
        seen = [[k for k in range(length) if sees(family, layer, q, k)] for q in range(length)]
        after_sink = [q for q in range(length) if q != 0]
        level = np.mean([(0 in seen[q]) / len(seen[q]) for q in after_sink])
        for draw in range(DRAWS):
            if null == "random":
                place = places[draw]
                queries = [q for q in range(length) if (q > place or not family.causal)]
                queries = [q for q in queries if q != place]
                uniform = np.mean([(place in seen[q]) / len(seen[q]) for q in queries])
                paid = pattern[layer][:, queries, place].mean(-1).numpy()
                found[layer, :, draw] = paid / uniform * level
            else:
                first = {q: min(seen[q], key=lambda k: float(ranks[draw, k])) for q in after_sink}
                paid = [pattern[layer][:, q, first[q]] for q in after_sink if 0 in seen[q]]
                found[layer, :, draw] = torch.stack(paid).sum(0).numpy() / len(after_sink)
    return found


@pytest.mark.parametrize("attention", ["eager", "streaming"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_nulls_are_those_of_loops(name: str, attention: str) -> None:
    family, prompts = BY_NAME[name], texts()
    report = ss.scan(
        family.build(), prompts, metrics="core", nulls=DRAWS, attention=attention, progress=False
    )
    plain = family.build()
    for row, pattern in enumerate(patterns(plain, prompts)):
        for null in ("random", "shuffled"):
            found = report[f"{null}_sink_attention"][row].numpy()
            np.testing.assert_allclose(found, loop(family, pattern, row, null), atol=1e-6)
        largest = pattern.argmax(-1)[..., 1:] == 0
        np.testing.assert_allclose(report.sink_is_largest[row], largest.double().mean(-1))
    for draw in range(DRAWS):
        fresh = initial(plain, draw)
        for row, pattern in enumerate(patterns(fresh, prompts)):
            paid = pattern[:, :, 1:, 0].mean(-1)
            found = report["initial_sink_attention"][row, ..., draw]
            np.testing.assert_allclose(found, paid, atol=1e-6)
    for null in NULLS:
        drawn = report[f"{null}_sink_attention"].double().mean(0)
        largest = drawn.flatten(0, 1).amax(0)
        for (layer, head), p in np.ndenumerate(report[f"p_{null}"].numpy()):
            observed = report.sink_attention.double().mean(0)[layer, head]
            assert p == pytest.approx((1 + int((largest >= observed).sum())) / (1 + DRAWS))


def test_the_random_peak_is_that_of_the_norms_there() -> None:
    family, prompts = BY_NAME["llama"], texts((16, 16))
    report = ss.scan(family.build(), prompts, metrics="core", nulls=DRAWS, progress=False)
    with torch.no_grad():
        states = family.build()(prompts.tokens, output_hidden_states=True).hidden_states
    norms = torch.stack(states)[1:-1].norm(dim=-1)  # the last one is normalised
    for row in range(2):
        drawn = generator(1, row)
        places = 1 + torch.randint(7, (DRAWS,), generator=drawn)
        for draw, place in enumerate(places.tolist()):
            others = np.delete(norms[:, row].numpy(), place, axis=1)
            want = norms[:, row, place].numpy() / np.median(others, axis=1)
            found = report["random_residual_peak"][row, : len(want), draw]
            np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_the_null_of_a_drain_is_that_of_the_norms_there(name: str) -> None:
    family, prompts = BY_NAME[name], texts()
    report = ss.scan(family.build(), prompts, metrics="core", nulls=DRAWS, progress=False)
    plain = family.build()
    norms = (
        reference(plain, prompts.tokens, prompts.mask, parts=family.parts)["values"]
        .double()
        .norm(dim=-1)
        .numpy()
    )
    for row, length in enumerate(prompts.mask.sum(1).tolist()):
        drawn = generator(1, row)
        places = 1 + torch.randint(length // 2 - 1, (DRAWS,), generator=drawn)
        of_prompt = norms[:, row, :length]
        for draw, place in enumerate(places.tolist()):
            want = of_prompt[:, place] / np.delete(of_prompt, place, axis=1).mean(1)
            found = report["random_value_drain"][row, ..., draw]
            np.testing.assert_allclose(found, want, rtol=1e-4)
    for draw in range(DRAWS):
        fresh = initial(plain, draw)
        of = (
            reference(fresh, prompts.tokens, prompts.mask, parts=family.parts)["values"]
            .double()
            .norm(dim=-1)
            .numpy()
        )
        for row, length in enumerate(prompts.mask.sum(1).tolist()):
            want = of[:, row, 0] / of[:, row, 1:length].mean(1)
            np.testing.assert_allclose(
                report["initial_value_drain"][row, ..., draw], want, rtol=1e-4
            )
    for null in ("initial", "random"):
        smallest = report[f"{null}_value_drain"].double().mean(0).flatten(0, 1).amin(0)
        for (layer, head), p in np.ndenumerate(report[f"p_{null}_value_drain"].numpy()):
            observed = report.value_drain.double().mean(0)[layer, head]
            assert p == pytest.approx((1 + int((smallest <= observed).sum())) / (1 + DRAWS))


SEEDS = range(20)


def plain_initial_fields(model: Any, draws: int, _: Any, seed: int) -> dict[str, Tensor]:
    """The initial null by transformers alone, several times as fast as scans of bridges."""
    family, prompts = BY_NAME["llama"], texts((16,) * 8)
    drawn: dict[str, list[Tensor]] = {}
    for draw in range(draws):
        fresh = initial(model.original_model, draw, seed)
        one = reference(fresh, prompts.tokens, prompts.mask, parts=family.parts)
        attention = one["attentions"][..., 1:, 0].mean(-1)
        norms, sizes = one["resid_post"].norm(dim=-1), one["values"].norm(dim=-1)
        peak = norms[..., 0] / norms[..., 1:].quantile(0.5, dim=-1)
        drain = sizes[:, :, 0] / sizes[:, :, 1:].mean(2)
        for name, x in zip(QUANTITIES, (attention, peak, drain), strict=True):
            drawn.setdefault(f"initial_{name}", []).append(x.transpose(0, 1))
    return {name: torch.stack(x, dim=-1) for name, x in drawn.items()}


@pytest.fixture(scope="module")
def at_initialisation() -> list[SinkReport]:
    """Twenty models at initialisation, each scanned with twenty draws of its own."""
    prompts, plain = texts((16,) * 8), BY_NAME["llama"].build()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sinkscope.capture.scan.initial_fields", plain_initial_fields)
        return [
            ss.scan(
                ss.load_model(initial(plain, seed, 1000)),
                prompts,
                metrics="core",
                nulls=20,
                nulls_seed=seed,
                progress=False,
            )
            for seed in SEEDS
        ]


@pytest.mark.slow
def test_the_fast_initial_null_is_that_of_scans(at_initialisation: list[SinkReport]) -> None:
    prompts = texts((16,) * 8)
    model = ss.load_model(initial(BY_NAME["llama"].build(), 3, 1000))
    found = ss.scan(model, prompts, metrics="core", nulls=2, nulls_seed=3, progress=False)
    for name in QUANTITIES:
        field = f"initial_{name}"
        torch.testing.assert_close(
            at_initialisation[3][field][..., :2], found[field], rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_scans_with_different_seeds_share_no_draw(at_initialisation: list[SinkReport]) -> None:
    for name in ("initial_sink_attention", "initial_residual_peak", "initial_value_drain"):
        drawn = [one[name].double().mean(0).flatten(0, -2).T for one in at_initialisation]
        drawn = torch.cat(drawn)
        assert len(drawn.unique(dim=0)) == len(drawn) == 20 * len(SEEDS)
    for name in ("random_sink_attention", "shuffled_sink_attention"):
        one, other = (at_initialisation[0][name], at_initialisation[1][name])
        assert not torch.allclose(one, other, atol=1e-4)
    report = at_initialisation[7]
    assert report.settings.nulls_seed == 7
    with pytest.raises(ReportError, match="nulls_seed"):
        report.merge(replace(report, settings=replace(report.settings, nulls_seed=8)))


@pytest.mark.parametrize(
    ("quantity", "null"),
    [
        *(("sink_attention", null) for null in NULLS),
        ("residual_peak", "initial"),
        ("value_drain", "initial"),
        ("value_drain", "random"),
    ],
)
def test_at_initialisation_few_tests_are_significant(
    at_initialisation: list[SinkReport], quantity: str, null: str
) -> None:
    significant = torch.stack([p_values(one, quantity)[null] <= 0.05 for one in at_initialisation])
    assert significant.double().mean() <= 0.05
    assert significant.flatten(1).any(1).sum() <= 3, "3 or fewer of 20: 98 % at 5 %"


def test_peaks_are_not_tested_against_other_positions(at_initialisation: list[SinkReport]) -> None:
    """Position 0, which attends to itself alone, stands out from them before any training."""
    above = 0
    for one in at_initialisation:
        assert p_values(one, "residual_peak")["random"].isnan().all()
        drawn = one.random_residual_peak.double().mean(0)
        above += int((one.residual_peak.double().mean(0) > drawn.amax((0, 1))).sum())
    assert above > 30, "of 60, where a test that holds its level gives at most a few"


@pytest.mark.parametrize("null", NULLS)
def test_a_sink_is_significant(null: str, at_initialisation: list[SinkReport]) -> None:
    """The level would be held by a test that never finds anything."""
    one = at_initialisation[0]
    attention = one.sink_attention.clone()
    attention[:, 1, 2] = 0.6
    p = p_values(replace(one, sink_attention=attention))[null]
    assert p[1, 2] == pytest.approx(1 / 21) and (p <= 0.05).sum() == 1


@pytest.mark.parametrize("null", ["initial", "random"])
def test_a_drain_is_significant(null: str, at_initialisation: list[SinkReport]) -> None:
    one = at_initialisation[0]
    before = p_values(one, "value_drain")[null]
    drain = one.value_drain.clone()
    drain[:, 1, 1] = 0.1
    p = p_values(replace(one, value_drain=drain), "value_drain")[null]
    assert float(p[1, 1]) == pytest.approx(1 / 21) and p[1, 1] < before[1, 1]
    assert (p <= 0.05).sum() == 1 + (before <= 0.05).sum()
    drain[:, 1, 1] = 10  # a large value is no drain
    assert p_values(replace(one, value_drain=drain), "value_drain")[null][1, 1] == 1


def test_kept_merged_and_the_same_in_any_batch(tmp_path: Path) -> None:
    model, prompts = ss.load_model(BY_NAME["qwen2"].build()), texts()
    options: dict[str, Any] = dict(metrics="core", nulls=2, progress=False)
    whole = ss.scan(model, prompts, **options)
    assert ss.load_report(whole.save(tmp_path / "r.nc")).equals(whole)
    one = ss.scan(model, prompts, batch=1, **options)
    torch.testing.assert_close(one.shuffled_sink_attention, whole.shuffled_sink_attention)
    merged = whole.merge(whole)
    assert merged.shuffled_sink_attention.shape[0] == 6
    torch.testing.assert_close(merged.p_shuffled, whole.p_shuffled)
    words = repr(whole)
    assert "Chance" in words and "keys shuffled" in words and "KV heads' drains are below" in words
    records = whole.chance_levels()
    assert [one["null"] for one in records] == list(NULLS) and records[0]["draws"] == 2
    peaks = whole.chance_levels("residual_peak")
    assert [one["tested"] for one in peaks] == [whole.sizes["layer"], 0]
    low = [one["low"] for one in whole.chance_levels("value_drain")]
    drawn = whole.random_value_drain.double().mean(0).flatten(0, 1).amin(0)
    assert low[1] == pytest.approx(float(drawn.quantile(0.025)))
    assert "p_initial" in whole.to_html() and len(whole.chance_levels("residual_peak")) == 2


def test_what_has_no_null_is_refused() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    options: dict[str, Any] = dict(metrics="core", progress=False)
    with pytest.raises(TextError, match="one sink per prompt"):
        ss.scan(model, texts(), sinks=[0, 3], nulls=2, **options)
    with ScaleValue(model, 0.5), pytest.raises(UnsupportedError, match="initialisation"):
        ss.scan(model, texts(), nulls=2, **options)
    with pytest.raises(SinkscopeError):
        ss.scan(model, texts(), nulls=-1, **options)
    with pytest.raises(SinkscopeError, match="nulls=20"):
        ss.scan(model, texts(), **options).chance_levels()
    with pytest.raises(SinkscopeError, match="nulls=20"):
        ss.scan(model, texts(), **options)["p_initial"]
