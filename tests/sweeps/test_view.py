"""What `open_sweep` gives: the cells' own numbers with the grid's columns, read when needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.errors import ReportError, SinkscopeError, SinkscopeWarning
from sinkscope.sweeps import view
from sinkscope.sweeps.grid import read_file


@pytest.fixture(scope="module")
def folder(checkpoints: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, two lengths, with and without an intervention; one cell is missing."""
    out = tmp_path_factory.mktemp("sweep")
    found = ss.sweep(
        [str(checkpoints / "step-*"), gpt2], "prose", [12, 20], prompts=3, out=out, progress=False,
        interventions=["none", {"ZeroValue": {"positions": 0}}],
    )  # fmt: skip
    gone = found.select(checkpoint=200, length=20, intervention="none").rows[0]["cell"]
    (out / f"{gone}.nc").unlink()
    return out


@pytest.fixture
def cells(folder: Path) -> view.Cells:
    return ss.open_sweep(folder)


def test_a_partial_sweep(cells: view.Cells) -> None:
    assert len(cells) == 12 and "11 measured and 1 missing" in repr(cells)
    (missing,) = cells.missing.rows
    assert (missing["checkpoint"], missing["length"], missing["intervention"]) == (200, 20, "none")
    assert cells.frame["state"].value_counts().to_dict() == {"measured": 11, "missing": 1}
    assert cells.values("length") == [12, 20]


def test_frames_have_the_grids_columns(cells: view.Cells) -> None:
    rows = cells.to_frame("sink_attention")
    one = rows[(rows.checkpoint == 100) & (rows.length == 20) & (rows.intervention == "none")]
    report = cells.report(checkpoint=100, length=20, intervention="none")
    values = one["sink_attention [probability]"].to_numpy().reshape(report.sink_attention.shape)
    assert np.array_equal(values, report.sink_attention.numpy())
    assert list(rows)[:6] == list(view.COLUMNS)


def test_means_bootstrap_over_prompts(cells: view.Cells) -> None:
    found = cells.select(length=20, intervention="none").means("sink_attention")
    report = cells.report(checkpoint=100, length=20, intervention="none")
    by_prompt = report.sink_attention.double().numpy().mean((1, 2))
    draws = torch.randint(3, (2000, 3), generator=torch.Generator().manual_seed(0)).numpy()
    low, high = np.quantile(by_prompt[draws].mean(1), [0.025, 0.975])
    row = found[found.checkpoint == 100].iloc[0]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((by_prompt.mean(), low, high))


def test_numbers_are_those_of_the_tensors(cells: view.Cells) -> None:
    table = cells.numbers()
    assert len(table) == 11
    for (_, report), (_, row) in zip(cells.reports(), table.iterrows(), strict=True):
        mean = report.sink_attention.double().numpy().mean(0)
        layer, head = np.unravel_index(mean.argmax(), mean.shape)
        assert (row.strongest_layer, row.strongest_head) == (layer, head)
        assert row.sink_attention == pytest.approx(mean.mean())
        assert row.sink_head_share == pytest.approx((mean > 0.3).mean())
        assert row.sink_rate == pytest.approx((report.sink_importance.numpy() > 0.3).mean())
        peak = report.residual_peak.numpy().mean(0)
        assert row.residual_peak == pytest.approx(peak.max(), rel=1e-5)
        drain = report.value_drain.numpy().mean(0)
        assert abs(row.value_drain - np.median(drain)) < 1e-6


def test_comparisons_pair_prompts(cells: view.Cells) -> None:
    found = cells.compare("intervention", "none")
    assert len(found) == 5  # one of six has no counterpart
    for _, row in found.iterrows():
        where = dict(model=row["model"], length=row["length"])
        if row["model"].endswith("run"):
            where["checkpoint"] = row["checkpoint"]
        before, after = (
            cells.report(**where, intervention=one).sink_attention.double().numpy().mean((1, 2))
            for one in ("none", "ZeroValue(positions=0)")
        )
        draws = torch.randint(3, (2000, 3), generator=torch.Generator().manual_seed(0)).numpy()
        low, high = np.quantile((after - before)[draws].mean(1), [0.025, 0.975])
        assert row["difference"] == pytest.approx((after - before).mean())
        assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_xarray_reads_the_cells_that_are_asked_for(
    cells: view.Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = view.load
    monkeypatch.setattr(view, "load", lambda kind, path: read.append(path.stem) or load(kind, path))
    data = cells.to_xarray("sink_attention", "value_drain", "tokens")
    assert read == [] and dict(data.sizes)["cell"] == 11
    assert data.sink_attention.dims == ("cell", "prompt", "layer", "head")
    small = data.isel(cell=(data.length == 12).values & (data.checkpoint == 100).values)
    values = small.sink_attention.values
    assert len(read) == 2 and values.shape == (2, 3, 3, 4)
    report = cells.report(checkpoint=100, length=12, intervention="none")
    assert np.array_equal(values[0], report.sink_attention.numpy())
    # GPT-2 has fewer layers, shorter prompts fewer positions.
    of_gpt2 = data.sink_attention.isel(cell=~data.model.str.endswith("run").values)
    assert np.isnan(of_gpt2.values[:, :, 2]).all() and not np.isnan(of_gpt2.values[:, :, :2]).any()
    tokens = data.tokens.sel(cell=report_name(cells))
    assert (tokens.values[:, 12:] == -1).all()
    assert data.sink_attention.attrs["units"] == "probability"


def report_name(cells: view.Cells) -> str:
    return cells.select(checkpoint=100, length=12, intervention="none").rows[0]["cell"]


def test_figures(cells: view.Cells) -> None:
    chosen = cells.select(intervention="none")
    figure = chosen.curves("sink_attention", "length")
    means = chosen.means("sink_attention")
    drawn = {(x, round(y, 9)) for t in figure.data if t.name for x, y in zip(t.x, t.y, strict=True)}
    assert {(row["length"], round(row["mean"], 9)) for _, row in means.iterrows()} <= drawn
    maps = chosen.head_maps()
    assert len(maps.data) == 5
    report = next(chosen.reports())[1]
    assert np.allclose(maps.data[0].z, report.mean("sink_attention").numpy())
    with pytest.raises(ReportError, match="No cell has a checkpoint"):
        ss.plot.sweep_curves(means[means.checkpoint.isna()], "checkpoint", about="")


def test_dynamics_are_of_one_model(cells: view.Cells, checkpoints: Path) -> None:
    with pytest.raises(ReportError, match="of one model"):
        cells.dynamics()
    found = cells.select(model=str(checkpoints), length=12, intervention="none").dynamics()
    assert found.steps == (100, 200)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda cells: cells.select(colour=1), "There is no column 'colour'"),
        (lambda cells: cells.select(length=13), "No cell has the length 13"),
        (lambda cells: cells.report(length=12), "6 measured scans"),
        (lambda cells: cells.to_frame("received_attention"), "measured in no cell"),
        (lambda cells: cells.means("nothing"), "measured in no cell"),
        (lambda cells: cells.to_xarray("nothing"), "measured in no cell"),
        (lambda cells: cells.compare("length", 99), "No cell has the length 99"),
        (lambda cells: cells.experiments(), "scans only"),
        (lambda cells: ss.open_sweep("/nowhere"), "There is no folder"),
    ],
)
def test_what_is_not_there_is_said(cells: view.Cells, ask, says: str) -> None:
    with pytest.raises(ReportError, match=says):
        ask(cells)


def test_a_folder_without_cells(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds no cells"):
        ss.open_sweep(tmp_path)


ROW = dict(model="m", checkpoint=None, texts="t", length=8, intervention="none", experiment="scan")


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "[" * 100_000, '{"cells": 5}', '{"cells": [5]}', '{"cells": [{}]}',
        json.dumps({"cells": [ROW | {"cell": "../../elsewhere"}]}),
        json.dumps({"cells": [ROW | {"cell": 5}]}),
        json.dumps({"cells": [ROW | {"cell": "a", "length": "x"}]}),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan-0.json").write_text(content)
    with pytest.raises(ReportError, match="cannot be read|is damaged|no record of a sweep"):
        ss.open_sweep(tmp_path)
    whole = {"cells": [ROW | {"cell": "a"}]}
    (tmp_path / "plan-0.json").write_text(json.dumps(whole))
    assert len(ss.open_sweep(tmp_path)) == 1
    (tmp_path / "a.failed.json").write_text(content.replace("cells", "reason"))
    with pytest.raises(ReportError, match="cannot be read|is damaged|no record of a sweep"):
        ss.open_sweep(tmp_path)


def test_the_commands(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    file.write_text(f"models: ['{gpt2}']\nlengths: [12, 65]\nprompts: 2\nout: cells\n")
    run = CliRunner().invoke
    planned = json.loads(run(app, ["sweep", str(file), "--dry-run", "--json"]).stdout)
    assert [cell["there"] for cell in planned["cells"]] == [False, False]
    (memory,) = planned["memory"]
    parameters = AutoModelForCausalLM.from_pretrained(gpt2).num_parameters()
    assert memory["weights"] == 4 * parameters
    with pytest.warns(SinkscopeWarning):
        measured = run(app, ["sweep", str(file), "--json"])
    done = json.loads(measured.stdout)
    assert measured.exit_code == 1, "a cell failed"
    assert (done["measured"], done["failed"], done["loads"]) == (1, 1, 1)
    written = run(app, ["atlas", "cells", "--out", "atlas.html"])
    assert "wrote atlas.html" in written.stdout and "1 report" in written.stdout
    page = (tmp_path / "atlas.html").read_text()
    (report,) = (tmp_path / "atlas-reports").iterdir()
    assert f"atlas-reports/{report.name}" in page


def test_sweep_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    for content, says in (("- a", "holds"), ("a: [", "is not YAML"), ("colour: 1", "has colour")):
        file.write_text(content)
        with pytest.raises(SinkscopeError, match=says):
            from sinkscope.cli.sweep import _known

            _known(read_file(file), file)
    odd = {"deep": b"a: " + b"[" * 3000, "a date": b"a: 2020-99-99"}
    for content in odd.values():
        file.write_bytes(content)
        with pytest.raises(SinkscopeError, match="is not YAML"):
            read_file(file)
    file.write_bytes(b"models: [\xff]")
    with pytest.raises(SinkscopeError, match="cannot be read as UTF-8 text"):
        read_file(file)
    file.write_text("models: bb-3l", encoding="utf-16")
    assert read_file(file) == {"models": "bb-3l"}
    with pytest.raises(SinkscopeError, match="cannot be read"):
        read_file(tmp_path / "nothing.yaml")
