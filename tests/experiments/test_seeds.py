"""The population of sink heads over training and over seeds, against sets made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sinkscope.cli import app
from sinkscope.errors import ReportError
from sinkscope.experiments.dynamics import Dynamics
from sinkscope.experiments.seeds import same_heads
from tests.report.factory import synthetic_report

STEPS = (0, 100, 400)
ONE = [set(), {(1, 0), (2, 3)}, {(1, 0), (2, 3), (2, 4), (3, 1)}]
OTHER = [{(0, 0)}, {(1, 5), (2, 3)}, {(1, 5), (2, 4), (2, 0)}]


def run_with(population: list[set[tuple[int, int]]], **changes) -> Dynamics:
    """A run whose sink heads are these: two prompts, on one of which every head is one."""
    reports = {}
    for step, heads in zip(STEPS, population, strict=True):
        attention = torch.full((2, 4, 6), 0.1)
        attention[0] = 0.45
        for layer, head in heads:
            attention[:, layer, head] = 0.5
        reports[step] = synthetic_report(prompts=2, sink_attention=attention, **changes)
    return Dynamics(about="synthetic", reports=reports, loss={}, sink_threshold=0.5)


def test_turnover_of_sink_heads() -> None:
    frame = run_with(ONE).turnover().set_index("step")
    assert frame["sink_heads"].tolist() == [0, 2, 4]
    assert np.isnan(frame.loc[0, "appeared"]) and np.isnan(frame.loc[0, "jaccard"])
    assert frame["appeared"].tolist()[1:] == [2, 2] and frame["disappeared"].tolist()[1:] == [0, 0]
    assert frame["jaccard"].tolist()[1:] == [0, 0.5]
    other = run_with(OTHER).turnover().set_index("step")
    assert other["disappeared"].tolist()[1:] == [1, 1]
    assert other["jaccard"].tolist()[1:] == [0, 1 / 4]


def test_formation_of_heads_and_of_the_sink() -> None:
    run = run_with(OTHER)
    heads = run.formation().set_index(["layer", "head"])
    assert tuple(heads.loc[(0, 0)]) == (0, -1, 1)
    assert tuple(heads.loc[(1, 5)]) == (100, 100, 0)
    assert tuple(heads.loc[(2, 0)]) == (400, 400, 0)
    assert tuple(heads.loc[(3, 3)]) == (-1, -1, 0)
    assert run.formation_step() == 100 and run_with(ONE).formation_step() == 100
    assert run_with([set()] * 3).formation_step() is None
    assert run.formation_step(epsilon=0.2) == 0, "every head is above 0.2 at every step"
    assert "of 5 that ever were one, 2 stopped being one at least once" in run.summary()
    assert "no head is a sink head" in run_with([set()] * 3).summary()
    found = run.to_dict()
    assert found["turnover"][2]["jaccard"] == 0.25 and len(found["heads"]) == 24
    assert found["turnover"][0]["jaccard"] is None
    rows = run.to_frame().query("metric == 'sink_heads'")
    assert rows["value"].tolist() == [1, 2, 3]


def test_same_heads_over_seeds() -> None:
    found = same_heads({"seed 0": run_with(ONE), "seed 1": run_with(OTHER)})
    table = found.to_frame().pivot(index="step", columns="metric", values="value")
    assert table["jaccard"].tolist() == [0, 1 / 3, 1 / 6]
    assert table["jaccard_of_layers"].tolist() == [0, 1, 3 / 4]
    # Step 100: one head of six in layers 1 and 2 of both; 0, 1 or 2 of 2 + 2 coincide.
    chance = 2 * (1 / 6) * (5 / 6) * (1 / 3) + (1 / 36)
    assert table["jaccard_by_chance"].loc[100] == pytest.approx(chance)
    statistics = found.statistics()
    assert statistics["formation_step"] == {"seed 0": 100, "seed 1": 100}
    assert statistics["sink_heads"] == {"seed 0": [0, 2, 4], "seed 1": [1, 2, 3]}
    assert "2 runs at step 400: 4, 3 sink heads" in found.summary()
    figure = found.figures()["seeds"]
    drawn = {tuple(trace.y) for trace in figure.data}
    assert tuple(table["jaccard"]) in drawn


def test_runs_that_cannot_be_compared() -> None:
    run = run_with(ONE)
    with pytest.raises(ReportError, match="at least two runs, not 1"):
        same_heads({"a": run})
    shorter = dataclasses.replace(run, reports={0: run.reports[0]})
    with pytest.raises(ReportError, match=r"differ in their steps \(\(0, 100, 400\) and \(0,\)\)"):
        same_heads({"a": run, "b": shorter})
    with pytest.raises(ReportError, match="scanned on different tokens"):
        same_heads({"a": run, "b": run_with(ONE, seed=3)})


def test_the_command_compares_the_folders_of_runs(tmp_path: Path) -> None:
    """Snapshots of the laboratory from two seeds, trained for two steps."""
    from sinkscope import bb

    for seed in (0, 1):
        recipe = bb.TrainConfig(
            model=bb.ModelConfig(heads=4, width=32, context=16), length=16, batch=2, steps=2,
            seed=seed, measure_prompts=2, snapshots=(0, 2), compile=False,
        )  # fmt: skip
        bb.train(recipe, tmp_path / f"seed{seed}", device="cpu", progress=False)
    files = sorted(map(str, tmp_path.glob("seed*/step-*.safetensors")))
    arguments = ["dynamics", "--seeds", *files, "--prompts", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "out" / "seeds.json").read_text("utf-8"))
    assert kept["runs"] == ["seed0", "seed1"]
    rows = json.loads((tmp_path / "out" / "seed1" / "dynamics.json").read_text("utf-8"))["heads"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, head) for head in range(4)]
    assert (tmp_path / "out" / "seed1" / "dynamics.html").exists()
    alone = CliRunner().invoke(app, ["dynamics", "--seeds", *files[:1]])
    assert alone.exit_code != 0
