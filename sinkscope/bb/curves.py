"""Curves over training, and experiments with clamped quantities.

`dynamics` gathers the reference's curves from one or several runs. `reinforcement` trains with one
of two coupled quantities clamped (see `clamping`) and records how the other develops.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.bb.config import CLAMPS, TrainConfig
from sinkscope.bb.run_folder import CHECKPOINT, RunFolder
from sinkscope.bb.source import BigramSource
from sinkscope.bb.training import MAY_CHANGE, Run, train
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd

CURVES = (
    *("sink_attention", "logit_gap", "value_norm", "residual_norm"),
    *("backcopy_risk", "bigram_risk"),
)
"""The reference's six curves (Guo et al. 2024), as metrics of a log."""


def dynamics(
    runs: Run | str | Path | Sequence[Run | str | Path], metrics: Sequence[str] | None = CURVES
) -> pd.DataFrame:
    """Collect the curves of runs in memory or on disk in one tidy frame.

    Args:
        runs: Runs, or folders that `train` wrote.
        metrics: The curves; None for everything measured.

    Returns:
        A frame with the columns run, seed, step, metric, layer, head and value, which
        `plot.training_curves` draws. No two runs share both name and seed, see `run_names`.

    Raises:
        ModelError: If there are no runs, or a folder holds none or a damaged one.
    """
    import pandas as pd

    several = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    if not several:
        raise ModelError("There are no runs to draw curves of; pass at least one, or its folder.")
    configs, logs = zip(*map(_read, several), strict=True)
    named = zip(run_names(configs), configs, logs, strict=True)
    frame = pd.concat(
        [log.assign(run=name, seed=config.seed) for name, config, log in named], ignore_index=True
    )
    if metrics is not None:
        frame = frame.loc[frame["metric"].isin(metrics)]
    columns = ["run", "seed", "step", "metric", "layer", "head", "value"]
    return frame.loc[:, columns].reset_index(drop=True)


def run_name(config: TrainConfig) -> str:
    """Return a run's name without its seed, such as "1L softmax adamw, clamp values"."""
    model = config.model
    clamped = f", clamp {'+'.join(config.clamp)}" if config.clamp else ""
    return f"{model.layers}L {model.attention} {config.optimizer}{clamped}"


def run_names(configs: Sequence[TrainConfig]) -> list[str]:
    """Return the `run_name` of each run, with the settings that distinguish equal names.

    Runs that differ in their seed alone share a name, such as "1L softmax adamw, learning rate
    0.003". Runs with equal settings and seeds (but different sources, for example) are numbered.
    """
    names = [run_name(config) for config in configs]
    settings = [_settings(config) for config in configs]
    found: list[str] = []
    times: Counter[tuple[str, int]] = Counter()
    for name, config, own in zip(names, configs, settings, strict=True):
        alike = [other for n, other in zip(names, settings, strict=True) if n == name]
        differing = [key for key in own if any(other[key] != own[key] for other in alike)]
        full = ", ".join([name, *(f"{key.replace('_', ' ')} {own[key]}" for key in differing)])
        times[full, config.seed] += 1
        again = times[full, config.seed]
        found.append(full if again == 1 else f"{full}, run {again}")
    return found


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run, without its seed, in one flat dictionary."""
    settings = asdict(config)
    settings |= settings.pop("model")
    return {key: value for key, value in settings.items() if key not in (*MAY_CHANGE, "seed")}


def reinforcement(
    config: TrainConfig | None = None,
    clamps: Sequence[str] = CLAMPS,
    seeds: Iterable[int] = (42, 43, 44),
    *,
    folder: str | Path | None = None,
    source: BigramSource | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    holds: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Train without and with each clamp, from the same weights on the same data.

    Args:
        config: The run; by default the classroom run.
        clamps: Quantities to clamp, one run each; see `sinkscope.bb.clamping`.
        seeds: Seeds, one repetition each.
        folder: Where runs are kept, one sub-folder each; None keeps nothing.
        source: The bigram source, as in `train`.
        device: As in `train`.
        progress: As in `train`.
        holds: The former name of `clamps`.

    Returns:
        All curves, as from `dynamics`; the name of a run states what was clamped.

    Raises:
        ModelError: As in `train`; if there is no such clamp.
    """
    if holds is not None:
        warnings.warn("`holds` is now called `clamps`.", DeprecationWarning, stacklevel=2)
        clamps = holds
    config = config if config is not None else TrainConfig.classroom()
    configs = [
        config.replace(clamp=clamp, seed=seed)
        for clamp in ((), *((name,) for name in clamps))
        for seed in seeds
    ]
    places = [_folder_of(folder, one) for one in configs]
    options = {"source": source, "device": device, "progress": progress}
    runs = [train(one, place, **options) for one, place in zip(configs, places, strict=True)]
    return dynamics(runs, metrics=None)


def _folder_of(folder: str | Path | None, config: TrainConfig) -> Path | None:
    if folder is None:
        return None
    name = f"{'-'.join(config.clamp) or 'none'}-{config.seed}"
    former = Path(folder) / f"hold-{name}"
    return former if former.exists() else Path(folder) / f"clamp-{name}"


def _read(run: Run | str | Path) -> tuple[TrainConfig, pd.DataFrame]:
    if isinstance(run, Run):
        return run.config, run.to_frame()
    record = RunFolder(run).read()
    if record is None:
        raise ModelError(f"{run} holds no training run (no {CHECKPOINT}); train one there first.")
    saved, log = record
    return saved.config, log.to_frame()
