"""A sweep's cells are the single scans, each measured once, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM

import sinkscope as ss
from sinkscope.errors import (
    ModelError,
    SinkscopeError,
    SinkscopeWarning,
    TextError,
    UnsupportedError,
)
from sinkscope.sweeps.run import plan
from tests.sweeps.conftest import saved, tiny

GRID = dict(texts=["prose", "code"], lengths=[12, 20], prompts=3, progress=False)


def names(folder: Path, suffix: str = ".nc") -> set[str]:
    return {file.name for file in folder.glob(f"*{suffix}")}


@pytest.fixture(scope="module")
def found(checkpoints: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory):
    """Three models, two texts, two lengths, with and without an intervention: 24 cells."""
    return ss.sweep(
        [str(checkpoints / "step-*"), gpt2],
        interventions=["none", {"ZeroValue": {"positions": 0}}],
        out=tmp_path_factory.mktemp("sweep"),
        **GRID,
    )


def test_every_cell_is_the_single_scan(found, checkpoints: Path, gpt2: Path) -> None:
    assert len(found) == 24 and found.run.count("measured") == 24
    folders = {100: checkpoints / "step-100", 200: checkpoints / "step-200", None: gpt2}
    for step, folder in folders.items():
        model = ss.load_model(folder)
        for source in GRID["texts"]:
            for length in GRID["lengths"]:
                texts = ss.texts(source, prompts=3, length=length)
                where = dict(checkpoint=step, texts=source, length=length)
                alone = ss.scan(model, texts, metrics="core", progress=False)
                assert found.report(**where, intervention="none").equals(alone)
                with ss.ZeroValue(model, positions=0):
                    alone = ss.scan(model, texts, metrics="core", progress=False)
                under = found.report(**where, intervention="ZeroValue(positions=0)")
                assert under.equals(alone)


def test_a_cell_has_the_attention_of_plain_transformers(found, checkpoints: Path) -> None:
    folder = checkpoints / "step-100"
    report = found.report(checkpoint=100, texts="prose", length=20, intervention="none")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        patterns = model(report.tokens, output_attentions=True).attentions
    expected = torch.stack([pattern[:, :, 1:, 0].mean(-1) for pattern in patterns], dim=1)
    assert torch.allclose(report.sink_attention, expected, atol=1e-5)


def test_weights_are_loaded_once_for_each_model(found) -> None:
    assert found.run.loads == 3


def test_what_is_there_is_not_measured_again(found, checkpoints: Path, gpt2: Path) -> None:
    stamps = {file: file.stat().st_mtime_ns for file in found.folder.path.glob("*.nc")}
    again = ss.sweep(
        [gpt2, str(checkpoints / "step-*")], out=found.folder.place, **GRID
    )  # fmt: skip
    assert (again.run.count("kept"), again.run.loads) == (12, 0)
    assert stamps == {file: file.stat().st_mtime_ns for file in found.folder.path.glob("*.nc")}


def test_what_is_missing_is_measured_and_nothing_else(checkpoints: Path, tmp_path: Path) -> None:
    first = ss.sweep(checkpoints / "step-100", out=tmp_path, **GRID)
    gone = [row["cell"] for row in first.rows][1:3]
    (tmp_path / f"{gone[0]}.nc").unlink()
    (tmp_path / f"{gone[1]}.request.json").unlink()
    assert len(ss.open_sweep(tmp_path).missing) == 2
    again = ss.sweep(checkpoints / "step-100", out=tmp_path, **GRID)
    measured = {n for n, outcome in again.run.outcomes.items() if outcome.state == "measured"}
    assert measured == set(gone) and again.run.loads == 1


def test_a_cell_is_named_by_what_decides_its_numbers(gpt2: Path, tmp_path: Path) -> None:
    def cell(model: Path, **changes) -> str:
        asked = dict(texts="prose", lengths=12, prompts=2, out=tmp_path / "out") | changes
        (one,) = plan(model, **asked).cells
        return one.name

    plain = cell(gpt2)
    copy = tmp_path / "copy"
    shutil.copytree(gpt2, copy)
    assert cell(copy) == plain  # the same weights elsewhere
    assert cell(gpt2, metrics=["core"]) == plain
    changed = [
        dict(lengths=13), dict(prompts=3), dict(texts="code"), dict(sinks=[1]), dict(epsilon=0.2),
        dict(metrics=["values"]), dict(interventions="ZeroValue"), dict(dtype="bfloat16"),
        dict(texts={"source": "prose", "bos": "never"}), dict(attention="eager"),
        dict(texts={"prose": ["another text, of which there is enough for two prompts"] * 2}),
    ]  # fmt: skip
    assert len({plain, *(cell(gpt2, **change) for change in changed)}) == len(changed) + 1
    saved(copy, "gpt2", seed=1)
    assert cell(copy) != plain


def test_a_text_file_counts_by_its_content(gpt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    seen = set()
    for content in ("the quick brown fox " * 30, "the quick brown fox " * 30, "a lazy dog " * 50):
        text.write_text(content)
        (one,) = plan(gpt2, str(text), 12, prompts=2, out=tmp_path / "out").cells
        seen.add(one.name)
    assert len(seen) == 2


def test_models_of_equal_weights_share_their_cells(gpt2: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(gpt2, copy)
    found = ss.sweep({"one": gpt2, "other": copy}, "prose", 12, prompts=2, out=tmp_path / "out",
                     progress=False)  # fmt: skip
    assert len(found) == 2 and found.run.count("measured") == 1
    assert found.report(model="one").equals(found.report(model="other"))


def test_a_cell_that_fails_says_why_and_the_others_go_on(gpt2: Path, tmp_path: Path) -> None:
    asked = dict(texts="prose", lengths=[12, 65], prompts=2, out=tmp_path, progress=False)
    with pytest.warns(SinkscopeWarning, match="1 cell of 2 failed"):
        found = ss.sweep(gpt2, **asked)
    assert found.run.count("measured") == 1
    (failed,) = ss.open_sweep(tmp_path).select(state="failed").rows
    assert "65 tokens are more than the 64 positions" in failed["reason"]
    assert failed["length"] == 65 and failed["reason"] in found.run.summary()
    with pytest.warns(SinkscopeWarning):
        again = ss.sweep(gpt2, **asked)
    assert (again.run.count("kept"), again.run.count("failed")) == (1, 1)


def test_a_model_that_cannot_be_loaded_is_tried_once(gpt2: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(gpt2, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.warns(SinkscopeWarning, match="4 cells of 8 failed"):
        found = ss.sweep([broken, gpt2], out=tmp_path / "out", **GRID)
    assert found.run.loads == 2 and len({o.reason for o in found.run.outcomes.values()}) == 2


def test_a_model_in_memory(tmp_path: Path) -> None:
    model, ids = tiny(), torch.arange(20).reshape(2, 10)
    found = ss.sweep({"mine": model}, {"ids": ids}, out=tmp_path, progress=False)
    assert found.report().equals(ss.scan(model, ids, metrics="core", progress=False))
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    again = ss.sweep({"mine": model}, {"ids": ids}, out=tmp_path, progress=False)
    assert again.run.count("measured") == 1
    with pytest.raises(SinkscopeError, match="in memory"):
        ss.sweep(model, "prose", 12, out=tmp_path / "other", workers=1)


def test_an_experiment_is_a_cell_too(checkpoints: Path, tmp_path: Path) -> None:
    asked = dict(experiment={"name": "trace_peak", "blocks": [0]}, prompts=2, out=tmp_path)
    found = ss.sweep(checkpoints / "step-100", "prose", 12, **asked, progress=False)
    model = ss.load_model(checkpoints / "step-100")
    alone = ss.experiments.trace_peak.trace_peak(
        model, ss.texts("prose", prompts=2, length=12), blocks=[0], progress=False
    )
    (cell,) = [row["cell"] for row in found.rows]
    assert found.folder.json(f"{cell}.json")["summary"] == alone.summary()
    assert found.experiments()["summary"].tolist() == [alone.summary()]
    again = ss.sweep(checkpoints / "step-100", "prose", 12, **asked, progress=False)
    assert again.run.count("kept") == 1


def test_an_object_store(gpt2: Path) -> None:
    place = "memory://bucket/sweep"
    found = ss.sweep(gpt2, "prose", [12, 16], prompts=2, out=place, progress=False)
    files = fsspec.filesystem("memory").ls("/bucket/sweep", detail=False)
    assert sum(file.endswith(".nc") for file in files) == 2
    again = ss.sweep(gpt2, "prose", [12, 16], prompts=2, out=place, progress=False)
    assert again.run.count("kept") == 2
    opened = ss.open_sweep(place)
    assert opened.report(length=12).equals(found.report(length=12))
    alone = ss.scan(gpt2, ss.texts("prose", 2, 12), metrics="core", progress=False)
    assert opened.report(length=12).equals(alone)


def test_another_sweep_is_waited_for(gpt2: Path, tmp_path: Path) -> None:
    """Its cell is left alone while it is measured there, and measured when that ends without it."""
    (cell,) = plan(gpt2, "prose", 12, prompts=2, out=tmp_path).cells
    lock = tmp_path / f".{cell.name}.nc.lock"
    hold = f"import filelock, time\nwith filelock.FileLock({str(lock)!r}):\n print(1, flush=True)\n"
    other = subprocess.Popen(
        [sys.executable, "-c", hold + " time.sleep(1.5)"], stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline()
    begun = time.monotonic()
    found = ss.sweep(gpt2, "prose", 12, prompts=2, out=tmp_path, progress=False)
    assert time.monotonic() - begun > 1 and found.run.count("measured") == 1
    other.stdout.close()
    assert other.wait() == 0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (dict(models=[]), SinkscopeError, "names nothing to measure"),
        (dict(models=[3]), SinkscopeError, "A model of a sweep is a name"),
        (dict(models={"model": "bb-3l", "colour": 1}), SinkscopeError, "no option colour"),
        (dict(models="nowhere/step-*"), SinkscopeError, "No file or folder is named"),
        (dict(models="./nowhere"), SinkscopeError, "There is no file or folder ./nowhere"),
        (dict(texts=["prose", "prose"]), TextError, "Two texts are called prose"),
        (dict(texts={"source": "prose", "colour": 1}), TextError, "cannot be made"),
        (dict(texts={"ids": [[1, 2, 3]]}), TextError, "exact token ids"),
        (dict(lengths=[0]), TextError, "length"),
        (dict(interventions="Zero"), SinkscopeError, "There is no intervention 'Zero'"),
        (dict(interventions={"ZeroValue": {"colour": 1}}), SinkscopeError, "cannot have"),
        (dict(interventions={"ReplaceStart": {}}), SinkscopeError, "There is no intervention"),
        (dict(interventions=5), SinkscopeError, "An intervention of a sweep is a name"),
        (dict(metrics=["nothing"]), UnsupportedError, "There is no metric 'nothing'"),
        (dict(metrics=5), SinkscopeError, "metrics is 5"),
        (dict(sinks=["a"]), TextError, "sinks is"),
        (dict(sinks=[-1]), TextError, "sinks is"),
        (dict(attention="flash"), UnsupportedError, "attention is 'flash'"),
        (dict(batch=0), SinkscopeError, "batch is 0"),
        (dict(dtype="float3"), ModelError, "'float3' is not a dtype"),
        (dict(models={"model": "bb-3l", "dtype": 5}), ModelError, "5 is not a dtype"),
        (dict(models={"model": "bb-3l", "checkpoint": "x"}), SinkscopeError, "checkpoint is 'x'"),
        (dict(experiment="nothing"), SinkscopeError, "There is no experiment 'nothing'"),
        (dict(experiment="dynamics"), SinkscopeError, "takes model and checkpoints"),
        (dict(experiment={"name": "trace_peak", "colour": 1}), SinkscopeError, "these options"),
    ],
)
def test_what_cannot_be_understood_is_refused(changes, error, says: str, tmp_path: Path) -> None:
    asked = dict(models="bb-3l", texts="prose", lengths=12, out=tmp_path) | changes
    with pytest.raises(error, match=says):
        plan(**asked)


def test_where_to_measure_is_looked_at_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no device 'cpu:9' here"):
        ss.sweep("bb-3l", "prose", 12, out=tmp_path / "out", device="cpu:9")
    assert not (tmp_path / "out").exists()


def test_a_metric_of_ones_own_stays_in_this_process(
    gpt2: Path, tmp_path: Path, monkeypatch
) -> None:
    from sinkscope.capture.observers import base

    monkeypatch.setattr(base, "_registered", {k: list(v) for k, v in base._registered.items()})

    class Loudest(ss.Observer, metric="loudest", reads="resid_post"):
        fields = {"loudest": ss.measured("prompt layer", unit="activation", about="largest value")}

        def observe(self, x, batch):
            return {"loudest": x.abs().amax((1, 2))}

    asked = dict(texts="prose", lengths=12, prompts=2, metrics="loudest", out=tmp_path)
    found = ss.sweep(gpt2, **asked, progress=False)
    assert found.means("loudest")["mean"].notna().all()
    with pytest.raises(SinkscopeError, match="user-defined"):
        ss.sweep(gpt2, **(asked | {"lengths": 13}), workers=1)
