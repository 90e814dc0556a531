"""Interventions on a trained toy model that show which part is responsible for which risk.

Guo et al. (2024, section 2). With a head set to zero only the risk on trigger queries should rise,
which is what *active-dormant* means; with the feed-forward network set to zero the bigram is lost;
the pattern of the theory (all attention on BOS where the head is dormant, on the previous token
where it is active) should change neither risk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.bb.measurement import measure
from sinkscope.bb.model import BackcopyTransformer, Tap, no_tap
from sinkscope.bb.task import BigramBackcopy

if TYPE_CHECKING:
    import pandas as pd


def knockouts(
    model: BackcopyTransformer, task: BigramBackcopy, tokens: Int[Tensor, "prompt position"]
) -> pd.DataFrame:
    """Measure both risks of the unchanged model and under every intervention.

    Args:
        model: A toy model.
        task: The task that the tokens were drawn from.
        tokens: Sequences that begin with BOS.

    Returns:
        One row per intervention: intervention, layer, head (-1: none), backcopy_risk, bigram_risk,
        backcopy_excess, bigram_excess [nat].
    """
    import pandas as pd

    is_trigger = task.is_trigger.to(tokens.device)[tokens]
    taps: list[tuple[str, int, int, Tap]] = [("none", -1, -1, no_tap)]
    for layer, block in enumerate(model.layers):
        if block.attn is not None:
            for head in range(model.config.heads):
                patterns = {
                    "zero attention": torch.zeros_like,
                    "all on BOS": on_sink,
                    "clean pattern": lambda pattern: clean(pattern, is_trigger),
                }
                taps += [
                    (name, layer, head, _edit_pattern(layer, head, edit))
                    for name, edit in patterns.items()
                ]
        if block.mlp is not None:
            taps.append(("zero feed-forward", layer, -1, _zero_output(layer)))
    rows = []
    for name, layer, head, tap in taps:
        phenomena = measure(model, task, tokens, tap)
        risks = {
            key: getattr(phenomena, key)
            for key in ("backcopy_risk", "bigram_risk", "backcopy_excess", "bigram_excess")
        }
        rows.append({"intervention": name, "layer": layer, "head": head, **risks})
    return pd.DataFrame(rows)


def on_sink(pattern: Float[Tensor, "*row query key"]) -> Float[Tensor, "*row query key"]:
    """Return the pattern with all attention on position 0."""
    forced = torch.zeros_like(pattern)
    forced[..., 0] = 1.0
    return forced


def clean(
    pattern: Float[Tensor, "prompt query key"], is_trigger: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt query key"]:
    """Return the theoretical pattern: triggers attend to the previous token, others to BOS."""
    length = pattern.shape[-1]
    previous = torch.eye(length, device=pattern.device, dtype=pattern.dtype).roll(-1, dims=1)
    return torch.where(is_trigger[..., None], previous, on_sink(pattern))


def _edit_pattern(layer: int, head: int, edit: Callable[[Tensor], Tensor]) -> Tap:
    def tap(name: str, value: Tensor) -> Tensor:
        if name != f"blocks.{layer}.attn.hook_pattern":
            return value
        value = value.clone()
        value[:, head] = edit(value[:, head])
        return value

    return tap


def _zero_output(layer: int) -> Tap:
    def tap(name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if name == f"blocks.{layer}.hook_mlp_out" else value

    return tap
