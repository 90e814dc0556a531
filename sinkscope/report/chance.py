"""p-values and chance levels for reports with nulls: does a value exceed what chance gives?

The nulls are described in `sinkscope.capture.nulls`. A head is compared with the largest value over
all heads in each draw, a layer's residual peak with the largest over all layers, which corrects for
their number (`statistics.chance`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkscope.report.fields import SinkFields
from sinkscope.statistics import chance, mean_over_prompts

NULLS = {
    "initial": "the model at initialisation",
    "random": "another position at random",
    "shuffled": "keys shuffled within a prompt",
}
"""Description of each null by name."""
QUANTITIES = ("sink_attention", "residual_peak")
"""The fields for which nulls are drawn."""
DERIVED = tuple(f"p_{null}" for null in NULLS)
"""The fields computed from others."""
WITH_NULLS = (
    *(f"{null}_{one}" for one in QUANTITIES for null in NULLS),
    *DERIVED,
    "sink_is_largest",
)
"""The fields that a scan measures only with nulls."""
ALPHA = 0.05


def null_of(report: SinkFields, quantity: str, null: str) -> Tensor | None:
    """Mean over prompts of a quantity in each draw of a null [draw layer ...], or None."""
    drawn = getattr(report, f"{null}_{quantity}", None)
    return None if drawn is None else mean_over_prompts(drawn).movedim(-1, 0)


def p_values(report: SinkFields, quantity: str = "sink_attention") -> dict[str, Tensor]:
    """p-values of every head (or layer) against each available null of a quantity.

    Args:
        report: Result of a scan.
        quantity: One of `QUANTITIES`.
    """
    observed = getattr(report, quantity)
    if observed is None:
        return {}
    mean, found = mean_over_prompts(observed), {}
    for null in NULLS:
        drawn = null_of(report, quantity, null)
        if drawn is not None:
            found[null] = chance(mean, drawn).to(mean.dtype).to(mean.device)
    return found


def derived(report: SinkFields) -> dict[str, Tensor]:
    """The fields in `DERIVED` whose nulls were drawn."""
    return {f"p_{null}": p for null, p in p_values(report).items()}


def chance_levels(report: SinkFields, quantity: str = "sink_attention") -> list[dict[str, Any]]:
    """Chance level of a quantity under each null, and the number of significant heads or layers.

    Returns:
        Records of null, draws, low, median and high (quantiles 0.025, 0.5 and 0.975, over draws, of
        the largest value over heads or layers), tested (number of heads or layers) and significant
        (number of these with p at most 0.05).
    """
    records = []
    for null, p in p_values(report, quantity).items():
        drawn = null_of(report, quantity, null)
        if drawn is None or bool(drawn.isnan().all()):
            continue
        largest = drawn.double().cpu().flatten(1).nan_to_num(-torch.inf).amax(1)
        ends = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
        low, median, high = largest[largest.isfinite()].quantile(ends).tolist()
        records.append(
            {
                "null": null,
                "draws": len(largest),
                "low": low,
                "median": median,
                "high": high,
                "tested": int(p.isfinite().sum()),
                "significant": int((p <= ALPHA).sum()),
            }
        )
    return records
