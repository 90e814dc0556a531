"""Growth laws, intervals, comparisons and curves: the tables that runs end in."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch

from sinkscope.bb import (
    ModelConfig,
    TrainConfig,
    compare,
    dynamics,
    fit_growth,
    growth_laws,
    reinforcement,
    summarise,
    train,
)
from sinkscope.bb.comparison import LINES
from sinkscope.errors import ModelError
from sinkscope.statistics import mean_interval

DATA = files("sinkscope.bb")
README = DATA.joinpath("README.md").read_text("utf-8")
TINY = TrainConfig(
    model=ModelConfig(width=8, context=12), batch=4, length=12, steps=6, measure_every=3,
    measure_prompts=8, save_every=3,
)  # fmt: skip


@pytest.mark.parametrize(("freedom", "tabled"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)])
def test_intervals_are_those_of_the_tabled_student_quantiles(freedom, tabled):
    values = np.random.default_rng(1).normal(size=freedom + 1)
    mean, low, high = mean_interval(values)
    error = np.sqrt(sum((value - mean) ** 2 for value in values) / freedom / len(values))
    assert (high - mean) / error == pytest.approx(tabled, abs=2e-3)
    assert (mean - low) / error == pytest.approx(tabled, abs=2e-3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    samples = random.normal(3.0, 2.0, (2000, 3))
    covered = [low <= 3.0 <= high for _, low, high in map(mean_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert np.isnan(mean_interval(np.array([1.0]))[1])


@pytest.mark.parametrize(
    ("law", "curve"), [("log", np.log), ("linear", lambda t: t / 100), ("sqrt", np.sqrt)]
)
def test_the_right_law_is_found_with_its_slope(law, curve):
    steps = np.arange(200, 10_000, 100)
    noise = np.random.default_rng(1).normal(0, 0.2, len(steps))
    log = pd.DataFrame(
        {
            "step": steps,
            "metric": "logit_gap",
            "layer": 0,
            "head": 0,
            "value": 2 + 3 * curve(steps) + noise,
        }
    )
    fits, drawn = growth_laws(log)
    assert fits.iloc[0].law == law
    true = 3 / 100 if law == "linear" else 3
    assert fits.iloc[0].slope == pytest.approx(true, rel=0.05)
    assert fits.iloc[0].slope_low < true < fits.iloc[0].slope_high
    assert fits.iloc[0].r_squared > 0.98 > fits.iloc[1].r_squared
    assert set(drawn.columns) == {"metric", "layer", "head", "step", "value", "law"}
    assert np.abs(drawn.value - (2 + 3 * curve(steps))).max() < 0.3


def test_growth_intervals_widen_with_slow_noise():
    steps = np.arange(200, 10_000, 100)
    random = np.random.default_rng(2)
    white = random.normal(0, 1, len(steps))
    slow = np.repeat(random.normal(0, 1, 10), 10)[: len(steps)]
    widths = []
    for noise in (white, slow):
        fit = fit_growth(steps, np.log(steps) + noise, "log")
        widths.append(fit.slope_high - fit.slope_low)
    assert widths[1] > 1.5 * widths[0]


def test_compare_trains_each_combination_and_resumes(tmp_path):
    arguments = dict(
        attentions=("softmax", "relu"), optimizers=("adamw", "sgd"), seeds=(1, 2), config=TINY,
        rates={"sgd": 0.1}, folder=tmp_path, device="cpu", progress=False,
    )  # fmt: skip
    runs = compare(**arguments)
    assert len(runs) == 8 and len(list(tmp_path.glob("*-*"))) == 8
    single = train(
        TINY.replace(attention="relu", optimizer="sgd", learning_rate=0.1, seed=2),
        device="cpu",
        progress=False,
    ).to_frame()
    last = single[single.step.isin((3, 5, 6))]
    end = {
        metric: sorted(rows.value)[1] for metric, rows in last.groupby("metric") if len(rows) == 3
    }
    row = runs[(runs.attention == "relu") & (runs.optimizer == "sgd") & (runs.seed == 2)].iloc[0]
    assert row.sink == pytest.approx(end["sink_attention"])
    assert row.drain == pytest.approx(end["value_drain"])
    assert row.peak == pytest.approx(end["residual_peak"])
    halfway = single[(single.step == 3) & (single.metric == "residual_norm")].value.item()
    assert row.growth == pytest.approx(end["residual_norm"] / halfway)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/log.csv")}
    pd.testing.assert_frame_equal(compare(**arguments), runs)
    assert len(kept) == 8


def test_compare_puts_no_runs_of_different_lengths_into_one_table(tmp_path):
    same = dict(seeds=(1,), config=TINY, folder=tmp_path, device="cpu", progress=False)
    longer = compare(("softmax",), **same)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ModelError, match="softmax-adamw-1 holds a run of 6 steps, beyond the 3"):
        compare(("softmax", "relu"), **{**same, "config": TINY.replace(steps=3)})
    assert {path: path.read_bytes() for path in kept} == kept
    assert list(longer.step) == [6] == list(compare(("relu",), **same).step)


def test_summary_decides_only_when_the_interval_does():
    runs = pd.DataFrame(
        {
            "attention": ["softmax"] * 3 + ["relu"] * 3 + ["gated"],
            "optimizer": "adamw",
            "sink": [0.9, 0.91, 0.92, 0.1, 0.3, 0.6, 0.8],
            "drain": [0.1, 0.11, 0.12, 1.0, 1.1, 1.2, 0.2],
        }
    )
    table = summarise(runs, {"sink": (">", 0.3), "drain": ("<", 0.5)})
    found = table.set_index(["attention", "phenomenon"]).present
    assert found["softmax", "sink"] == "yes" and found["softmax", "drain"] == "yes"
    assert found["relu", "sink"] == "unclear" and found["relu", "drain"] == "no"
    assert found["gated", "sink"] == "yes?"
    assert table.iloc[0]["mean"] == pytest.approx(0.91)
    assert table.iloc[0]["low"] == pytest.approx(0.91 - 4.303 * 0.01 / 3**0.5, abs=1e-4)


def test_a_model_without_attention_has_no_sink_and_no_drain():
    same = dict(seeds=(1, 2), device="cpu", progress=False)
    runs = compare(("softmax",), config=TINY.replace(no_attention=(0,)), **same)
    attention = ["sink", "sink_share", "gap", "spare", "drain"]
    assert runs[attention].isna().all(axis=None)
    assert (runs[["sink_layer", "drain_layer"]] == -1).all(axis=None)
    assert runs[["peak", "growth", "backcopy_excess"]].notna().all(axis=None)
    found = summarise(runs).set_index("phenomenon").present
    assert found["sink"] == found["drain"] == "unclear"
    partly = compare(("softmax",), config=TINY.replace(layers=2, no_attention=(0,)), **same)
    assert (partly[["sink_layer", "drain_layer"]] == 1).all(axis=None)
    assert partly[attention].notna().all(axis=None)


def classroom() -> pd.DataFrame:
    """The runs at classroom size that ship with the laboratory."""
    findings = pd.read_csv(DATA.joinpath("data", "findings.csv"))
    return findings[findings.study == "classroom"]


def test_the_readmes_table_is_that_of_the_shipped_findings():
    """Every cell, written out from the file; the verdicts have tests of their own."""
    names = {
        "ReLU": "relu", "softmax-off-by-one": "off-by-one", "learned sink logit": "learned-sink",
        "key bias, zero value": "key-bias", "gated output": "gated",
    }  # fmt: skip
    runs = classroom()
    verdicts = summarise(runs).set_index(["optimizer", "attention", "phenomenon"]).present
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in README.splitlines()
        if line.startswith(("| adamw |", "| sgd |", "| muon |"))
    ]
    assert len(rows) == len(runs.groupby(["optimizer", "attention"]))
    for optimizer, shown, seeds, *cells, backcopy, verdict in rows:
        attention = names.get(shown, shown)
        own = runs[(runs.optimizer == optimizer) & (runs.attention == attention)]
        assert int(seeds) == len(own)
        for cell, name in zip(cells, ["sink", "spare", "drain", "peak", "growth"], strict=True):
            mean, low, high = own[name].mean(), own[name].min(), own[name].max()
            ends = "" if name == "spare" else f" ({low:.2f}–{high:.2f})"
            assert cell == f"{abs(mean):.2f}{ends}", (shown, name)
        assert backcopy == f"{own.backcopy_excess.mean():.3f}"
        found = [verdicts[optimizer, attention, name] for name in LINES]
        assert verdict == " / ".join(found)


def test_the_readmes_sentences_are_those_of_the_shipped_findings():
    adamw = classroom().query("optimizer == 'adamw'").set_index("attention")
    peaks = adamw.loc["relu", "peak"]
    assert f"small models below (peaks {peaks.min():.1f} to {peaks.max():.1f})" in README
    gaps = adamw.loc[["off-by-one", "learned-sink"], "gap"]
    assert f"*its* logit by {gaps.min():.0f} to {gaps.max():.0f} over the other keys'" in README


def test_dynamics_reads_runs_from_memory_and_disk_alike(tmp_path):
    run = train(TINY, tmp_path, device="cpu", progress=False)
    memory, disk = dynamics(run), dynamics(tmp_path)
    pd.testing.assert_frame_equal(memory, disk)
    assert set(memory.metric) == {
        *("sink_attention", "logit_gap", "value_norm", "residual_norm"),
        *("backcopy_risk", "bigram_risk"),
    }
    assert list(memory.columns) == ["run", "seed", "step", "metric", "layer", "head", "value"]
    assert sorted(memory.step.unique()) == [0, 1, 2, 3, 5, 6]
    with pytest.raises(ModelError, match="holds no training run"):
        dynamics(tmp_path / "absent")
    with pytest.raises(ModelError, match="no runs to draw"):
        dynamics([])


def test_runs_of_one_kind_keep_apart_in_the_table(tmp_path):
    """Each run, looked up by its name and seed, is its own log and nothing else."""
    slow = TINY.replace(learning_rate=1e-4)
    configs = [TINY, slow, TINY.replace(seed=1), slow.replace(attention="relu"), slow]
    runs = [train(one, device="cpu", progress=False) for one in configs]
    train(slow, tmp_path, device="cpu", progress=False)
    table = dynamics([*runs, tmp_path], metrics=None)
    fast, slow_name = (f"1L softmax adamw, learning rate {rate}" for rate in (3e-4, 1e-4))
    numbered = [f"{slow_name}, run {number}" for number in (2, 3)]
    names = [(fast, 42), (slow_name, 42), (fast, 1), ("1L relu adamw", 42)]
    names += [(name, 42) for name in numbered]
    groups = dict(iter(table.groupby(["run", "seed"])))
    assert set(groups) == set(names)
    for name, run in zip(names, [*runs, runs[1]], strict=True):
        own = groups[name][run.to_frame().columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, run.to_frame())


def test_reinforcement_names_what_was_clamped():
    curves = reinforcement(TINY, clamps=("sink",), seeds=(1,), device="cpu", progress=False)
    assert set(curves.run) == {"1L softmax adamw", "1L softmax adamw, clamp sink"}
    clamped = curves[(curves.run.str.contains("clamp")) & (curves.metric == "sink_attention")]
    assert (clamped.value > 0.999).all()


def test_curves_can_be_drawn():
    from sinkscope.plot.training import training_curves

    run = train(TINY, device="cpu", progress=False)
    figure = training_curves(dynamics(run), about="a tiny run")
    assert len(figure.data) >= 6
    assert torch.is_tensor(run.model.head.weight)
