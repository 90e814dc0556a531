"""Merging: the report of two parts is the report of the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkscope.errors import ReportError
from sinkscope.report.fields import MassiveActivations
from sinkscope.report.report import SinkReport
from tests.report.factory import EPSILONS, only, synthetic_report, synthetic_settings

LAYERS, HEADS, KV_HEADS = 2, 3, 1


def scanned(lengths: list[int], seed: int, rows: slice) -> SinkReport:
    """What a scan of these prompts would report: numpy means over one table of raw figures.

    Only the rows asked for go into the report, whose longest prompt sets its positions.
    """
    rng = np.random.default_rng(seed)
    raw = rng.random((len(lengths), LAYERS, HEADS, max(lengths)))[rows]
    per_head = rng.random((len(lengths), LAYERS, HEADS))[rows]
    lengths = lengths[rows]
    prompts, positions = len(lengths), max(lengths)
    raw = raw[..., :positions]
    mask = np.arange(positions) < np.array(lengths)[:, None]
    raw = np.where(mask[:, None, None], raw, np.nan)
    edges = [2**power for power in range(max(positions - 1, 1).bit_length())]
    in_bucket = [[length > edge for edge in edges] for length in lengths]
    by_bucket = np.where(
        np.array(in_bucket)[:, None, None], raw[..., [min(e, positions - 1) for e in edges]], np.nan
    )

    def mean(x: np.ndarray) -> torch.Tensor:
        """Over the prompts that have a figure; nan where none has."""
        known = ~np.isnan(x)
        with np.errstate(invalid="ignore"):
            return torch.tensor(np.where(known, x, 0).sum(0) / known.sum(0))

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x)

    above = np.where(mask[:, None, None], raw > 0.3, np.nan)
    curve = [mean(np.where(mask[:, None, None], raw > float(e), np.nan)) for e in EPSILONS]
    return SinkReport(
        settings=synthetic_settings(
            length=positions, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV_HEADS
        ),
        tokens=tensor(np.where(mask, 7 + np.arange(positions), 0)),
        mask=tensor(mask),
        sink_mask=tensor(mask & (np.arange(positions) == 0)),
        token_text=[["w"] * length for length in lengths],
        sink_attention=tensor(per_head),
        received_attention=mean(raw),
        received_peak=tensor(raw.mean((1, 2))),
        value_norm=mean(raw[:, :, :KV_HEADS]),
        residual_norm=mean(raw[:, :, 0]),
        sink_rate=mean(above.mean((1, 2))),
        epsilon=EPSILONS,
        sink_rate_curve=torch.stack([c.mean((0, 1)) for c in curve]),
        prompts_at=tensor(mask.sum(0)),
        bucket=torch.tensor(edges),
        received_by_distance=mean(by_bucket),
        prompts_in_bucket=torch.tensor(in_bucket).sum(0),
        massive=MassiveActivations(
            prompt=torch.arange(prompts),
            layer=torch.ones(prompts, dtype=torch.int64),
            position=torch.zeros(prompts, dtype=torch.int64),
            dim=torch.full((prompts,), 5),
            value=tensor(per_head[:, 0, 0]),
            ratio=tensor(per_head[:, 0, 1]),
            count=torch.ones(prompts, LAYERS, dtype=torch.int64),
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=7),
    cut=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_the_merge_of_two_parts_is_the_whole(lengths: list[int], cut: int, seed: int):
    cut = min(cut, len(lengths) - 1)
    whole = scanned(lengths, seed, slice(None))
    merged = scanned(lengths, seed, slice(cut)).merge(scanned(lengths, seed, slice(cut, None)))
    assert merged.settings == whole.settings
    assert merged.token_text == whole.token_text
    for name in whole.measured():
        torch.testing.assert_close(merged[name], whole[name], rtol=1e-12, atol=0, equal_nan=True)
    for name in whole.massive.measured():
        assert torch.equal(merged.massive[name], whole.massive[name]), name


@pytest.mark.parametrize(
    ("setting", "value"),
    [("model", "other"), ("bos", "never"), ("epsilon", 0.5), ("source", "code"), ("dtype", "bf16")],
)
def test_the_first_setting_that_differs_is_named(setting: str, value: object):
    one, other = synthetic_report(), synthetic_report(settings={setting: value})
    with pytest.raises(ReportError, match=f"because their {setting} differs: .*{value}"):
        one.merge(other)


def test_another_version_of_sinkscope_is_refused():
    versions = {"python": "3.11.7", "sinkscope": "9.9", "torch": "2.13.0"}
    with pytest.raises(ReportError, match=r"from sinkscope 0\.1\.0 and the other from 9\.9"):
        synthetic_report().merge(synthetic_report(settings={"versions": versions}))


def test_where_it_ran_does_not_matter_and_is_recorded():
    versions = {"python": "3.12.1", "sinkscope": "0.1.0", "torch": "2.13.0"}
    other = synthetic_report(
        settings={"device": "cuda:0", "attention": "streaming", "seed": 3, "versions": versions}
    )
    merged = synthetic_report().merge(other).settings
    assert (merged.device, merged.attention) == ("cpu, cuda:0", "eager, streaming")
    assert merged.seed is None
    assert merged.versions["python"] == "3.11.7, 3.12.1"
    assert merged.versions["torch"] == "2.13.0"


def test_a_field_that_only_one_has_is_refused():
    with pytest.raises(ReportError, match="only one of them has honor"):
        synthetic_report().merge(synthetic_report(honor=None))
    with pytest.raises(ReportError, match="only one of them has massive"):
        synthetic_report().merge(synthetic_report(massive=None))


def test_means_without_their_weights_are_refused():
    one = only(synthetic_report(), "residual_norm")
    with pytest.raises(ReportError, match="prompts_at, which weights residual_norm, is missing"):
        one.merge(one)


def test_what_does_not_depend_on_prompts_must_agree():
    one = synthetic_report()
    with pytest.raises(ReportError, match="their position_embedding_norm differs"):
        one.merge(dataclasses.replace(one, position_embedding_norm=torch.zeros(32)))
    with pytest.raises(ReportError, match="one has 12 and the other 13 along dim"):
        one.merge(synthetic_report(dims=13))


def test_text_is_dropped_where_one_has_none():
    assert (
        synthetic_report()
        .merge(only(synthetic_report(), *synthetic_report().measured(), "massive"))
        .token_text
        is None
    )
