"""p-values and chance levels for reports with nulls: does a value exceed what chance gives?

The nulls are described in `sinkscope.capture.nulls`. A head is compared with the largest value over
all heads in each draw, a layer's residual peak with the largest over all layers, which corrects for
their number (`statistics.chance`). A drain is the smaller the stronger, so that a KV head's is
compared with the smallest.
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
QUANTITIES = ("sink_attention", "residual_peak", "value_drain")
"""The fields for which nulls are drawn."""
SMALL = frozenset({"value_drain"})
"""Those that are small where there is a sink."""
UNTESTED = frozenset({("residual_peak", "random")})
"""Nulls that give a level and no p-value: under a causal mask position 0 attends only to itself, so
that its norm differs from those of other positions before any training."""
_P_OF = {
    **{f"p_{null}": ("sink_attention", null) for null in NULLS},
    **{f"p_{null}_value_drain": ("value_drain", null) for null in ("initial", "random")},
}
"""The quantity and null of each field of p-values."""
DERIVED = tuple(_P_OF)
"""The fields computed from others."""
WITH_NULLS = (*(f"{null}_{one}" for one in QUANTITIES for null in NULLS), *DERIVED)
"""The fields that a scan measures only with nulls."""
ALPHA = 0.05


def null_of(report: SinkFields, quantity: str, null: str) -> Tensor | None:
    """Mean over prompts of a quantity in each draw of a null [draw layer ...], or None."""
    drawn = getattr(report, f"{null}_{quantity}", None)
    return None if drawn is None else mean_over_prompts(drawn).movedim(-1, 0)


def p_values(report: SinkFields, quantity: str = "sink_attention") -> dict[str, Tensor]:
    """p-values of every head (layer, KV head) against each available null of a quantity.

    nan for the nulls in `UNTESTED`.

    Args:
        report: Result of a scan.
        quantity: One of `QUANTITIES`.
    """
    observed = getattr(report, quantity)
    if observed is None:
        return {}
    mean, p_of_nulls = mean_over_prompts(observed), {}
    sign = _sign(quantity)
    for null in NULLS:
        drawn = null_of(report, quantity, null)
        if drawn is not None and (quantity, null) in UNTESTED:
            p_of_nulls[null] = torch.full_like(mean, torch.nan)
        elif drawn is not None:
            p_of_nulls[null] = chance(sign * mean, sign * drawn).to(mean.dtype).to(mean.device)
    return p_of_nulls


def _sign(quantity: str) -> int:
    """1 where a sink makes a quantity large, -1 where it makes it small."""
    return -1 if quantity in SMALL else 1


def derived(report: SinkFields) -> dict[str, Tensor]:
    """The fields in `DERIVED` whose nulls were drawn."""
    p = {quantity: p_values(report, quantity) for quantity, _ in _P_OF.values()}
    return {
        name: p[quantity][null] for name, (quantity, null) in _P_OF.items() if null in p[quantity]
    }


def chance_levels(report: SinkFields, quantity: str = "sink_attention") -> list[dict[str, Any]]:
    """Chance level of a quantity under each null, and the number of significant heads or layers.

    Returns:
        Records of null, draws, low, median and high (quantiles 0.025, 0.5 and 0.975, over draws, of
        the largest value over heads or layers, the smallest of a drain), tested (number of heads or
        layers, 0 for a null in `UNTESTED`) and significant (number of these with p at most 0.05).
    """
    records, sign = [], _sign(quantity)
    for null, p in p_values(report, quantity).items():
        drawn = null_of(report, quantity, null)
        if drawn is None or bool(drawn.isnan().all()):
            continue
        extreme = sign * (sign * drawn.double().cpu().flatten(1)).nan_to_num(-torch.inf).amax(1)
        ends = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
        low, median, high = extreme[extreme.isfinite()].quantile(ends).tolist()
        records.append(
            {
                "null": null,
                "draws": len(extreme),
                "low": low,
                "median": median,
                "high": high,
                "tested": int(p.isfinite().sum()),
                "significant": int((p <= ALPHA).sum()),
            }
        )
    return records
