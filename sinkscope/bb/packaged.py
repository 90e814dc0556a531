"""The trained models that come with sinkscope: "bb-3l", and three of one layer each."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.bb.bridge import to_bridge
from sinkscope.bb.checkpoint import Checkpoint, save_checkpoint
from sinkscope.bb.log import COLUMNS
from sinkscope.bb.task import BigramBackcopy
from sinkscope.bb.training import Run, load_model
from sinkscope.errors import ModelError
from sinkscope.output import write_file

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

    from sinkscope.prompts.tokens import Texts

PACKAGED = ("bb-3l", "bb-1l", "bb-1l-gated", "bb-1l-learned-sink")


def load_packaged(
    name: str = "bb-3l",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerBridge:
    """Load a model that ships inside sinkscope as a bridge, with its character tokenizer.

    Args:
        name: "bb-3l": three layers, one head each, trained on Bigram-Backcopy with the settings of
            Guo et al.; or "bb-1l", "bb-1l-gated" and "bb-1l-learned-sink": one layer and head of 64
            channels, 450 steps, that differ in their attention alone. `packaged_recipe` has the
            training settings of each.
        device: the device; by default the CPU.
        dtype: by default float32 (the file is float16).

    Returns:
        The bridge, in eval mode.

    Raises:
        ModelError: when there is no such model.
    """
    from sinkscope.models.provenance import ModelSource, attach_source

    path = packaged_file(name)
    model, task = load_model(path)
    bridge = to_bridge(model.to(device=device, dtype=dtype or torch.float32), name, task)
    attach_source(bridge, ModelSource(name, "packaged", weights=(path,)))
    return bridge.requires_grad_(False)


def packaged_task(name: str = "bb-3l") -> BigramBackcopy:
    """Return the task of a packaged model, from the tables stored with its weights."""
    return load_model(packaged_file(name))[1]


def packaged_recipe(name: str = "bb-3l") -> dict[str, Any]:
    """Return how a packaged model was trained (configuration, source, machine) and its log."""
    return json.loads(packaged_file(name).with_suffix(".json").read_text("utf-8"))


def packaged_file(name: str) -> Path:
    """Return the weights file of a packaged model."""
    if name not in PACKAGED:
        raise ModelError(
            f"There is no packaged toy model {name!r}; there are {', '.join(PACKAGED)}."
        )
    return Path(str(files("sinkscope.bb").joinpath("data", f"{name}.safetensors")))


def export(run: Run, folder: str | Path, name: str, **notes: str | float) -> Path:
    """Write a run as a packaged model: float16 weights, and its recipe and log beside them.

    Args:
        run: a finished run.
        folder: the output folder.
        name: the model's name.
        notes: further entries of the recipe (machine, seconds, ...).

    Returns:
        the weights file.
    """
    path = Path(folder) / f"{name}.safetensors"
    state = Checkpoint(
        {key: value.half() for key, value in run.model.state_dict().items()},
        {},
        run.task.source,
        run.config,
        run.config.steps,
    )
    save_checkpoint(path, state)
    recipe = {
        "name": name,
        "config": asdict(run.config),
        "source": run.task.source.name,
        "triggers": [run.task.source.symbols[t] for t in run.task.triggers]
        if run.task.source.symbols
        else run.task.triggers,
        **notes,
        "log_columns": COLUMNS,
    }
    head = json.dumps(recipe, indent=1, ensure_ascii=False)[:-2]
    rows = (json.dumps([_short(row[c]) for c in COLUMNS]) for row in run.log.rows)
    text = head + ',\n "log": [\n' + ",\n".join(rows) + "\n ]\n}\n"
    write_file(path.with_suffix(".json"), text)
    return path


def _short(value: str | int | float) -> str | int | float:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def task_texts(
    prompts: int = 16, length: int = 256, seed: int = 0, task: BigramBackcopy | None = None
) -> Texts:
    """Draw sequences of a Bigram-Backcopy task as prompts for `scan`.

    Args:
        prompts: Number of prompts.
        length: Tokens of each, BOS included.
        seed: Seed of the draws.
        task: By default the task of the packaged model.

    Returns:
        Exact token ids, each prompt beginning with BOS.
    """
    from sinkscope.prompts.tokens import Texts

    task = task if task is not None else packaged_task()
    tokens = task.sample(prompts, length, seed)
    names = [*(task.source.symbols or map(str, range(task.symbols))), "<s>", "<d>"]
    return Texts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        bos=f"auto ({' '.join(['<s>'] * task.bos) or 'none'})",
        source="bigram-backcopy",
        strings=[[names[i] for i in row] for row in tokens.tolist()],
        seed=seed,
    )
