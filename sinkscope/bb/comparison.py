"""Which mitigation removes which phenomenon: attention x optimiser x seed, one small run each.

`compare` trains and tabulates the runs, `summarise` decides which phenomena are present. Every run
has its own folder, so an interrupted comparison resumes and a longer list of seeds reuses existing
runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from sinkscope.bb.config import TrainConfig
from sinkscope.bb.run_folder import exclusive
from sinkscope.bb.source import BigramSource
from sinkscope.bb.task import BigramBackcopy
from sinkscope.bb.training import train
from sinkscope.devices import chosen_device
from sinkscope.errors import ModelError
from sinkscope.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd

LINES = {"sink": (">", 0.3), "drain": ("<", 0.5), "peak": (">", 1.5), "growth": (">", 1.1)}
"""Direction and threshold beyond which a phenomenon is present."""


def compare(
    attentions: Sequence[str] = ("softmax", "relu"),
    optimizers: Sequence[str] = ("adamw",),
    seeds: Iterable[int] = (42, 43, 44),
    *,
    config: TrainConfig | None = None,
    rates: dict[str, float] | None = None,
    folder: str | Path | None = None,
    source: BigramSource | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train every combination and describe the end of each run.

    Args:
        attentions: Names from `sinkscope.bb.ATTENTIONS`.
        optimizers: Names from `sinkscope.bb.OPTIMIZERS`.
        seeds: Weights and data of each repetition.
        config: Everything else; by default a three-layer classroom run (peaks need depth).
        rates: Learning rate per optimiser; by default `classroom_rates()` for classroom-sized
            models when `config` is left out, else the optimiser's default.
        folder: Folder for the runs, one sub-folder each; None saves nothing.
        source: The bigram source, as in `train`.
        device: As in `train`.
        progress: As in `train`.

    Returns:
        One row per run: attention, optimizer, seed and the entries of `headline`, all of them at
        the same step.

    Raises:
        ModelError: Before any training, if an attention, an optimiser or a setting is unknown or
            none is named; as in `train`, if `folder` holds other runs, or longer ones, or if
            another process trains there.
        ReportError: If a file cannot be written.
    """
    import pandas as pd

    if config is None:
        config, rates = TrainConfig.classroom().replace(layers=3), rates or classroom_rates()
    configs = [
        config.replace(
            attention=attention,
            optimizer=optimizer,
            learning_rate=(rates or {}).get(optimizer),
            seed=seed,
        )
        for attention, optimizer, seed in product(attentions, optimizers, tuple(seeds))
    ]
    if not configs:
        raise ModelError("There is nothing to compare; name an attention, an optimiser and a seed.")
    BigramBackcopy(source, config.triggers, config.bos)  # raises errors before training
    device = chosen_device(device)
    rows = []
    with exclusive(folder) if folder is not None else nullcontext():
        for one in configs:
            labels = {"attention": one.model.attention, "optimizer": one.optimizer}
            labels["seed"] = one.seed
            place = Path(folder, "-".join(map(str, labels.values()))) if folder else None
            run = train(one, place, source=source, device=device, progress=progress)
            rows.append({**labels, **headline(run.to_frame())})
    return pd.DataFrame(rows)


def classroom_rates() -> dict[str, float]:
    """Learning rates for models of classroom width."""
    return {"adamw": 3e-3, "sgd": 3e-2, "muon": 3e-3}


def headline(log: pd.DataFrame) -> dict[str, int | float]:
    """Summarise the end of a run: medians over its last three measurements.

    A single measurement may coincide with one of AdamW's occasional loss spikes.

    Returns:
        sink, sink_layer: the largest `sink_attention` of any head, and its layer; sink_share,
        gap, spare: the `sink_share`, `logit_gap` and off-sequence mass (`spare_attention`) of that
        head; drain, drain_layer: the smallest `value_drain` of any head; peak, peak_layer: the
        largest `residual_peak` of any layer; growth: ||h_0|| in that layer at the end divided by
        its value halfway (Adam's peaks keep growing, which distinguishes them from a constant
        offset); backcopy_excess, bigram_excess [nat]; step. Without any attention its values are
        nan, and their layers -1.
    """
    steps = np.sort(log["step"].unique())
    end = int(steps[-1])
    halfway = steps[np.abs(steps - end / 2).argmin()]
    place = ["metric", "layer", "head"]
    now = log[log["step"].isin(steps[-3:])].groupby(place)["value"].median()
    before = log[log["step"] == halfway].set_index(place)["value"]
    sink = now["sink_attention"].fillna(-np.inf).idxmax()
    drain, peak = now["value_drain"].fillna(np.inf).idxmin(), now["residual_peak"].idxmax()
    attends = bool(now["sink_attention"].notna().any())
    return {
        "step": end,
        "sink": float(now["sink_attention"][sink]),
        "sink_layer": int(sink[0]) if attends else -1,
        "sink_share": float(now["sink_share"][sink]),
        "gap": float(now["logit_gap"][sink]),
        "spare": float(now["spare_attention"][sink]),
        "drain": float(now["value_drain"][drain]),
        "drain_layer": int(drain[0]) if attends else -1,
        "peak": float(now["residual_peak"][peak]),
        "peak_layer": int(peak[0]),
        "growth": float(now["residual_norm"][peak] / before["residual_norm"][peak]),
        "backcopy_excess": float(now["backcopy_excess"].iloc[0]),
        "bigram_excess": float(now["bigram_excess"].iloc[0]),
    }


def summarise(
    runs: pd.DataFrame, lines: dict[str, tuple[str, float]] | None = None
) -> pd.DataFrame:
    """Means over seeds, 95 % t intervals, and whether each phenomenon is present.

    The verdict is "yes" or "no" if the whole interval lies on one side of the threshold, otherwise
    "unclear"; with one seed there is no interval and the verdict has a question mark. Unmeasured
    phenomena (the sink of models without attention) are "unclear" too.

    Args:
        runs: The result of `compare`.
        lines: Phenomenon -> (">" or "<", threshold); by default `LINES`.

    Returns:
        One row per attention, optimizer and phenomenon: mean, low, high, seeds, present.
    """
    import pandas as pd

    rows = []
    for pair, group in runs.groupby(["attention", "optimizer"], sort=False):
        attention, optimizer = cast("tuple[str, str]", pair)
        for phenomenon, (side, line) in (lines or LINES).items():
            values = group[phenomenon].to_numpy()
            mean, low, high = mean_interval(values)
            rows.append(
                {
                    "attention": attention,
                    "optimizer": optimizer,
                    "phenomenon": phenomenon,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "seeds": len(values),
                    "present": _verdict(mean, low, high, side, line),
                }
            )
    return pd.DataFrame(rows)


def _verdict(mean: float, low: float, high: float, side: str, line: float) -> str:
    past = (mean > line) if side == ">" else (mean < line)
    if mean != mean:
        return "unclear"
    if low != low:  # NaN: a single seed
        return "yes?" if past else "no?"
    if low <= line <= high:
        return "unclear"
    return "yes" if past else "no"
