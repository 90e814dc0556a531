"""Key numbers of a report, one row in a table of many reports."""

from __future__ import annotations

from typing import Any

import torch

from sinkscope.report.headline import median_drain, peak_block
from sinkscope.report.quantities import SinkQuantities

KEY_NUMBERS = {
    "sink_rate": ("share", "share of (prompt, layer, head) whose importance exceeds ε"),
    "sink_attention": ("probability", "sink attention, mean over heads and prompts"),
    "sink_head_share": ("share", "share of heads whose mean sink attention exceeds ε"),
    "strongest": ("probability", "sink attention of the strongest head"),
    "strongest_layer": (None, "layer of the strongest head"),
    "strongest_head": (None, "the strongest head in that layer"),
    "residual_peak": ("ratio", "largest residual peak over the layers, mean over prompts"),
    "peak_block": (None, "first block after which the residual peak is 4/5 of its largest value"),
    "value_drain": ("ratio", "median over KV heads of the value drain"),
    "massive_dims": (None, "residual channels with massive activations, largest first"),
    "learned_sink_mass": ("probability", "attention that learned sink logits take, mean"),
}
"""Unit (None for no unit) and meaning of each key number."""

_DIMS = 5  # massive dims listed


def key_numbers(report: SinkQuantities) -> dict[str, Any]:
    """The key numbers of a report.

    Args:
        report: Result of a scan.

    Returns:
        A value for each name in `KEY_NUMBERS`; None if it was not measured or is not defined.
    """
    numbers: dict[str, Any] = dict.fromkeys(KEY_NUMBERS)
    if _known(report, "sink_importance"):
        numbers["sink_rate"] = report.sink_rate_at(report.settings.epsilon)
    if _known(report, "sink_attention"):
        mean = report.mean("sink_attention").double()
        defined = mean.isfinite()
        top = int(mean.nan_to_num(-torch.inf).argmax())
        layer, head = divmod(top, mean.shape[1])
        numbers |= {
            "sink_attention": float(mean.nanmean()),
            "sink_head_share": float(report.sink_heads().sum() / defined.sum()),
            "strongest": float(mean[layer, head]),
            "strongest_layer": layer,
            "strongest_head": head,
        }
    if _known(report, "residual_peak"):
        peak = report.mean("residual_peak").nan_to_num(-torch.inf)
        numbers["residual_peak"] = float(peak.max())
        numbers["peak_block"] = peak_block(report)
    numbers["value_drain"] = median_drain(report)
    if report.massive is not None:
        numbers["massive_dims"] = _massive_dims(report)
    if _known(report, "learned_sink_mass"):
        numbers["learned_sink_mass"] = float(report.mean("learned_sink_mass").nanmean())
    return numbers


def _known(report: SinkQuantities, name: str) -> bool:
    figures = getattr(report, name)
    return figures is not None and not bool(figures.isnan().all())


def _massive_dims(report: SinkQuantities) -> str:
    """Channel indices of massive activations, largest first, separated by commas."""
    largest: dict[int, float] = {}
    for entry in report.massive_activations():
        dim = entry["dim"]
        largest[dim] = max(largest.get(dim, 0.0), abs(entry["value"]))
    ranked = sorted(largest, key=lambda dim: -largest[dim])
    more = f", {len(ranked) - _DIMS} more" if len(ranked) > _DIMS else ""
    return ", ".join(map(str, ranked[:_DIMS])) + more
