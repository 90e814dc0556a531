"""A summary of a report in a few sentences: sink, strength, residual peak, value norm.

Every clause is derived from the report's fields and left out if they were not measured.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import torch

from sinkscope.output import and_more, listed, number, printable
from sinkscope.report.quantities import SinkQuantities

PEAK = 10.0
"""Ratio above which a residual state is called a peak. Published values are between 10 and 1000."""
_REACHED = 0.8
"""Share of the largest peak that the block which is named has to reach."""
_WRITTEN = 0.5
"""Share of its peak that a block has to add to be said to write it."""
STRONG = 1 / 3
"""A sink is called strong if at least this share of heads are sink heads."""

TERMS = {
    "Sinks": "positions that receive far more attention than under uniform attention",
    "Secondary sinks": "further positions that are sinks in some layers (arXiv 2512.22213); no "
    "other value takes them into account",
    "Sink heads": "heads whose sink attention, averaged over prompts, exceeds ε",
    "Sink rate": "share of all (prompt, layer, head) in which the first sink's mean attention over "
    "the queries that see it exceeds ε (Gu et al. 2410.10781)",
    "Chance": "heads whose sink attention exceeds the maximum over all heads under a null: the "
    "model at initialisation, a random position as the sink, or shuffled keys",
    "Value drain": "norm of the sink's value vector over the mean norm of the others'",
    "Residual peak": "norm of the sink's residual state after a block over the median norm of the "
    "others'",
    "Massive dims": "residual channels with an activation above 100 and above 1,000 times the "
    "median of its hidden state (Sun et al. 2402.17762)",
    "Non-mixture dims": "FFN output dimensions in which the sink far exceeds the median over "
    "dimensions and every position that attends to others (after Yan et al. 2407.01601)",
    "Marked tokens": "tokens to leave out when training an SAE or a probe, or when quantising",
    "uniform attention": "sink attention if each query attended equally to all visible keys",
}
"""One-line definitions of the terms in a summary."""

_NEAR = 0.02  # largest deviation at which a share is worded as a fraction
_FRACTIONS = {
    Fraction(1, 4): "a quarter", Fraction(1, 3): "a third", Fraction(1, 2): "half",
    Fraction(2, 3): "two thirds", Fraction(3, 4): "three quarters",
}  # fmt: skip
_SHOWN = 3  # positions named


def headline(report: SinkQuantities) -> str:
    """Describe a report in one to three sentences.

    Args:
        report: A report; values that were not measured are left out.

    Returns:
        Plain text, for example "smollm2-135m has a strong sink at position 0: half of its heads
        (136 of 270) pay it more than 0.3 of their attention; the mean over heads, 0.35, is 17 times
        that of uniform attention. Block 11 writes the residual peak (179 times the others' norm,
        dim 507). The sink's values have about a quarter of the others' norm (0.24).". Empty if
        neither attention, residual states nor values of sinks were measured.
    """
    sentences = (
        _attention(report), _secondary(report), _learned(report), _peak(report), _value(report)
    )  # fmt: skip
    return " ".join(sentence for sentence in sentences if sentence)


def numbers(report: SinkQuantities) -> list[tuple[str, str, str]]:
    """The main values, as (value, label, definition)."""
    shown = []
    if (heads := _head_counts(report)) is not None and heads[1]:
        count, of = heads
        shown.append((f"{count} of {of}", "sink heads", TERMS["Sink heads"]))
        mean, even = _strength(report)
        shown.append((f"{_two(mean / even)} ×", "uniform attention", TERMS["uniform attention"]))
    peak = _mean_peak(report)
    if peak is not None:
        top = int(peak.argmax())
        what = f"residual peak, after block {top}"
        shown.append((f"{number(float(peak[top]))} ×", what, TERMS["Residual peak"]))
    drain = median_drain(report)
    if drain is not None:
        shown.append((f"{_two(drain)} ×", "the others' value norm", TERMS["Value drain"]))
    return shown


def _attention(report: SinkQuantities) -> str:
    counts = _head_counts(report)
    if counts is None:
        return ""
    name = _name(report)
    count, of = counts
    if not bool(report.sink_mask.any()):
        return f"No position of these texts is a sink of {name}."
    if of == 0:
        return (
            f"The attention to the sink of {name} is undefined: in these prompts no query comes "
            "after it."
        )
    where, several = _where(report)
    it = "them" if several else "it"
    epsilon = report.settings.epsilon
    mean, even = _strength(report)
    times = _two(mean / even)
    average = f"the mean over heads, {_two(mean)}, is {times} times that of uniform attention"
    if report.settings.interventions:
        average += " under the model's own mask"
    if even >= epsilon:
        return (
            f"These prompts are too short to tell whether {name} has a sink at {where}: uniform "
            f"attention to {it}, {_two(even)}, already exceeds ε = {epsilon:g}; {average}. Use "
            "longer prompts or a larger ε."
        )
    if count == 0:
        largest = report.mean("sink_attention").nan_to_num(-1).max()
        return (
            f"{name} has no sink head at {where}: no head pays {it} more than {epsilon:g} of its "
            f"attention (at most {_two(float(largest))}); {average}."
        )
    article = "strong sinks" if several else "a strong sink"
    kind = article if count >= STRONG * of else article.replace("strong ", "")
    verb = "pays" if count == 1 else "pay"
    whose = "its" if count == 1 else "their"
    together = " together" if several else ""
    return (
        f"{name} has {kind} at {where}: {_share(count, of)} {verb} {it}{together} more than "
        f"{epsilon:g} of {whose} attention; {average}."
    )


def _secondary(report: SinkQuantities) -> str:
    """A sentence on further sinks found with `sinks="auto"`."""
    if report.secondary_sinks is None or not bool(report.secondary_sinks.any()):
        return ""
    places = report.secondary_sinks.any(dim=1).sum(dim=0)
    count = int((places > 0).sum())
    layers = report.secondary_sinks.any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
    where = f"layer {layers[0]}"
    if len(layers) > 1:
        gaps = "some of the " if len(layers) <= layers[-1] - layers[0] else ""
        where = f"{gaps}layers {layers[0]} to {layers[-1]}"
    what = f"position {int(places.argmax())} is" if count == 1 else f"{count} other positions are"
    kind = "a secondary sink" if count == 1 else "secondary sinks"
    whom = "it" if count == 1 else "them"
    return f"In {where}, {what} {kind}; the other values do not take {whom} into account."


def _learned(report: SinkQuantities) -> str:
    """A sentence on the attention to learned sink logits."""
    if report.learned_sink_mass is None or bool(report.learned_sink_mass.isnan().all()):
        return ""
    mass = float(report.mean("learned_sink_mass").nanmean())
    return f"Its learned sink logits take {_two(mass)} of the attention."


def peak_block(report: SinkQuantities) -> int | None:
    """First block after which the mean residual peak reaches four fifths of its largest value.

    None if that value does not exceed `PEAK`, or residual states were not measured.
    """
    peak = _mean_peak(report)
    if peak is None or float(peak.max()) <= PEAK:
        return None
    return int((peak >= _REACHED * peak.max()).nonzero()[0])


def _peak(report: SinkQuantities) -> str:
    peak = _mean_peak(report)
    if peak is None:
        return ""
    whose = "The sinks have" if _several(report) else "The sink has"
    block = peak_block(report)
    if block is None:
        return (
            f"{whose} no residual peak: at most {_two(float(peak.max()))} times the others' norm."
        )
    dim = _largest_dim(report, block)
    where = "" if dim is None else f", dim {dim}"
    size = f"{number(float(peak[block]))} times the others' norm{where}"
    if block == 0:  # the embedding may hold it already
        return f"The residual peak is there after block 0 ({size})."
    if peak[block - 1] > (1 - _WRITTEN) * peak[block]:
        return f"The residual peak grows over many blocks, up to block {block} ({size})."
    return f"Block {block} writes the residual peak ({size})."


def _value(report: SinkQuantities) -> str:
    drain = median_drain(report)
    if drain is None:
        return ""
    whose = "The sinks' values have" if _several(report) else "The sink's values have"
    if 0.9 <= drain <= 1.1:
        return f"{whose} the others' norm."
    word = next((w for f, w in _FRACTIONS.items() if abs(drain - f) <= _NEAR), None)
    if word is not None:
        return f"{whose} about {word} of the others' norm ({_two(drain)})."
    return f"{whose} {_two(drain)} times the others' norm."


# Values for the sentences.


def uniform(report: SinkQuantities) -> float:
    """Sink attention if every query attended equally to all visible keys [probability]."""
    from sinkscope.metrics.attention import sink_attention
    from sinkscope.metrics.positions import reach, visible_keys
    from sinkscope.metrics.reductions import sliding_sum

    mask, causal = report.mask, report.settings.causal
    sinks = report.sink_mask.to(mask.device)

    def in_layer(window: int | None) -> torch.Tensor:
        sinks_seen = sliding_sum(sinks.float(), *reach(causal, window))
        even = sinks_seen / visible_keys(mask, causal, window)
        return sink_attention(even[:, None], sinks, mask, causal)

    layers = Counter(report.settings.windows_attended)
    total = sum(count * in_layer(window) for window, count in layers.items())
    return float((total / layers.total()).nanmean())


def _head_counts(report: SinkQuantities) -> tuple[int, int] | None:
    """Sink heads, and heads with a defined sink attention; None where it was not measured."""
    if report.sink_attention is None:
        return None
    return int(report.sink_heads().sum()), int(report.mean("sink_attention").isfinite().sum())


def _strength(report: SinkQuantities) -> tuple[float, float]:
    """Mean sink attention over heads, and that of uniform attention [probability]."""
    return float(report.mean("sink_attention").nanmean()), uniform(report)


def _mean_peak(report: SinkQuantities) -> torch.Tensor | None:
    """Mean over prompts of the residual peak [layer], undefined layers at minus infinity."""
    if report.residual_peak is None:
        return None
    peak = report.mean("residual_peak")
    return None if bool(peak.isnan().all()) else peak.nan_to_num(-torch.inf)


def median_drain(report: SinkQuantities) -> float | None:
    """Median over KV heads of the mean drain [ratio]."""
    if report.value_drain is None:
        return None
    drain = report.mean("value_drain")
    return None if bool(drain.isnan().all()) else float(drain.nanquantile(0.5))


def _largest_dim(report: SinkQuantities, layer: int) -> int | None:
    """The dim of the largest massive activation at a sink after a layer."""
    if report.massive is None:
        return None
    at_sink = [
        entry
        for entry in report.massive_activations()
        if entry["layer"] == layer and report.sink_mask[entry["prompt"], entry["position"]]
    ]
    return max(at_sink, key=lambda entry: abs(entry["value"]))["dim"] if at_sink else None


def _name(report: SinkQuantities) -> str:
    under = " and ".join(report.settings.interventions)
    model = printable(report.settings.model)
    return f"{model} under {printable(under)}" if under else model


def _several(report: SinkQuantities) -> bool:
    """Whether some prompt has more than one sink."""
    return bool((report.sink_mask.sum(dim=1) > 1).any())


def _where(report: SinkQuantities) -> tuple[str, bool]:
    """The sink positions as text, most frequent first, and whether a prompt has several."""
    several, prompts = _several(report), len(report.sink_mask)
    counts = Counter(report.sink_mask.nonzero()[:, 1].tolist())
    common = counts.most_common(_SHOWN)
    names = [
        str(position) if count == prompts else f"{position} (in {count} of {prompts} prompts)"
        for position, count in common
    ]
    plural = "s" if len(counts) > 1 else ""
    words = listed(names) if len(counts) <= _SHOWN else and_more(names, len(counts))
    return f"position{plural} {words}{_token(report) if len(counts) == 1 else ''}", several


def _token(report: SinkQuantities) -> str:
    """The sink's token if it is the same in every prompt."""
    if report.token_text is None:
        return ""
    places = report.sink_mask.nonzero().tolist()
    tokens = {report.token_text[prompt][position] for prompt, position in places}
    return f" ({printable(repr(tokens.pop()))})" if len(tokens) == 1 else ""


def _share(count: int, of: int) -> str:
    """A share of the heads as text: "half of its heads (136 of 270)", "10 of its 72 heads"."""
    if count == of:
        return "its only head" if of == 1 else f"all of its {of} heads"
    word = next((w for f, w in _FRACTIONS.items() if abs(count / of - f) <= _NEAR), None)
    return f"{word} of its heads ({count} of {of})" if word else f"{count} of its {of} heads"


def _two(value: float) -> str:
    """A number to two significant digits."""
    return number(float(f"{value:.2g}"))
