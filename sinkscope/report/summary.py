"""Summary of a report for a terminal or a notebook, with the same content in both.

The headline is followed by one line per fact, each from a function that returns None if it does not
apply, and the table of the strongest heads.
"""

from __future__ import annotations

import html
import math
from collections import Counter, defaultdict
from itertools import groupby
from typing import Any

import torch

from sinkscope.output import (
    UNDEFINED,
    and_more,
    counted,
    facts_as_html,
    facts_as_text,
    megabytes,
    number,
    printable,
    table_as_html,
    table_as_text,
    wrapped,
)
from sinkscope.report.chance import ALPHA, NULLS, chance_levels
from sinkscope.report.headline import PEAK, headline, median_drain, uniform
from sinkscope.report.quantities import SinkQuantities
from sinkscope.statistics import Interval, bootstrap

_SHOWN = 5  # dims, tokens or layers listed in one sentence


def model(report: SinkQuantities) -> str:
    """Architecture and sizes."""
    s = report.settings
    heads = f"{s.n_layers} layers × {s.n_heads} heads"
    shared = f" ({s.n_kv_heads} KV heads)" if s.n_kv_heads != s.n_heads else ""
    under = f", under {printable(' and '.join(s.interventions))}" if s.interventions else ""
    none = ""
    if s.without_attention:
        where = runs(set(s.attending))
        none = f" (attention in layers {where}, none in the others)" if s.attending else ""
        heads = heads if s.attending else f"{s.n_layers} layers, no attention measured"
    return f"{printable(s.architecture)}, {heads}{shared}{none}, {s.dtype}{under}"


def text(report: SinkQuantities) -> str:
    """Source and number of the tokens, and the BOS policy."""
    lengths = report.mask.sum(1)
    low, high = int(lengths.min()), int(lengths.max())
    length = counted(high, "token") if low == high else f"{low} to {high} tokens"
    source = printable(report.settings.source)
    prompts = counted(len(lengths), "prompt")
    return f"{source}, {prompts} of {length}, BOS {printable(report.settings.bos)}"


def sinks(report: SinkQuantities) -> str:
    """Sink positions, their tokens, and their attention next to that of uniform attention."""
    parts = [f"{_positions(report)}{_sink_tokens(report)}"]
    if report.sink_attention is not None and not report.sink_attention.isnan().all():
        per_prompt = report.sink_attention.float().nanmean((1, 2))
        mean, low, high = (float(end) for end in bootstrap(per_prompt))
        interval = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        without = int((~report.sink_mask).all(1).sum())
        over = f" over the {len(per_prompt) - without} prompts with a sink" if without else ""
        parts.append(f"mean attention {mean:.3f}{interval}{over}")
        own = " under the model's own mask" if report.settings.interventions else ""
        parts.append(f"uniform attention{own} would give {number(uniform(report))}")
    return "; ".join(parts)


def secondary_sinks(report: SinkQuantities) -> str | None:
    """Further positions found with `sinks="auto"`, with their numbers of prompts and layers."""
    if report.secondary_sinks is None:
        return None
    prompts = report.secondary_sinks.any(dim=1).sum(dim=0)  # [position]
    order = [at for at in prompts.argsort(descending=True, stable=True).tolist() if prompts[at]]
    shown = []
    for position in order[:_SHOWN]:
        layers = report.secondary_sinks[..., position].any(dim=0).nonzero()[:, 0].tolist()
        count = "s" if len(layers) > 1 else ""
        shown.append(f"{position} (×{int(prompts[position])}, layer{count} {runs(set(layers))})")
    if not shown:
        return "none found"
    return f"positions {and_more(shown, len(order), '; ')}; separate from the primary sinks"


def sink_heads(report: SinkQuantities) -> str | None:
    """Number of sink heads; see `SinkQuantities.sink_heads`."""
    if report.sink_attention is None or report.sink_attention.isnan().all():
        return None
    defined = int(report.mean("sink_attention").isfinite().sum())
    return (
        f"{int(report.sink_heads().sum())} of {defined}, whose mean sink attention exceeds "
        f"ε = {report.settings.epsilon:g}"
    )


def sink_rate(report: SinkQuantities) -> str | None:
    """Sink rate of the first sink (Gu et al.)."""
    if report.sink_importance is None or report.sink_importance.isnan().all():
        return None
    epsilon = report.settings.epsilon
    return (
        f"{100 * report.sink_rate_at(epsilon):.1f} % of (prompt, layer, head) have importance "
        f"above ε = {epsilon:g}"
    )


def chance(report: SinkQuantities) -> str | None:
    """Numbers of heads, and of layers' residual peaks, that exceed chance under each null."""
    said = []
    words = {
        "sink_attention": ("heads", "exceed", "largest"),
        "residual_peak": ("layers' peaks", "exceed", "largest"),
        "value_drain": ("KV heads' drains", "are below", "smallest"),
    }
    for quantity, (what, differ, extreme) in words.items():
        for one in chance_levels(report, quantity):
            level = Interval(one["median"], one["low"], one["high"])
            if not one["tested"]:
                said.append(f"{extreme} peak of {NULLS[one['null']]} {level}, without a test")
                continue
            said.append(
                f"{one['significant']} of {one['tested']} {what} {differ} {NULLS[one['null']]} "
                f"({extreme} there {level})"
            )
    return f"{'; '.join(said)}; corrected p ≤ {ALPHA:g}" if said else None


def value_drain(report: SinkQuantities) -> str | None:
    """The sink's value norm relative to the others'."""
    median = median_drain(report)
    if median is None:
        return None
    drain = report.mean("value_drain")
    low = int(drain.nan_to_num(torch.inf).argmin())
    layer, kv_head = divmod(low, drain.shape[1])
    return (
        f"the sink's value norm is {number(median)} × the others' (median); "
        f"least {number(float(drain[layer, kv_head]))} × in layer {layer}, KV head {kv_head}"
    )


def residual_peak(report: SinkQuantities) -> str | None:
    """Size and layer of the largest residual peak, and the layer that first writes it."""
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


def massive_dims(report: SinkQuantities) -> str | None:
    """The dims with massive activations, largest first, and their layers."""
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
    shown = [
        f"{d} ({number(largest[d])}, layer{'s' if len(layers[d]) > 1 else ''} {runs(layers[d])})"
        for d in dims[:_SHOWN]
    ]
    return and_more(shown, len(dims))


def nonmixture_dims(report: SinkQuantities) -> str | None:
    """The non-mixture dims by layer."""
    if report.ffn_sink_mean is None:
        return None
    records = sorted(report.nonmixture_dims(), key=lambda record: record["layer"])
    if not records:
        return "none"
    by_layer = [
        f"layer {layer}: " + ", ".join(str(record["dim"]) for record in list(group)[:_SHOWN])
        for layer, group in groupby(records, key=lambda record: record["layer"])
    ]
    return and_more(by_layer[:_SHOWN], len(by_layer), "; ")


def marked_tokens(report: SinkQuantities) -> str | None:
    """Number of tokens marked by `token_mask`, and their most frequent positions."""
    if report.received_peak is None and report.residual_outlier is None:
        return None
    marked = report.token_mask()
    counts = Counter(marked.nonzero()[:, 1].tolist())
    real = f"{int(report.mask.sum()):,}"
    if not counts:
        return f"token_mask() marks none of {real} tokens as sink or outlier"
    shown = [f"{position} (×{count})" for position, count in counts.most_common(_SHOWN)]
    return (
        f"token_mask() marks {counts.total()} of {real} tokens as sink or outlier, at "
        f"positions {and_more(shown, len(counts))}"
    )


def size(report: SinkQuantities) -> str:
    """How many tensors the report holds, and what they take in memory."""
    return f"{counted(len(report.measured()), 'field')}, {megabytes(report.nbytes)} in memory"


def provenance(report: SinkQuantities) -> str:
    """Attention path, device, revision, seed and versions."""
    s = report.settings
    versions = [f"{name} {version}" for name, version in s.versions.items() if version]
    seed = "" if s.seed is None else f", seed {s.seed}"
    revision = (
        f", revision {printable(s.revision.removeprefix('sha256:'))[:12]}" if s.revision else ""
    )
    return f"{s.attention} attention on {s.device}{revision}{seed}; {', '.join(versions)}"


def _positions(report: SinkQuantities) -> str:
    if report.settings.sinks != "auto":
        positions = report.settings.sinks.split(",")
        return f"position{'s' if len(positions) > 1 else ''} {', '.join(positions)}"
    counts = Counter(report.sink_mask.nonzero()[:, 1].tolist())
    shown = [f"{position} (×{count})" for position, count in counts.most_common(_SHOWN)]
    return f"positions found: {and_more(shown, len(counts))}" if counts else "none found"


def _sink_tokens(report: SinkQuantities) -> str:
    """The sinks' tokens, the most frequent first, quoted."""
    if report.token_text is None:
        return ""
    places = report.sink_mask.nonzero().tolist()
    tokens = Counter(report.token_text[prompt][position] for prompt, position in places)
    shown = [f"{printable(repr(token))} ×{count}" for token, count in tokens.most_common(3)]
    return f" ({and_more(shown, len(tokens))})" if shown else ""


def runs(layers: set[int]) -> str:
    """Layers as runs: {1, 2, 3, 7} is "1-3, 7"."""
    runs_of_numbers = []
    for _, group in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        runs_of_numbers.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs_of_numbers)


Fact = tuple[str, str]

_HEADS = 8
_TITLES = {
    "layer": "layer",
    "head": "head",
    "sink_attention": "sink attention",
    "interval": "95 % interval",
    "sink_logit_gap": "logit gap",
    "attention_entropy": "entropy [nat]",
    "value_drain": "value drain",
    "honor": "HONOR",
}


def as_text(report: SinkQuantities) -> str:
    """The summary as plain text, at most `line_width` columns wide."""
    parts = [title_of(report), *map(wrapped, filter(None, [headline(report)]))]
    parts.append(facts_as_text(facts_of(report)))
    columns, rows = heads_of(report)
    if rows:
        parts += [f"Strongest sink heads\n{table_as_text(columns, rows)}"]
    return "\n".join(parts)


def as_html(report: SinkQuantities) -> str:
    """The summary as HTML that inherits the notebook's colours, light or dark."""
    columns, rows = heads_of(report)
    heads = f"<div>Strongest sink heads</div>{table_as_html(columns, rows)}" if rows else ""
    text = html.escape(headline(report))
    said = f'<div style="max-width:75ch">{text}</div>' if text else ""
    return (
        f'<div style="color:inherit;overflow-x:auto"><strong>{html.escape(title_of(report))}'
        f"</strong>{said}{facts_as_html(facts_of(report))}{heads}</div>"
    )


def title_of(report: SinkQuantities) -> str:
    """Title of the summary."""
    return f"Attention sinks of {printable(report.settings.model)}"


def facts_of(report: SinkQuantities) -> list[Fact]:
    """Label and text of every fact; those that were not measured are left out."""
    facts = [
        ("Model", model(report)),
        ("Text", text(report)),
        ("Sinks", sinks(report)),
        ("Secondary sinks", secondary_sinks(report)),
        ("Sink heads", sink_heads(report)),
        ("Sink rate", sink_rate(report)),
        ("Chance", chance(report)),
        ("Value drain", value_drain(report)),
        ("Residual peak", residual_peak(report)),
        ("Massive dims", massive_dims(report)),
        ("Non-mixture dims", nonmixture_dims(report)),
        ("Marked tokens", marked_tokens(report)),
        ("Size", size(report)),
        ("Made with", provenance(report)),
    ]
    return [(label, text) for label, text in facts if text is not None]


def heads_of(report: SinkQuantities) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of the table of the strongest heads; empty if not measured."""
    if report.sink_attention is None or report.sink_attention.isnan().all():
        return [], []
    defined = int(report.mean("sink_attention").isfinite().sum())  # nan in layers without attention
    records = [_with_interval(record) for record in report.top_heads(min(_HEADS, defined))]
    names = [name for name in _TITLES if name in records[0]]
    return (
        [_TITLES[name] for name in names],
        [[_cell(record[name]) for name in names] for record in records],
    )


def _with_interval(record: dict[str, Any]) -> dict[str, Any]:
    low, high = (number(record[end], ".3f") for end in ("low", "high"))
    interval = low if low == UNDEFINED else f"{low} to {high}"
    return record | {"interval": interval}


def _cell(value: Any) -> str:
    return number(value, ".3f") if isinstance(value, float) else str(value)
