"""Curves over training, and what drives them.

`dynamics` gathers the reference's curves from one or several runs. `reinforcement` trains with one
half of the loop held still (see `holds`) and shows what the other half then does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.bb.checkpoint import Log, load_checkpoint
from sinkscope.bb.config import TrainConfig
from sinkscope.bb.holds import HOLDS
from sinkscope.bb.training import CHECKPOINT, LOG, MAY_CHANGE, Run, train
from sinkscope.errors import ModelError

if TYPE_CHECKING:
    import pandas as pd

# The reference's six curves (Guo et al. 2024), by the names this log gives them.
CURVES = (
    *("sink_attention", "logit_gap", "value_norm", "residual_norm"),
    *("backcopy_risk", "bigram_risk"),
)


def dynamics(
    runs: Run | str | Path | Sequence[Run | str | Path], metrics: Sequence[str] | None = CURVES
) -> pd.DataFrame:
    """The curves of runs that are in memory or on disk, in one tidy frame.

    Args:
        runs: runs, or folders that `train` wrote.
        metrics: which curves; None for everything measured.

    Returns:
        run, seed, step, metric, layer, head, value: what `plot.training_curves` draws. No two runs
        share both name and seed, see `run_names`.

    Raises:
        ModelError: when there are no runs, or a folder holds none.
    """
    import pandas as pd

    several = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    if not several:
        raise ModelError("there are no runs to draw curves of; pass at least one, or its folder")
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
    """What tells a run from its neighbours, its seed left out: "1L softmax adamw, hold values"."""
    model = config.model
    held = f", hold {'+'.join(config.hold)}" if config.hold else ""
    return f"{model.layers}L {model.attention} {config.optimizer}{held}"


def run_names(configs: Sequence[TrainConfig]) -> list[str]:
    """`run_name` of each run, and in which settings it differs from others of that name.

    Runs that differ in their seed alone share a name: "1L softmax adamw, learning rate 0.003". A
    number tells apart those that do not even differ in that, but in their source, say.
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
    """What decides a run, its seed left out, in one flat dictionary."""
    settings = asdict(config)
    settings |= settings.pop("model")
    return {key: value for key, value in settings.items() if key not in (*MAY_CHANGE, "seed")}


def reinforcement(
    config: TrainConfig | None = None,
    holds: Sequence[str] = HOLDS,
    seeds: Iterable[int] = (42, 43, 44),
    *,
    folder: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train freely, and with each hold, from the same weights on the same data.

    Args:
        config: the run; the classroom's when left out.
        holds: see `sinkscope.bb.holds`.
        seeds: repetitions.
        folder: where runs are kept, one sub-folder each; None keeps nothing.
        device: as in `train`.
        progress: as in `train`.

    Returns:
        all curves, as `dynamics` gives them; the run's name says what was held.
    """
    config = config if config is not None else TrainConfig.classroom()
    runs = []
    for hold in ((), *((name,) for name in holds)):
        for seed in seeds:
            one = config.replace(hold=hold, seed=seed)
            place = Path(folder) / f"hold-{'-'.join(hold) or 'none'}-{seed}" if folder else None
            runs.append(train(one, place, device=device, progress=progress))
    return dynamics(runs, metrics=None)


def _read(run: Run | str | Path) -> tuple[TrainConfig, pd.DataFrame]:
    if isinstance(run, Run):
        return run.config, run.frame()
    folder = Path(run)
    if not (folder / CHECKPOINT).exists():
        raise ModelError(f"{folder} holds no training run (no {CHECKPOINT}): train one there first")
    metadata = load_checkpoint(folder / CHECKPOINT).metadata
    log = Log.read(folder / LOG, until=metadata["step"])
    return TrainConfig.from_dict(metadata["config"]), log.frame()
