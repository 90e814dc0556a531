"""Activations on calibration texts, for interventions that need typical activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.capture import batches, paths, runner
from sinkscope.capture.batches import Batch
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.capabilities import capabilities
from sinkscope.models.probe import input_device
from sinkscope.models.rope import length_class
from sinkscope.prompts.texts import as_texts

_TOKENS_A_BATCH = 4096

Listener = Callable[[Tensor, Batch], None]


def run_through(model: Any, texts: Any, listeners: dict[str, Listener]) -> None:
    """Run texts through a model and pass every batch's activations to listeners.

    Args:
        model: A bridge.
        texts: Anything that a scan takes.
        listeners: For each hook name, a function of the activation and its batch.

    Raises:
        TextError: If a prompt lacks a position that an active intervention changes.
    """
    caps = capabilities(model)
    prompts = as_texts(texts).tokenize(model).right_padded()
    refuse_short_prompts(model, prompts.mask)
    order = batches.by_length(prompts.mask)
    classes = batches.classes(prompts.mask, length_class(model.original_model))
    size = max(1, _TOKENS_A_BATCH // prompts.tokens.shape[1])
    device = input_device(model)
    none = torch.zeros_like(prompts.mask)
    running: list[Batch] = []

    def hook(listen: Listener) -> Callable[..., None]:
        return lambda x, hook: listen(x, running[-1].on(x.device))

    hooks = [(name, hook(listen)) for name, listen in listeners.items()]
    with (
        torch.inference_mode(),
        runner.evaluating(model),
        paths.choose(model, caps, "auto").opened(),
        model.hooks(fwd_hooks=hooks),
    ):
        for rows in batches.together(order, classes, size):
            batch = batches.cut(
                prompts.tokens, prompts.mask, none, rows, causal=caps.causal, device=device
            )
            running[:] = [batch]
            runner.forward(model, batch)


def mean_at(
    model: Any, texts: Any, hook: str, positions: tuple[int, ...]
) -> Float[Tensor, "position dim"]:
    """Mean over prompts of an activation at each of some positions.

    Raises:
        TextError: If no prompt reaches one of the positions.
    """
    total: list[Tensor] = []
    count: list[Tensor] = []

    def listen(x: Tensor, batch: Batch) -> None:
        inside = [position for position in positions if position < x.shape[1]]
        sums = x.new_zeros(len(positions), x.shape[2], dtype=torch.float32)
        counts = x.new_zeros(len(positions), 1, dtype=torch.float32)
        real = batch.mask[:, inside, None]
        sums[: len(inside)] = torch.where(real, x[:, inside].float(), 0).sum(dim=0)
        counts[: len(inside)] = real.sum(dim=0)
        total.append(sums)
        count.append(counts)

    positions = tuple(sorted(positions))
    run_through(model, texts, {hook: listen})
    reached = torch.stack(count).sum(dim=0)
    for position, prompts in zip(positions, reached[:, 0].tolist(), strict=True):
        if prompts == 0:
            raise TextError(f"No calibration prompt reaches position {position}; give longer ones.")
    return torch.stack(total).sum(dim=0) / reached


def mean_output(
    model: Any, texts: Any, hooks: Iterable[str]
) -> dict[str, Float[Tensor, "head d_head"]]:
    """Mean of the heads' outputs over prompts and non-padding positions, by hook name."""
    total: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}

    def listener(name: str) -> Listener:
        def listen(z: Tensor, batch: Batch) -> None:
            real = batch.mask[:, :, None, None]
            sums = torch.where(real, z.float(), 0).sum(dim=(0, 1))
            total[name] = total.get(name, 0) + sums
            count[name] = count.get(name, 0) + batch.mask.sum()

        return listen

    run_through(model, texts, {name: listener(name) for name in hooks})
    return {name: total[name] / count[name] for name in total}


def outputs(
    model: Any, texts: Any, heads: dict[str, list[int]]
) -> dict[str, Float[Tensor, "prompt position head d_head"]]:
    """The outputs of some heads on every prompt, by hook name.

    Raises:
        TextError: If the prompts differ in length, on which the choice of a prompt must not depend.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in heads}

    def listener(name: str) -> Listener:
        def listen(z: Tensor, batch: Batch) -> None:
            if batch.ragged:
                raise TextError("Calibration prompts for resampling should be of equal length.")
            kept[name].append(z[:, :, heads[name]].clone())

        return listen

    run_through(model, texts, {name: listener(name) for name in heads})
    if len({z.shape[1] for z in next(iter(kept.values()))}) > 1:
        raise TextError("Calibration prompts for resampling should be of equal length.")
    return {name: torch.cat(zs) for name, zs in kept.items()}


def needs_calibration(mode: str, calibration: Any) -> Any:
    """Return the calibration texts of a mode that needs them.

    Raises:
        UnsupportedError: If there are none.
    """
    if calibration is None:
        raise UnsupportedError(f'mode="{mode}" needs typical activations; pass calibration=texts.')
    return calibration
