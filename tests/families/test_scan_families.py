"""A scan equals what follows from transformers' own tensors, on every family and both paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sinkscope as ss

from .architectures import BY_NAME, LATENTS, OTHERS, Family
from .oracle import expected
from .reference import reference

PATHS = ("eager", "streaming")
# float32 models against a float64 oracle of float32 tensors; norms are compared relatively.
PROBABILITY = dict(atol=1e-5, rtol=0)
MAGNITUDE = dict(atol=1e-5, rtol=1e-4)
PROBABILITIES = {
    "sink_attention",
    "first_token_attention",
    "sink_importance",
    "received_attention",
    "learned_sink_mass",
    "value_weighted_sink_share",
    "recent_attention",
    "recent_without_self",
    "recent_sink_attention",
    "remaining_attention",
    "cosine_to_sink",
    "sink_cosine",
    "other_cosine",
}


COORDINATES_AND_COUNTS = {
    "bucket",
    "epsilon",
    "width",
    "prompts_in_bucket",
    "prompts_with_sink_at",
    "ffn_prompts",
}
ELSEWHERE = {
    "massive": "tests/metrics/test_residual.py",
    "gate_mean": "tests/families/test_gates.py",
    "gate_closed": "tests/families/test_gates.py",
    "gated_sink_attention": "tests/families/test_gates.py",
}
"""Fields of metrics that the oracle lacks, and the tests that work them out instead."""


def test_the_oracle_has_every_field() -> None:
    family = LATENTS[0]
    tokens = family.tokens()
    ref = reference(family.build(), tokens, parts=family.parts)
    oracle = expected(ref, np.ones(tokens.shape, dtype=bool), family.causal)
    fields = set(ss.SinkReport.metrics())
    assert set(oracle) <= fields, "the oracle has a field that report/fields.py lacks"
    lacking = fields - set(oracle) - COORDINATES_AND_COUNTS - set(ELSEWHERE)
    assert not lacking, (
        f"work out {', '.join(sorted(lacking))} in tests/families/oracle.py, from the tensors of "
        "one prompt there"
    )
    assert set(ELSEWHERE) <= fields - set(oracle)
    root = Path(__file__).parents[2]
    assert all(field in (root / file).read_text() for field, file in ELSEWHERE.items())


def compare(report: ss.SinkReport, oracle: dict, names: set[str] | None = None) -> set[str]:
    """Compare every field that both have; say which."""
    compared = set()
    for name, want in oracle.items():
        got = getattr(report, name)
        if got is None or (names is not None and name not in names):
            continue
        tolerance = PROBABILITY if name in PROBABILITIES else MAGNITUDE
        np.testing.assert_allclose(got.double().numpy(), want, err_msg=name, **tolerance)
        compared.add(name)
    return compared


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_field_agrees(family: Family, family_reference: dict, path: str) -> None:
    compare_every_field(family, family_reference, path)


@pytest.mark.parametrize("name", [family.name for family in OTHERS])
def test_every_field_agrees_on_others(name: str, path: str) -> None:
    family = BY_NAME[name]
    ref = reference(family.build(), family.tokens(), parts=family.parts)
    compare_every_field(family, ref, path)


def compare_every_field(family: Family, family_reference: dict, path: str) -> None:
    tokens = family.tokens()
    real = np.ones(tokens.shape, dtype=bool)
    oracle = expected(family_reference, real, family.causal, prescale=family.prescale)
    every = ("all", "ffn_dims", "sink_is_largest")
    report = ss.scan(
        family.build(), ss.token_ids(tokens), metrics=every, attention=path, progress=False
    )
    compared = compare(report, oracle)
    assert report.settings.attention == path
    missing = set(oracle) - compared
    assert "value_norm_out" in compared or family.parts.output is not None
    if path == "eager" and not family.stock_scores:
        missing -= {"sink_logit_gap"}
    if path == "eager" and not family.stock_rotated:
        missing -= {"sink_query_norm", "sink_key_norm", "sink_cosine", "other_cosine"}
    if not family.learned_sinks:
        missing -= {"learned_sink_mass"}
    assert not missing, f"no observer measured {missing}, or none under the metric of its field"


def test_another_sink_and_ragged_prompts(family: Family, path: str) -> None:
    """Sinks other than position 0; prompts of unequal length in batches of two."""
    tokens = family.tokens(prompts=5)
    lengths = np.array([24, 11, 24, 17, 9])
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    ref = reference(
        family.build(), tokens * torch.tensor(mask), torch.tensor(mask), parts=family.parts
    )
    oracle = expected(ref, mask, family.causal, sink=3, prescale=family.prescale)
    rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    report = ss.scan(
        family.build(),
        ss.token_ids(rows),
        metrics=("all", "sink_is_largest"),
        sinks=[3],
        batch=2,
        attention=path,
        progress=False,
    )
    assert report.sink_is_largest is not None
    assert len(compare(report, oracle)) > 20


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert"])
def test_padding_batching_and_order_move_nothing(name: str, path: str) -> None:
    """The figures of a prompt depend on that prompt alone (1e-5)."""
    family = BY_NAME[name]
    tokens = family.tokens(prompts=4, length=12)
    model = ss.load_model(family.build())
    alone = ss.scan(model, ss.token_ids(tokens), batch=1, attention=path, progress=False)
    order = [2, 0, 3, 1]
    padded = torch.zeros(4, 20, dtype=torch.long)
    padded[:, 8:] = tokens[order]
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 8:] = True
    shuffled = ss.scan(model, ss.token_ids(padded, mask), batch=3, attention=path, progress=False)
    for field in alone.measured():
        dims = alone.variables()[field].dims
        if dims[:2] != ("prompt", "layer"):
            continue
        torch.testing.assert_close(
            shuffled[field], alone[field][order], atol=1e-5, rtol=1e-5, equal_nan=True
        )
