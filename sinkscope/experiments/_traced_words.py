"""What `PeakTrace` found, in a table and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope._summary import table_as_text
from sinkscope.experiments import _result

if TYPE_CHECKING:
    from sinkscope.experiments._traced import PeakTrace

_PARTS = {"attention": "attention", "ffn": "FFN"}
_MODES = {"zero": "zero", "typical": "its mean elsewhere", "mean": "its mean there"}


def summary(found: PeakTrace) -> str:
    """The peak, the parts it needs, and who writes and reads it."""
    facts = found.findings()
    head = (
        f"The residual state of position {found.sink} is largest after layer "
        f"{facts['peak_layer']}: {facts['peak']}, {facts['peak_ratio']} times the median of the "
        f"others. {_later(facts)} pay it {facts['attention_after_peak']} of their attention."
    )
    if not found.is_peak:
        return f"{head} That is no peak, so there is nothing to trace."
    parts = [head]
    if any(facts[mode]["needed"] for mode in found.modes):
        parts += [
            f"One part of one block at a time is replaced, at position {found.sink} alone. Parts "
            "without which less than half of the peak is left:",
            _table(found, facts),
        ]
    parts += [text for mode in found.modes for text in _sentences(found, facts, mode)]
    return "\n".join(parts)


def _later(facts: dict[str, Any]) -> str:
    first, last = facts["later_layers"]
    return f"Layers {first} to {last}" if last > first else f"Layer {first}"


def _table(found: PeakTrace, facts: dict[str, Any]) -> str:
    from sinkscope.experiments._traced import SINK_HEAD

    heads = found.attention[:, found.later].mean(0).numel()

    def read(read: dict[str, Any]) -> list[str]:
        return [read["attention_after_peak"].to_decimals(3), f"{read['sink_heads']} of {heads}"]

    rows = [["nothing", "", "100 %", *read(facts)]]
    rows += [
        [_named(one), _MODES[mode], _percent(one["peak_left"]), *read(one)]
        for mode in found.modes
        for one in facts[mode]["needed"]
    ]
    columns = ["replaced", "by", "peak left", "attention after it", f"heads above {SINK_HEAD}"]
    return table_as_text(columns, rows)


def _sentences(found: PeakTrace, facts: dict[str, Any], mode: str) -> list[str]:
    """Who writes the peak, what else it needs, and who reads it, with one replacement."""
    how = f"replaced by {_MODES[mode]}" if mode != "zero" else "set to zero"
    needed = facts[mode]["needed"]
    if not needed:
        return [_none_needed(found, mode, how)]
    first, *others = needed
    was, now = (x["attention_after_peak"].mean for x in (facts, first))
    writes = "writes" if first["block"] == facts["written_in"] else "is needed for"
    text = (
        f"The {_named(first)} {writes} the peak: {how}, it leaves {_left(first['peak_left'])}, and "
        f"attention to position {found.sink} {'falls' if now <= was else 'rises'} by "
        f"{100 * abs(1 - now / was):.0f} %."
    )
    if others:
        text += f" The peak also needs {_result.listed(_grouped(others))}."
    if not any(one["part"] == "attention" for one in needed) and "attention" in found.parts:
        text += " No block's attention is needed."
    heads = [
        f"{one['layer']}.{one['head']} ({one['attention']:.2f} → {one['attention_without']:.2f})"
        for one in facts[mode]["readers"]
    ]
    return [f"{text} Heads that lose most: {_result.listed(heads)}."]


def _none_needed(found: PeakTrace, mode: str, how: str) -> str:
    """That no part is surely needed, and how little may be left."""
    block, part, share = found.least(mode)
    if share.mean >= 0.5:
        least = 100 * share.mean
        return f"Whatever single part is {how}, at least {least:.0f} % of the peak is left" + (
            ": it hardly depends on the text." if mode == "mean" and least > 90 else "."
        )
    return (
        f"No single part is surely needed for the peak: {how}, the "
        f"{_named({'block': block, 'part': part})} leaves least, {_left(share)}, and that interval "
        "does not end below half; more prompts may tell."
    )


def _left(share: _result.Estimate) -> str:
    """What is left of the peak; less than nothing is a norm below that of the others."""
    if round(100 * share.mean) < 0:
        return f"nothing of it (less than the others have: {_percent(share)})"
    return f"{_percent(share)} of it"


def _named(one: dict[str, Any]) -> str:
    return f"{_PARTS[one['part']]} of block {one['block']}"


def _grouped(needed: list[dict[str, Any]]) -> list[str]:
    """The blocks of each part together: "the FFNs of blocks 8 and 9"."""
    blocks: dict[str, list[int]] = {}
    for one in needed:
        blocks.setdefault(one["part"], []).append(one["block"])
    return [
        f"the {_PARTS[part]} of block {where[0]}"
        if len(where) == 1
        else f"the {_PARTS[part]}s of blocks {_result.listed([str(b) for b in sorted(where)])}"
        for part, where in blocks.items()
    ]


def _percent(share: _result.Estimate) -> str:
    if share.low != share.low:
        return f"{100 * share.mean:.0f} %"
    return f"{100 * share.mean:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
