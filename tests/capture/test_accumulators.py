"""Every prompt is kept in the order of the text, and no more of it than the field holds."""

from __future__ import annotations

import weakref

import numpy as np
import torch

from sinkscope.capture.accumulators import PerPrompt

ORDER = torch.tensor([4, 0, 2, 3, 1])


def filled(sizes=(2, 1, 2), positions=False) -> tuple[PerPrompt, list[torch.Tensor], np.ndarray]:
    """An accumulator with some batches, the batches, and the field that they make."""
    kept = PerPrompt(positions=positions)
    lengths = [6, 4, 3][: len(sizes)] if positions else [6] * len(sizes)
    expected = np.full((sum(sizes), 3, 6), np.nan, dtype=np.float32)
    batches, rows = [], iter(ORDER.tolist())
    for number, (prompts, length) in enumerate(zip(sizes, lengths, strict=True)):
        batch = torch.arange(3.0 * prompts * length).reshape(3, prompts, length) + 100 * number
        mask = torch.ones(prompts, length, dtype=torch.bool)
        mask[-1, -1] = False
        kept.update(batch, mask)
        batches.append(batch)
        for prompt in range(prompts):
            real = length - (positions and prompt == prompts - 1)
            expected[next(rows), :, :real] = batch[:, prompt, :real].numpy()
    return kept, batches, expected


def test_prompts_come_in_the_order_of_the_text() -> None:
    for positions in (False, True):
        kept, _, expected = filled(positions=positions)
        np.testing.assert_array_equal(kept.compute(ORDER).numpy(), expected)


def test_batches_are_let_go_of_while_the_field_is_made() -> None:
    """All fields of a report follow one another: each would be there twice."""
    kept, batches, _ = filled()
    held = [weakref.ref(batch) for batch in kept._batches]
    del batches
    field = kept.compute(ORDER)
    assert not any(one() is not None for one in held)
    assert field.untyped_storage().nbytes() == field.nbytes


def test_a_column_of_a_larger_tensor_does_not_keep_the_tensor() -> None:
    kept = PerPrompt()
    wide = torch.rand(3, 2, 4, 9)
    kept.update(wide[..., 0], torch.ones(2, 4, dtype=torch.bool))
    held = kept._batches[0]
    assert held.untyped_storage().nbytes() == held.nbytes < wide.nbytes
    assert torch.equal(held, wide[..., 0].transpose(0, 1))
