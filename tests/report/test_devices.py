"""Reports whose figures live on a GPU, in part or whole, say the same as on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sinkscope.report.comparison import compare
from sinkscope.report.report import SinkReport, load_report
from tests.report.factory import synthetic_report

pytestmark = pytest.mark.gpu


@pytest.fixture
def here() -> SinkReport:
    return synthetic_report(lengths=[16, 9, 4])


@pytest.fixture(params=["whole", "figures"])
def there(here: SinkReport, request: pytest.FixtureRequest) -> SinkReport:
    """On the GPU: everything, or all but the tokens and what was counted from them."""
    moved = here.to("cuda")
    if request.param == "whole":
        return moved
    kept = ("tokens", "mask", "sink_mask", "prompts_at")
    return dataclasses.replace(moved, **{name: here[name] for name in kept})


def test_every_question_has_the_same_answer(here: SinkReport, there: SinkReport):
    assert repr(there) == repr(here)
    assert there.to_dict()["sink_attention"] == here.to_dict()["sink_attention"]
    torch.testing.assert_close(there.mean("honor").cpu(), here.mean("honor"))
    assert there.top_heads() == [pytest.approx(record, rel=1e-5) for record in here.top_heads()]
    assert there.token_mask().cpu().equal(here.token_mask())
    assert there.sink_rate_at(0.3) == pytest.approx(here.sink_rate_at(0.3))
    interval = there.interval("honor")
    assert interval.low.device.type == "cuda"
    torch.testing.assert_close(interval.low.cpu(), here.interval("honor").low)
    assert there.to_frame("honor").equals(here.to_frame("honor"))
    assert there.to_xarray().identical(here.to_xarray())


def test_files_and_merges_do_not_care(here: SinkReport, there: SinkReport, tmp_path: Path):
    loaded = load_report(there.save(tmp_path / "r.nc"))
    assert loaded.equals(here) and loaded.honor.device.type == "cpu"
    expected = here.merge(here)
    for merged in (there.merge(here), here.merge(there), there.merge(there)):
        for name in expected.measured():
            torch.testing.assert_close(merged[name].cpu(), expected[name], equal_nan=True)
    assert "No value changed." in repr(compare(here, there))
    assert "No value changed." in repr(compare(there, here))
