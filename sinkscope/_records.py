"""What stands out in a report, as plain records: heads, massive activations, non-mixture dims."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sinkscope._bootstrap import mean_over_prompts
from sinkscope.errors import ReportError

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

_BESIDE = ("honor", "attention_entropy", "sink_logit_gap")
_PER_HEAD = ("prompt", "layer", "head")


def top_heads(report: SinkReport, n: int, by: str) -> list[dict[str, Any]]:
    """See `SinkReport.top_heads`."""
    mean, low, high = (end.cpu() for end in report.interval(by))
    if report.variables()[by].dims != _PER_HEAD:
        raise ReportError(
            f"Heads are ranked by a field with the dimensions {' '.join(_PER_HEAD)}, and {by} has "
            f"{' '.join(report.variables()[by].dims)}."
        )
    beside = {name: report.mean(name).cpu() for name in _BESIDE if name in report.measured()}
    drain = None if report.value_drain is None else report.mean("value_drain").cpu()
    heads = mean.shape[1]
    records = []
    for index in mean.flatten().nan_to_num(-torch.inf).argsort(descending=True)[:n].tolist():
        layer, head = divmod(index, heads)
        record = {"layer": layer, "head": head, by: float(mean[layer, head])}
        record |= {"low": float(low[layer, head]), "high": float(high[layer, head])}
        record |= {name: float(means[layer, head]) for name, means in beside.items() if name != by}
        if drain is not None:
            kv_head = head * drain.shape[1] // heads  # query heads share a kv_head in order
            record["value_drain"] = float(drain[layer, kv_head])
        records.append(record)
    return records


def massive_activations(report: SinkReport) -> list[dict[str, Any]]:
    """See `SinkReport.massive_activations`."""
    if report.massive is None:
        raise ReportError(report._not_measured("massive"))
    names = report.massive.measured("entry")
    columns = [report.massive[name].tolist() for name in names]
    return [dict(zip(names, entry, strict=True)) for entry in zip(*columns, strict=True)]


def nonmixture_dims(
    report: SinkReport, over_median: float, over_mixed: float, share: float
) -> list[dict[str, Any]]:
    """See `SinkReport.nonmixture_dims`."""
    from sinkscope.metrics.ffn import nonmixture_dims as stands_out

    x, mixed = report["ffn_sink"], report["ffn_mixed_max"]
    median = report["ffn_sink_median"]
    shares = stands_out(x, mixed, median, over_median, over_mixed).float().mean(0)
    means = {
        "value": mean_over_prompts(x),
        "over_median": mean_over_prompts(x.abs() / median[..., None]),
        "over_mixed": mean_over_prompts(x.abs() / mixed),
        "share": shares,
    }
    found = (shares >= share) & (shares > 0)
    layers, dims = (index.tolist() for index in found.nonzero(as_tuple=True))
    columns = {name: figures[found].tolist() for name, figures in means.items()}
    records = [
        {"layer": layer, "dim": dim} | {name: column[row] for name, column in columns.items()}
        for row, (layer, dim) in enumerate(zip(layers, dims, strict=True))
    ]
    return sorted(records, key=lambda record: -abs(record["value"]))
