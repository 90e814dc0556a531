"""The annotations are the schema: dims, sizes, access, moving between devices, settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from jaxtyping import TypeCheckError

from sinkscope.errors import ReportError
from sinkscope.report.chance import DERIVED
from sinkscope.report.report import SinkReport
from sinkscope.report.settings import Settings, library_versions
from tests.report.factory import only, synthetic_report, synthetic_settings


def test_dims_come_from_the_annotations():
    variables = SinkReport.variables()
    assert variables["sink_attention"].dims == ("prompt", "layer", "head")
    assert variables["sink_attention"].label == "sink_attention [probability]"
    assert variables["value_norm"].dims == ("layer", "kv_head", "position")
    assert variables["tokens"].label == "tokens"
    assert "settings" not in variables and "massive" not in variables


def test_every_field_says_its_unit_and_meaning():
    for variable in SinkReport.variables().values():
        assert variable.about, variable.name
        ids_and_masks = ("tokens", "mask", "sink_mask", "secondary_sinks", "ffn_largest_dim")
        assert (variable.unit is None) == (variable.name in ids_and_masks), variable.name


def test_means_over_prompts_without_a_prompt_dimension_name_their_weights():
    """Merging needs them, so a new field cannot forget."""
    free_of_prompts = {"epsilon", "bucket", "width", "position_embedding_norm"}
    free_of_prompts |= {"prompts_at", "prompts_with_sink_at", "prompts_in_bucket", "ffn_prompts"}
    free_of_prompts |= set(DERIVED)
    for variable in SinkReport.variables().values():
        is_mean = "prompt" not in variable.dims and variable.name not in free_of_prompts
        assert (variable.weight is not None) == is_mean, variable.name


def test_a_tensor_of_the_wrong_shape_is_caught_in_tests():
    with pytest.raises(TypeCheckError):
        synthetic_report(sink_attention=torch.rand(3, 4))


def test_sizes_that_disagree_are_refused_at_run_time():
    report = synthetic_report(heads=6)
    object.__setattr__(report, "honor", torch.rand(3, 4, 5))
    with pytest.raises(ReportError, match=r"honor has 5 along head, but sink_attention has 6"):
        report.sizes  # noqa: B018


def test_a_report_contains_what_was_measured():
    report = only(synthetic_report(), "sink_attention", "residual_peak")
    assert "sink_attention" in report and "value_drain" not in report
    assert {"sink_attention", "residual_peak"} <= set(report)
    assert list(report) == [*report.measured()]


def test_access_by_name_says_what_is_wrong():
    report = only(synthetic_report(), "sink_attention")
    assert report["sink_attention"] is report.sink_attention
    with pytest.raises(ReportError, match="did you mean sink_attention"):
        report["sink_atention"]
    with pytest.raises(AttributeError, match="did you mean sink_attention"):
        report.sink_atention  # noqa: B018
    with pytest.raises(ReportError, match="scan again with the metric 'head_outputs'"):
        report["honor"]
    with pytest.raises(ReportError, match="scan again with the metric 'massive'"):
        report.to_frame("massive")
    with pytest.raises(ReportError, match="is not defined for this model"):
        report["position_embedding_norm"]


def test_measured_lists_what_is_there():
    report = only(synthetic_report(), "sink_attention", "honor", "residual_norm")
    assert report.measured("prompt", "layer", "head") == ("sink_attention", "honor")
    assert report.measured("head") == ()
    assert set(report.measured()) == {
        "tokens", "mask", "sink_mask", "sink_attention", "honor", "residual_norm",
    }  # fmt: skip


def test_to_moves_every_tensor_and_keeps_every_figure():
    report = synthetic_report()
    moved = report.to("cpu")
    assert moved is not report and moved.equals(report)
    assert report.to("meta").sink_attention.device.type == "meta"
    assert report.to("meta").massive.value.device.type == "meta"


def test_equals_sees_one_changed_figure_dtype_or_text():
    report = synthetic_report()
    changed = report.sink_attention.clone()
    changed[0, 0, 0] += 1e-6
    assert not report.equals(dataclasses.replace(report, sink_attention=changed))
    assert not report.equals(dataclasses.replace(report, honor=report.honor.double()))
    assert not report.equals(dataclasses.replace(report, token_text=None))
    assert not report.equals(dataclasses.replace(report, massive=None))
    entries = dataclasses.replace(report.massive, value=-report.massive.value)
    assert not report.equals(dataclasses.replace(report, massive=entries))


def test_settings_survive_a_dict():
    settings = synthetic_settings(windows=(None, 4), seed=None)
    assert Settings.from_dict(settings.to_dict()) == settings


def test_library_versions_are_the_installed_ones():
    versions = library_versions()
    assert torch.__version__.startswith(versions["torch"])  # PyPI's CUDA build adds +cu
    assert versions["transformer_lens"].startswith("4.")
    assert versions["python"].count(".") == 2
