"""Saving and loading: bit for bit, all or nothing, readable by others."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sinkscope.report.netcdf as netcdf
from sinkscope.errors import ReportError
from sinkscope.report.fields import MassiveActivations
from sinkscope.report.report import SinkReport, load_report
from tests.report.factory import only, synthetic_report, synthetic_settings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Lone surrogates, NUL, newlines: what a byte-level tokenizer may call a token.
HOSTILE = st.text(st.characters(exclude_categories=()), max_size=6)


def random_report(draw: Callable) -> SinkReport:
    """A report of random sizes, dtypes, figures (nan and inf too) and missing fields."""
    known = SinkReport.variables().values()
    sizes = {dim: draw(st.integers(1, 3)) for one in known for dim in one.dims}
    sizes["entry"] = draw(st.integers(0, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40], dtype=torch.float64)

    def tensor(cls: type, name: str) -> torch.Tensor:
        shape = [sizes[dim] for dim in cls.variables()[name].dims]
        hint = typing.get_type_hints(cls)[name]
        kinds = (typing.get_args(hint) or (hint,))[0].dtypes
        if "bool" in kinds:
            return torch.rand(shape, generator=random) < 0.5
        if "int64" in kinds:
            return torch.randint(-(2**62), 2**62, shape, generator=random)
        figures = torch.randn(shape, generator=random, dtype=torch.float64) * 1e3
        which = torch.randint(20, shape, generator=random)
        figures = torch.where(which < 5, odd[which.clamp(max=4)], figures)
        return figures.to(draw(st.sampled_from(DTYPES)))

    fields = {
        name: tensor(SinkReport, name)
        for name in SinkReport.variables()
        if name in ("tokens", "mask", "sink_mask") or draw(st.booleans())
    }
    massive = MassiveActivations(
        **{name: tensor(MassiveActivations, name) for name in MassiveActivations.variables()}
    )
    rows = sizes["prompt"]
    text = st.lists(st.lists(HOSTILE, max_size=3), min_size=rows, max_size=rows)
    counts = dict(n_layers="layer", n_heads="head", n_kv_heads="kv_head")
    counted = {name: sizes[dim] for name, dim in counts.items()}
    said = dict(model=draw(HOSTILE), seed=draw(st.none() | st.integers()))
    return SinkReport(
        settings=synthetic_settings(**said, **counted),
        token_text=draw(st.none() | text),
        massive=massive if draw(st.booleans()) else None,
        **fields,
    )


def as_bytes(tensor: torch.Tensor) -> list[int]:
    one_nan = (
        torch.where(tensor.isnan(), torch.nan, tensor) if tensor.is_floating_point() else tensor
    )
    return one_nan.contiguous().view(torch.uint8).tolist()


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_saved_comes_back_bit_for_bit(data: st.DataObject, tmp_path: Path):
    report = random_report(data.draw)
    loaded = load_report(report.save(tmp_path / "r.nc"))
    assert loaded.settings == report.settings
    assert loaded.token_text == report.token_text
    assert loaded.measured() == report.measured()
    for name in report.measured():
        one, other = report[name], loaded[name]
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert as_bytes(one) == as_bytes(other), (
            name
        )  # -0.0 and denormals count; the kind of nan does not
    assert (loaded.massive is None) == (report.massive is None)
    assert loaded.equals(report)


def test_other_programs_can_read_the_file(tmp_path: Path):
    report = synthetic_report()
    path = report.save(tmp_path / "r.nc")
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        assert dataset.honor.dims == ("prompt", "layer", "head")
        assert dataset.honor.attrs["units"] == "ratio"
        assert dataset.epsilon.dims == ("epsilon",)
        np.testing.assert_array_equal(dataset.layer, range(4))
        np.testing.assert_array_equal(dataset.honor, report.honor.numpy())
        assert json.loads(dataset.settings.item())["model"] == "synthetic"


def test_a_report_without_massive_activations_has_no_entries(tmp_path: Path):
    full = synthetic_report()
    none = {name: full.massive[name][:0] for name in full.massive.measured("entry")}
    report = dataclasses.replace(full, massive=dataclasses.replace(full.massive, **none))
    loaded = load_report(report.save(tmp_path / "r.nc"))
    assert loaded.equals(report) and len(loaded.massive.value) == 0


@pytest.mark.slow
@pytest.mark.parametrize("accident", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: BaseException
):
    path = synthetic_report(seed=1).save(tmp_path / "r.nc")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise accident

    monkeypatch.setattr(os, "fsync", fail)  # after the content was written
    with pytest.raises((ReportError, KeyboardInterrupt)):
        synthetic_report(seed=2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.nc"]


def test_saving_over_a_report_replaces_it(tmp_path: Path):
    path = tmp_path / "r.nc"
    synthetic_report(seed=1).save(path)
    second = synthetic_report(seed=2, positions=5)
    second.save(path)
    assert load_report(path).equals(second)


def test_paths_that_cannot_be_written(tmp_path: Path):
    report = only(synthetic_report())
    with pytest.raises(ReportError, match=r"'r.csv' must end in .nc"):
        report.save(tmp_path / "r.csv")
    with pytest.raises(ReportError, match="cannot be written: No such file or directory"):
        report.save(tmp_path / "missing" / "r.nc")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        report.save(tmp_path / "file" / "r.nc")


def test_files_that_are_no_reports(tmp_path: Path):
    with pytest.raises(ReportError, match=r"is a folder; pass a file in it \(no .nc file\)"):
        load_report(tmp_path)
    with pytest.raises(ReportError, match="There is no report file"):
        load_report(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("not a netCDF file")
    with pytest.raises(ReportError, match="damaged or another kind of file"):
        load_report(tmp_path / "text.nc")
    xr.Dataset({"x": ("y", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ReportError, match="is not a sinkscope report"):
        load_report(tmp_path / "other.nc")


def test_a_truncated_file_is_noticed(tmp_path: Path):
    path = synthetic_report().save(tmp_path / "r.nc")
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ReportError, match="damaged"):
            load_report(path)


def _settings(**changes: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        kept = json.loads(file["settings"][()])
        del file["settings"]
        file["settings"] = json.dumps(kept | changes)

    return change


def _attribute(name: str, value: str) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def _complex(file: h5py.File) -> None:
    del file["honor"]
    file["honor"] = np.zeros((3, 4, 6), "c8")


def _text(value: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["token_text"]
        file["token_text"] = value

    return change


DAMAGED = {
    "no such dtype": (_attribute("dtypes", '{"honor": "nosuch"}'), "kept as nosuch"),
    "a dtype that is a function": (_attribute("dtypes", '{"honor": "load"}'), "kept as load"),
    "dtypes in a list": (_attribute("dtypes", "[1]"), r"its dtypes are \[1\]"),
    "complex numbers": (_complex, "of the type complex64"),
    "epsilon in words": (_settings(epsilon="x"), "have epsilon 'x', which no report has"),
    "metrics in one word": (_settings(metrics="core"), "have metrics 'core', which"),
    "a setting of nobody": (_settings(colour=1), "have colour 1, which no report has"),
    "a billion layers": (_settings(n_layers=10**9), "along layer, but its settings say 1000000000"),
    "text in one word": (_text('"x"'), "its token_text is 'x'"),
    "text of one prompt": (_text('[["a"]]'), "the text of 1 prompts and the numbers of"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGED)
def test_a_report_whose_parts_are_not_what_they_should_be(tmp_path: Path, how: str):
    path = synthetic_report().save(tmp_path / "r.nc")
    damage, sentence = DAMAGED[how]
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(ReportError, match=sentence):
        load_report(path)


def test_what_others_put_beside_a_report_is_left_alone(tmp_path: Path):
    path = synthetic_report().save(tmp_path / "r.nc")
    with h5py.File(path, "r+") as file:
        file["notes"] = np.arange(5)
    assert load_report(path).equals(synthetic_report())


def test_a_newer_format_or_another_type_is_refused(tmp_path: Path):
    path = synthetic_report().save(tmp_path / "r.nc")
    with h5netcdf.File(path, "a") as file:
        file.attrs["sinkscope_format"] = 99
    with pytest.raises(ReportError, match=r"newer sinkscope .* upgrade"):
        load_report(path)
    path = netcdf.save(synthetic_report().massive, tmp_path / "m.nc")
    with pytest.raises(ReportError, match="contains a MassiveActivations, not a SinkReport"):
        load_report(path)


FULL_DISK = """
import resource, signal, sys
import sinkscope as ss
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report = ss.load_report(sys.argv[1])
whole = int(sys.argv[3])
for size in range(0, whole, whole // 37):  # in the middle of HDF5's blocks and at their ends
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        report.save(sys.argv[2])
    except ss.SinkscopeError as error:
        assert "cannot be written" in str(error), error
    else:
        raise SystemExit(f"wrote {size} bytes of more")
print("alive")
"""


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_does_no_harm(tmp_path: Path):
    """A file may have only so many bytes, in a process of its own: HDF5 used to crash there."""
    source = synthetic_report(seed=1).save(tmp_path / "source.nc")
    target = synthetic_report(seed=2).save(tmp_path / "target.nc")
    before = target.read_bytes()
    size = str(source.stat().st_size)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(target), size],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["alive"], done.stderr
    assert target.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["source.nc", "target.nc"]


def _external_storage(file: h5py.File, secret: Path) -> None:
    del file["honor"]
    external = [(str(secret), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("honor", (3, 4, 6), "f4", external=external)


def _external_link(file: h5py.File, secret: Path) -> None:
    del file["honor"]
    file["honor"] = h5py.ExternalLink(str(secret), "/honor")


def _virtual(file: h5py.File, secret: Path) -> None:
    del file["honor"]
    layout = h5py.VirtualLayout((3, 4, 6), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "honor", (3, 4, 6))
    file.create_virtual_dataset("honor", layout)


@pytest.mark.slow
@pytest.mark.parametrize("how", [_external_storage, _external_link, _virtual])
def test_a_strangers_report_that_reads_other_files_is_refused(tmp_path: Path, how: Callable):
    path = synthetic_report(seed=1).save(tmp_path / "r.nc")
    secret = synthetic_report(seed=2).save(tmp_path / "secret.nc")
    with h5py.File(path, "r+") as file:
        how(file, secret)
    with pytest.raises(ReportError, match="'honor' is a link to other files"):
        load_report(path)
