"""Tidy frames and xarray Datasets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sinkscope.errors import ReportError
from tests.report.factory import only, synthetic_report


def test_one_row_an_observation():
    report = synthetic_report()
    frame = report.to_frame("sink_attention")
    assert list(frame) == ["prompt", "layer", "head", "sink_attention [probability]"]
    assert len(frame) == 3 * 4 * 6
    for row in frame.itertuples(index=False):
        assert row[3] == report.sink_attention[row.prompt, row.layer, row.head].item()


def test_fields_of_equal_dims_share_a_frame():
    report = synthetic_report()
    frame = report.to_frame("sink_attention", "honor", "attention_entropy")
    assert list(frame)[3:] == [
        "sink_attention [probability]",
        "honor [ratio]",
        "attention_entropy [nat]",
    ]
    row = frame[(frame["prompt"] == 2) & (frame["layer"] == 1) & (frame["head"] == 5)]
    assert row["honor [ratio]"].item() == report.honor[2, 1, 5].item()
    with pytest.raises(ReportError, match="only fields of equal dimensions can share a frame"):
        report.to_frame("sink_attention", "value_drain")


def test_dims_with_coordinates_show_their_values():
    report = synthetic_report()
    frame = report.to_frame("sink_rate_curve")
    assert sorted(set(frame["epsilon"])) == pytest.approx([i / 20 for i in range(1, 20)])
    assert set(report.to_frame("received_by_distance")["bucket"]) == {1, 2, 4, 8}
    assert report.to_frame("bucket")["bucket"].tolist() == [1, 2, 4, 8]


def test_rows_of_tokens_have_text_and_no_padding():
    text = [["a", "b", "c"], ["<pad>"], ["d", "\0"]]
    report = synthetic_report(positions=3, lengths=[3, 1, 2], token_text=text)
    frame = report.to_frame("tokens")
    assert list(frame) == ["prompt", "position", "token", "tokens"]
    assert frame["token"].tolist() == ["a", "b", "c", "<pad>", "d", "\0"]
    assert frame["prompt"].tolist() == [0, 0, 0, 1, 2, 2]
    without = dataclasses.replace(report, token_text=None).to_frame("received_peak")
    assert list(without) == ["prompt", "position", "received_peak [probability]"]
    assert not without.isna().any(axis=None)


def test_massive_activations_are_rows_with_their_token():
    report = synthetic_report()
    frame = report.to_frame("massive")
    assert list(frame) == [
        "prompt", "layer", "position", "token", "dim", "value [activation]", "ratio [ratio]",
    ]  # fmt: skip
    assert frame["dim"].tolist() == [3, 7] * 3
    assert frame["token"].tolist() == [report.token_text[p][0] for p in (0, 0, 1, 1, 2, 2)]


def test_half_precision_can_be_tabulated():
    report = synthetic_report()
    report = dataclasses.replace(report, honor=report.honor.bfloat16())
    expected = report.honor.float().numpy().ravel()
    np.testing.assert_array_equal(report.to_frame("honor")["honor [ratio]"], expected)
    np.testing.assert_array_equal(report.to_xarray().honor.values.ravel(), expected)


def test_no_names_is_refused():
    with pytest.raises(ReportError, match="needs the name of a field"):
        synthetic_report().to_frame()


def test_xarray_is_labelled():
    report = synthetic_report(lengths=[16, 9, 4])
    dataset = report.to_xarray()
    assert dataset.sink_attention.dims == ("prompt", "layer", "head")
    assert dataset.sink_attention.attrs["units"] == "probability"
    assert "queries after the sink" in dataset.sink_attention.attrs["about"]
    assert dataset.mask.dtype == bool
    np.testing.assert_array_equal(dataset.epsilon, report.epsilon.numpy())
    assert dataset.massive_value.dims == ("entry",)
    selected = dataset.sink_attention.sel(layer=2, head=4).mean("prompt").item()
    assert selected == pytest.approx(report.sink_attention[:, 2, 4].mean().item())
    assert dataset.attrs["model"] == "synthetic"
    assert dataset.attrs["windows"] == "[null, null, null, null]"
    assert dataset.attrs["version_torch"] == "2.13.0"


def test_xarray_token_coordinate_is_blank_where_padded():
    report = synthetic_report(
        positions=3, lengths=[3, 1, 2], token_text=[list("abc"), ["d"], list("ef")]
    )
    tokens = report.to_xarray().token.values.tolist()
    assert tokens == [["a", "b", "c"], ["d", "", ""], ["e", "f", ""]]


def test_xarray_of_almost_nothing():
    dataset = only(synthetic_report()).to_xarray()
    assert set(dataset.data_vars) == {"tokens", "mask", "sink_mask"}


def test_tensors_with_gradients_or_strides_are_no_obstacle():
    report = synthetic_report()
    strided = report.sink_attention.transpose(0, 2).contiguous().transpose(0, 2)
    report = dataclasses.replace(report, sink_attention=strided.requires_grad_())
    values = report.to_frame("sink_attention")["sink_attention [probability]"]
    assert torch.equal(torch.tensor(values.to_numpy()), strided.detach().flatten())
