"""Which cure removes which phenomenon: operators x optimisers x seeds, one small run each.

Every run lives in a folder of its own, so an interrupted comparison goes on where it stopped and a
longer list of seeds re-uses what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from sinkscope.bb.config import TrainConfig
from sinkscope.bb.source import BigramSource
from sinkscope.bb.training import train
from sinkscope.statistics import mean_interval

if TYPE_CHECKING:
    import pandas as pd

# A phenomenon is there when its measure is past this line: direction, threshold.
LINES = {"sink": (">", 0.3), "drain": ("<", 0.5), "peak": (">", 1.5), "growth": (">", 1.1)}


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
    """Train every combination and read off the end of each run.

    Args:
        attentions: names from `sinkscope.bb.ATTENTIONS`.
        optimizers: names from `sinkscope.bb.OPTIMIZERS`.
        seeds: weights and data of each repetition.
        config: everything else; a three-layer classroom run when left out (peaks need depth).
        rates: learning rate per optimiser; `classroom_rates()` for classroom-sized models when
            `config` is left out, else the optimiser's usual one.
        folder: where runs are kept, one sub-folder each; None keeps nothing.
        source: the bigram source, as in `train`.
        device: as in `train`.
        progress: as in `train`.

    Returns:
        one row per run: attention, optimizer, seed and the entries of `headline`, all of them at
        the same step.

    Raises:
        ModelError: as in `train`, when `folder` holds other runs, or longer ones.
    """
    import pandas as pd

    if config is None:
        config, rates = TrainConfig.classroom().replace(layers=3), rates or classroom_rates()
    rows = []
    for attention in attentions:
        for optimizer in optimizers:
            rate = (rates or {}).get(optimizer)
            for seed in seeds:
                one = config.replace(
                    attention=attention, optimizer=optimizer, learning_rate=rate, seed=seed
                )
                place = Path(folder) / f"{attention}-{optimizer}-{seed}" if folder else None
                run = train(one, place, source=source, device=device, progress=progress)
                labels = {"attention": attention, "optimizer": optimizer, "seed": seed}
                rows.append({**labels, **headline(run.frame())})
    return pd.DataFrame(rows)


def classroom_rates() -> dict[str, float]:
    """Learning rates that suit models of classroom width."""
    return {"adamw": 3e-3, "sgd": 3e-2, "muon": 3e-3}


def headline(log: pd.DataFrame) -> dict[str, int | float]:
    """A run's end in a few numbers: medians over its last three measurements.

    A single measurement may fall into one of the loss spikes that AdamW has now and then.

    Returns:
        sink, sink_layer: the largest `sink_attention` of any head, and where it is; sink_share,
        gap, spare: that head's `sink_share`, `logit_gap` and `spare_attention`; drain,
        drain_layer: the smallest `value_drain` of any head; peak, peak_layer: the largest
        `residual_peak` of any layer; growth: ||h_0|| in that layer at the end over its value
        halfway (Adam's peaks keep growing, which tells them from a constant offset);
        backcopy_excess, bigram_excess [nat]; step. Without any attention nan stands for its
        figures, and -1 for their layers.
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
    """Means over seeds, 95 % intervals, and whether each phenomenon is there.

    The verdict is "yes" or "no" when the whole interval lies on one side of the line, else
    "unclear"; with one seed there is no interval and the verdict carries a question mark. What
    was not there to be measured (the sink of models without attention) is "unclear" too.

    Args:
        runs: what `compare` returned.
        lines: phenomenon -> (">" or "<", threshold); `LINES` when left out.

    Returns:
        one row per attention, optimizer and phenomenon: mean, low, high, seeds, present.
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
