"""What a checkpoint may be, its training step, and the texts that it is usually looked at on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sinkscope.errors import ModelError, TextError
from sinkscope.packaged import BUILT_IN, PACKAGES
from sinkscope.texts import texts as make_texts


def by_step(checkpoints: Mapping[int, Any] | Iterable[Any]) -> dict[int, Any]:
    """Checkpoints by training step, rising.

    Raises:
        ModelError: If a step cannot be told, or two checkpoints have the same.
    """
    if isinstance(checkpoints, Mapping):
        found = list(checkpoints.items())
    else:
        found = [(_step_of(checkpoint), checkpoint) for checkpoint in checkpoints]
    steps = [step for step, _ in found]
    if not steps or len(set(steps)) < len(steps):
        raise ModelError(
            f"Checkpoints have the steps {steps}; name at least one, and no step twice."
        )
    return dict(sorted(found))


def _step_of(checkpoint: Any) -> int:
    if isinstance(checkpoint, int):
        return checkpoint
    name = Path(checkpoint).name if isinstance(checkpoint, str | Path) else ""
    packaged = name in PACKAGES or name in BUILT_IN  # their numbers are sizes
    numbers = [] if packaged else re.findall(r"\d+", name)
    if not numbers:
        raise ModelError(
            f"The training step of checkpoint {checkpoint!r} cannot be told from its name; pass a "
            "mapping such as {500: checkpoint}."
        )
    return int(numbers[-1])


def is_snapshot(checkpoint: Any) -> bool:
    """Whether this is a snapshot of the Bigram-Backcopy laboratory."""
    return isinstance(checkpoint, str | Path) and Path(checkpoint).suffix == ".safetensors"


def usual_texts(
    checkpoint: Any,
    *,
    prompts: int = 16,
    length: int | None = None,
    bos: str = "auto",
    seed: int = 0,
) -> Any:
    """What a model is looked at on when nobody says: prose, or the task that a snapshot learnt.

    Args:
        checkpoint: The first one.
        prompts: How many.
        length: Tokens of each; by default 256 of prose, and of a task the snapshot's context.
        bos: For prose; a task begins as it was learnt.
        seed: Where prose is cut, and what a task is drawn with.

    Raises:
        TextError: If a task is to begin otherwise, or to be longer than the snapshot's context.
    """
    if not is_snapshot(checkpoint):
        return make_texts("prose", prompts=prompts, length=length or 256, bos=bos, seed=seed)
    from sinkscope import bb

    model, task = bb.load_model(checkpoint)
    context = model.config.context
    if bos != "auto":
        raise TextError(
            "A laboratory snapshot is looked at on the task that it learnt, which has a BOS policy "
            f"of its own; leave out {bos!r}, or name texts."
        )
    if length is not None and not 1 < length <= context:
        raise TextError(
            f"Prompts of {length} tokens do not fit {Path(checkpoint).name}, whose context is "
            f"{context}; give 2 to {context}."
        )
    return bb.task_texts(prompts, length or context, seed, task)


def laboratory_model(file: Path, device: Any = "cpu", **options: Any) -> Any:
    """A snapshot that `sinkscope.bb.train` left, as a bridge.

    Raises:
        ModelError: If anything but a device is asked of it.
    """
    from sinkscope import bb

    if options:
        raise ModelError(f"{file.name} is a laboratory's; of the options it takes device alone.")
    model, task = bb.load_model(file)
    return bb.to_bridge(model.to(device), name=file.stem, task=task)
