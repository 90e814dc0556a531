"""The sentences of a report's summary, one function each; None where there is nothing to say."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from sinkscope._bootstrap import bootstrap

if TYPE_CHECKING:
    from sinkscope.report import SinkReport

# From this ratio on a residual state is called a peak, and the layer where the mean over prompts
# first passes it is said to write the peak. Published sinks lie between 10 and 1000.
PEAK = 10.0

_SHOWN = 5  # dims, tokens, layers named in one sentence


def plain(text: str) -> str:
    """The text with whatever could upset a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float) -> str:
    """Three significant digits, thousands apart: 0.0123, 1.23, 12,300."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:.3g}" if abs(rounded) < 1000 else f"{rounded:,.0f}"


def model(report: SinkReport) -> str:
    """Architecture and sizes."""
    s = report.settings
    heads = f"{s.n_layers} layers × {s.n_heads} heads"
    shared = f" ({s.n_kv_heads} KV heads)" if s.n_kv_heads != s.n_heads else ""
    under = f", under {plain(' and '.join(s.interventions))}" if s.interventions else ""
    return f"{plain(s.architecture)}, {heads}{shared}, {s.dtype}{under}"


def text(report: SinkReport) -> str:
    """Where the tokens came from, how many, and the BOS policy."""
    lengths = report.mask.sum(1)
    low, high = int(lengths.min()), int(lengths.max())
    length = str(high) if low == high else f"{low} to {high}"
    prompts = "1 prompt" if len(lengths) == 1 else f"{len(lengths)} prompts"
    source = plain(report.settings.source)
    return f"{source}, {prompts} of {length} tokens, BOS {plain(report.settings.bos)}"


def sinks(report: SinkReport) -> str:
    """Which positions, which tokens, and how much attention they get beside uniform attention."""
    parts = [f"{_positions(report)}{_sink_tokens(report)}"]
    if report.sink_attention is not None and not report.sink_attention.isnan().all():
        per_prompt = report.sink_attention.float().nanmean((1, 2))
        mean, low, high = (float(end) for end in bootstrap(per_prompt))
        interval = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        without = int((~report.sink_mask).all(1).sum())
        over = f" over the {len(per_prompt) - without} prompts with a sink" if without else ""
        parts.append(f"mean attention {mean:.3f}{interval}{over}")
        parts.append(f"uniform attention would give {number(uniform(report))}")
    return "; ".join(parts)


def sink_heads(report: SinkReport) -> str | None:
    """How many heads are sink heads on average, and Gu's sink rate."""
    if report.sink_importance is None:
        return None
    epsilon = report.settings.epsilon
    mean = report.mean("sink_importance")
    above = int((mean > epsilon).sum())
    rate = report.sink_rate_at(epsilon)
    return (
        f"{above} of {mean.numel()} have mean importance above ε = {epsilon:g}; sink rate "
        f"{100 * rate:.1f} %"
    )


def value_drain(report: SinkReport) -> str | None:
    """The sink's value norm beside the others'."""
    if report.value_drain is None:
        return None
    drain = report.mean("value_drain")
    if bool(drain.isnan().all()):
        return None
    low = int(drain.nan_to_num(torch.inf).argmin())
    layer, kv_head = divmod(low, drain.shape[1])
    return (
        f"the sink's value norm is {number(float(drain.nanmedian()))} × the others' (median); "
        f"least {number(float(drain[layer, kv_head]))} × in layer {layer}, KV head {kv_head}"
    )


def residual_peak(report: SinkReport) -> str | None:
    """Where the residual peak is largest, and the layer that first writes it."""
    if report.residual_peak is None:
        return None
    peak = report.mean("residual_peak")
    if bool(peak.isnan().all()):
        return None
    top = int(peak.nan_to_num(-torch.inf).argmax())
    largest = f"{number(float(peak[top]))} × the median of the others after layer {top}"
    over = (peak > PEAK).nonzero()
    if len(over) == 0:
        return f"none above {PEAK:g} ×; largest {largest}"
    return f"{largest}; first above {PEAK:g} × after layer {int(over[0])}"


def massive_dims(report: SinkReport) -> str | None:
    """The dims that hold massive activations, largest first, and the layers where they do."""
    if report.massive is None:
        return None
    layers: dict[int, set[int]] = defaultdict(set)
    largest: dict[int, float] = {}
    for entry in report.massive_activations():
        dim, value = entry["dim"], entry["value"]
        layers[dim].add(entry["layer"])
        if abs(value) > abs(largest.get(dim, 0)):
            largest[dim] = value
    if not largest:
        return "none"
    dims = sorted(largest, key=lambda dim: -abs(largest[dim]))
    shown = [f"{d} ({number(largest[d])}, {_runs(layers[d])})" for d in dims[:_SHOWN]]
    return _and_more(shown, len(dims))


def nonmixture_dims(report: SinkReport) -> str | None:
    """The non-mixture dims by layer."""
    if report.ffn_sink is None or report.ffn_mixed_max is None or report.ffn_sink_median is None:
        return None
    records = sorted(report.nonmixture_dims(), key=lambda record: record["layer"])
    if not records:
        return "none"
    by_layer = [
        f"layer {layer}: " + ", ".join(str(record["dim"]) for record in list(group)[:_SHOWN])
        for layer, group in groupby(records, key=lambda record: record["layer"])
    ]
    return _and_more(by_layer[:_SHOWN], len(by_layer), "; ")


def marked_tokens(report: SinkReport) -> str | None:
    """How many tokens `token_mask` marks, and where most of them are."""
    if report.received_peak is None and report.residual_outlier is None:
        return None
    marked = report.token_mask()
    found = Counter(marked.nonzero()[:, 1].tolist())
    real = f"{int(report.mask.sum()):,}"
    if not found:
        return f"token_mask() marks none of {real} tokens as sink or outlier"
    shown = [f"{position} (×{count})" for position, count in found.most_common(_SHOWN)]
    return (
        f"token_mask() marks {found.total()} of {real} tokens as sink or outlier, at "
        f"positions {_and_more(shown, len(found))}"
    )


def provenance(report: SinkReport) -> str:
    """Path, device, seed and versions."""
    s = report.settings
    versions = [f"{name} {version}" for name, version in s.versions.items() if version]
    seed = "" if s.seed is None else f", seed {s.seed}"
    revision = f", revision {plain(s.revision.removeprefix('sha256:'))[:12]}" if s.revision else ""
    return f"{s.path} path on {s.device}{revision}{seed}; {', '.join(versions)}"


def uniform(report: SinkReport) -> float:
    """`sink_attention` if every query spread its attention evenly over the keys that it sees."""
    from sinkscope.metrics._reduce import sliding_sum
    from sinkscope.metrics.attention import sink_attention
    from sinkscope.metrics.positions import reach, visible_keys

    mask, causal = report.mask, report.settings.causal
    sinks = report.sink_mask.to(mask.device)

    def in_layer(window: int | None) -> torch.Tensor:
        sinks_seen = sliding_sum(sinks.float(), *reach(causal, window))
        even = sinks_seen / visible_keys(mask, causal, window)
        return sink_attention(even[:, None], sinks, mask, causal)

    layers = Counter(report.settings.windows or (None,))
    total = sum(count * in_layer(window) for window, count in layers.items())
    return float((total / layers.total()).nanmean())


def _positions(report: SinkReport) -> str:
    if report.settings.sinks != "auto":
        asked = report.settings.sinks.split(",")
        return f"position{'s' if len(asked) > 1 else ''} {', '.join(asked)}"
    found = Counter(report.sink_mask.nonzero()[:, 1].tolist())
    shown = [f"{position} (×{count})" for position, count in found.most_common(_SHOWN)]
    return f"positions found: {_and_more(shown, len(found))}" if found else "none found"


def _sink_tokens(report: SinkReport) -> str:
    """The sinks' tokens, the most frequent first, quoted."""
    if report.token_text is None:
        return ""
    places = report.sink_mask.nonzero().tolist()
    tokens = Counter(report.token_text[prompt][position] for prompt, position in places)
    shown = [f"{plain(repr(token))} ×{count}" for token, count in tokens.most_common(3)]
    return f" ({_and_more(shown, len(tokens))})" if shown else ""


def _and_more(shown: list[str], total: int, separator: str = ", ") -> str:
    rest = total - len(shown)
    return separator.join(shown) + (f"{separator}{rest} more" if rest > 0 else "")


def _runs(layers: set[int]) -> str:
    """Layers as runs: {1, 2, 3, 7} is "layers 1-3, 7"."""
    runs = []
    for _, group in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(runs)}"
