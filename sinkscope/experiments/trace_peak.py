"""Which blocks write the residual peak at the sink, and which heads read it.

Guo, Pai, Bai, Jiao, Jordan and Mei 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835; their
table for Llama-3.1-8B): without the FFN of blocks 0 or 1 the residual peak is gone; without any
attention it remains.

1. Measure residual norms and sink attention in every layer of the unchanged model.
2. Replace the attention or FFN output of one block at the sink position, by zero or by a mean, and
   measure them again: one pass over the texts for each block, part and replacement.
3. A part is necessary for the peak if significantly less than half of the peak is left without it.
   The heads that lose most sink attention without the part that writes the peak read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.interventions import RemoveOutput, SetActivation
from sinkscope.interventions.base import check_layers
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.output import listed, table_as_text
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import Interval, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


PARTS = {"attention": "attn", "ffn": "mlp"}
MODES = ("zero", "typical", "mean")

SINK_HEAD = 0.3
"""Sink attention above which a head is a sink head (ε of Gu et al. 2024, arXiv 2410.10781)."""
_NEEDED = 0.5
"""A block is necessary for the peak if less than this share of it is left without the block."""
_PEAK = 2.0
"""A peak is at least this many times the median norm of the other positions."""

PART_WORDS = {"attention": "attention", "ffn": "FFN"}
_MODES = {"zero": "zero", "typical": "its mean elsewhere", "mean": "its mean there"}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PeakTrace(Result):
    """Peak and sink attention when one part of one block is replaced at the sink.

    Blocks run along `removed`, parts along `part` (attention, ffn) and replacements along `mode`;
    `layer` is where the values were read.

    Attributes:
        sink: The sink position.
        blocks: Blocks along `removed`.
        parts: Names along `part`.
        modes: Names along `mode`.
        peak: ‖h_sink‖ of the unchanged model [activation].
        peak_ratio: The same over the median of the other positions [ratio].
        attention: Mean attention to the sink in the unchanged model [probability].
        peak_without: `peak` when a part is removed.
        peak_ratio_without: `peak_ratio` when a part is removed.
        attention_without: `attention` when a part is removed.
    """

    QUESTION = "Which blocks write the residual peak, and which heads read it?"

    sink: int
    blocks: tuple[int, ...]
    parts: tuple[str, ...]
    modes: tuple[str, ...]
    peak: Float[Tensor, "prompt layer"]
    peak_ratio: Float[Tensor, "prompt layer"]
    attention: Float[Tensor, "prompt layer head"]
    peak_without: Float[Tensor, "removed part mode prompt layer"]
    peak_ratio_without: Float[Tensor, "removed part mode prompt layer"]
    attention_without: Float[Tensor, "removed part mode prompt layer head"]

    @property
    def peak_layer(self) -> int:
        """The layer after which the peak of the unchanged model is largest."""
        return int(self.peak.mean(0).argmax())

    def left(self, mode: str) -> Float[Tensor, "removed part"]:
        """Share of the peak that is left at `peak_layer`, mean over prompts; see `left_by_prompt`.

        Args:
            mode: The replacement.
        """
        return self.left_by_prompt(mode).mean(-1)

    def left_by_prompt(self, mode: str) -> Float[Tensor, "removed part prompt"]:
        """Share of the peak that is left at `peak_layer`, above the norm of an ordinary position.

        (‖h_sink‖ without the part − median) / (‖h_sink‖ − median): 0 is the norm of other
        positions.

        Args:
            mode: The replacement.
        """
        at = self.peak_layer
        ordinary = (self.peak / self.peak_ratio)[:, at]
        now = self.peak_without[:, :, self.modes.index(mode), :, at]
        return (now - ordinary) / (self.peak[:, at] - ordinary)

    @property
    def written_in(self) -> int:
        """The layer that adds most to ‖h_sink‖."""
        return int(torch.diff(self.peak.mean(0), prepend=self.peak.new_zeros(1)).argmax())

    def needed(self, mode: str = "zero") -> list[tuple[int, str, float]]:
        """The (block, part, share left) without which significantly less than half is left.

        Significantly: the 95 % interval over prompts ends below half (with a single prompt, its
        share is below half). The part that writes the peak comes first, the others by how little is
        left without them. Empty if the sink has no peak.

        Args:
            mode: The replacement.
        """
        if not self.is_peak:
            return []
        left = self.left(mode)
        parts = [
            (self.blocks[row], self.parts[column], float(left[row, column]))
            for row, column in (left < _NEEDED).nonzero().tolist()
            if not self.share_left(mode, row, column).high >= _NEEDED  # nan of a single prompt
        ]
        return sorted(parts, key=lambda one: (one[0] != self.written_in, one[2]))

    def share_left(self, mode: str, row: int, column: int) -> Interval:
        """Share of the peak that is left without one part, with its interval over prompts.

        Args:
            mode: The replacement.
            row: Its block's place in `blocks`.
            column: Its place in `parts`.
        """
        return estimate(self.left_by_prompt(mode)[row, column])

    def least(self, mode: str = "zero") -> tuple[int, str, Interval]:
        """The (block, part, share left) whose replacement leaves least of the peak.

        Args:
            mode: The replacement.
        """
        row, column = divmod(int(self.left(mode).argmin()), len(self.parts))
        return self.blocks[row], self.parts[column], self.share_left(mode, row, column)

    def readers(self, mode: str = "zero", n: int = 5) -> list[dict[str, Any]]:
        """The heads that lose most of their sink attention without the block that writes the peak.

        Args:
            mode: The replacement.
            n: How many.

        Returns:
            Records of layer, head, attention before and after; none if no block writes the peak.
        """
        if not self.needed(mode):
            return []
        block, part, _ = self.needed(mode)[0]
        before = self.attention.mean(0)
        after = self._without(block, part, mode).mean(0)
        heads = before.shape[1]
        lost = (before - after).flatten()
        return [
            {
                "layer": index // heads,
                "head": index % heads,
                "attention": float(before.flatten()[index]),
                "attention_without": float(after.flatten()[index]),
            }
            for index in lost.argsort(descending=True)[:n].tolist()
        ]

    def statistics(self) -> dict[str, Any]:
        """The peak, and for each replacement the necessary parts and the heads that read it."""
        at, later = self.peak_layer, self.later
        facts: dict[str, Any] = {
            "sink": self.sink,
            "peak_layer": at,
            "written_in": self.written_in,
            "peak": estimate(self.peak[:, at]),
            "peak_ratio": estimate(self.peak_ratio[:, at]),
            "later_layers": [later.start, later.stop - 1],
            **self._paid(self.attention),
        }
        for mode in self.modes:
            needed = [
                {
                    "block": block,
                    "part": part,
                    "peak_left": self.share_left(
                        mode, self.blocks.index(block), self.parts.index(part)
                    ),
                    **self._paid(self._without(block, part, mode)),
                }
                for block, part, _ in self.needed(mode)
            ]
            facts[mode] = {
                "needed": needed,
                "readers": self.readers(mode),
                "least_left": float(self.left(mode).min()),
            }
        return facts

    def _paid(self, attention: Float[Tensor, "prompt layer head"]) -> dict[str, Any]:
        """Mean attention of the later layers to the sink, and the number of their sink heads."""
        later = attention[:, self.later]
        return {
            "attention_after_peak": estimate(later.mean((1, 2))),
            "sink_heads": int((later.mean(0) > SINK_HEAD).sum()),
        }

    @property
    def is_peak(self) -> bool:
        """Whether the sink's residual norm exceeds the others enough to be a peak."""
        return float(self.peak_ratio.mean(0).max()) >= _PEAK

    @property
    def later(self) -> slice:
        """The layers that can read the peak: those after it was written."""
        n_layers = self.peak.shape[1]
        return slice(min(self.written_in + 1, n_layers - 1), n_layers)

    def _without(self, block: int, part: str, mode: str) -> Float[Tensor, "prompt layer head"]:
        """Attention to the sink when one part is replaced."""
        where = self.blocks.index(block), self.parts.index(part), self.modes.index(mode)
        return self.attention_without[where]

    def summary(self) -> str:
        """The necessary parts in a table, and the parts and heads that write and read the peak."""
        return _summary(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per removed block, part, mode, prompt, layer and metric; -1, none: unchanged."""
        before = {
            "sink_residual_norm": self.peak,
            "residual_peak": self.peak_ratio,
            "sink_attention": self.attention.mean(-1),
        }
        after = {
            "sink_residual_norm": self.peak_without,
            "residual_peak": self.peak_ratio_without,
            "sink_attention": self.attention_without.mean(-1),
        }
        prompts, layers = (range(size) for size in self.peak.shape)
        read = {"prompt": prompts, "layer": layers}
        unchanged = {"removed": [-1], "part": ["none"], "mode": ["none"], **read}
        replaced = {"removed": self.blocks, "part": self.parts, "mode": self.modes, **read}
        return stacked(
            [
                tidy(axes, metric=metric, value=x)
                for metric in before
                for axes, x in ((unchanged, before[metric]), (replaced, after[metric]))
            ]
        )

    def figures(self) -> dict[str, go.Figure]:
        """Matrices [removed block × part × read layer] of the peak and of the sink attention."""
        from sinkscope.plot import peak_trace as draw

        frame = self.to_frame()
        return {
            f"{metric}-{mode}": draw(frame, metric, about=self.about, mode=mode)
            for metric in ("sink_residual_norm", "sink_attention")
            for mode in self.modes
        }


def trace_peak(
    model: Any,
    texts: Any,
    *,
    sink: int = 0,
    blocks: Iterable[int] | None = None,
    parts: Iterable[str] = ("attention", "ffn"),
    modes: Iterable[str] = MODES,
    progress: bool = True,
) -> PeakTrace:
    """Replace the attention or FFN output of each block at the sink, and read every layer.

    Costs one pass over the texts for each block, part and mode; a few short prompts are enough.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length.
        sink: The sink position.
        blocks: Blocks to change; all by default.
        parts: Of "attention" and "ffn".
        modes: The replacements. "zero"; "typical", the part's mean output at the other positions,
            as if the sink were one of them; or "mean", its mean at the sink over the prompts, which
            keeps what all prompts share (Sun et al. 2024, "Massive Activations in Large Language
            Models", arXiv 2402.17762, find that this changes nothing).
        progress: Whether to draw a progress bar.

    Returns:
        Peak and sink attention in every layer, unchanged and with each part replaced.

    Raises:
        TextError: If the prompts differ in length or end before the sink.
        UnsupportedError: If the model shows no attention or FFN outputs; or a part or mode is
            unknown, or none is named.
    """
    model = load_model(model)
    caps = capabilities(model)
    prompts = readout.even(model, texts, sink)
    chosen = check_layers(None if blocks is None else tuple(blocks), caps.n_layers)
    parts = readout.chosen(parts, tuple(PARTS), "parts")
    modes = readout.chosen(modes, MODES, "modes")
    outputs = _typical(model, prompts, sink, parts)
    unchanged = _read(model, prompts, sink)
    without: list[dict[str, Tensor]] = []
    total = len(chosen) * len(parts) * len(modes)
    with tqdm(total=total, unit="removal", disable=not progress, leave=False) as bar:
        for block in chosen:
            for part in parts:
                for mode in modes:
                    with _replaced(model, block, part, mode, sink, outputs):
                        without.append(_read(model, prompts, sink))
                    bar.update()
    shape = len(chosen), len(parts), len(modes)
    stacked = {
        name: torch.stack([one[name] for one in without]).unflatten(0, shape) for name in unchanged
    }
    return PeakTrace(
        about=about(model, prompts),
        sink=sink,
        blocks=chosen,
        parts=parts,
        modes=modes,
        **unchanged,
        **{f"{name}_without": x for name, x in stacked.items()},
    )


def _read(model: Any, prompts: Texts, sink: int) -> dict[str, Tensor]:
    """Measure peak and sink attention in every layer of the model in its current state."""
    wanted = {"norm": readout.RESIDUAL_NORM, "attention": readout.TO_SINKS}
    measured = readout.measure(model, prompts, wanted, [sink])
    norm = measured["norm"]
    return {
        "peak": norm[..., sink],
        "peak_ratio": norm[..., sink] / readout.median_of_others(norm, [sink]),
        "attention": measured["attention"],
    }


def _typical(
    model: Any, prompts: Texts, sink: int, parts: Iterable[str]
) -> dict[tuple[str, str], Float[Tensor, "layer dim"]]:
    """The mean output of each part, at the sink and elsewhere, by part and mode."""

    def others(x: Tensor, batch: Any) -> Tensor:
        return (x.float().sum(1) - x[:, sink].float()) / (x.shape[1] - 1)

    means: dict[tuple[str, str], Tensor] = {}
    for part in parts:
        signal = f"{PARTS[part]}_out"
        wanted = {
            "mean": readout.at(signal, sink),
            "typical": readout.Quantity(signal, others),
        }
        for mode, x in readout.measure(model, prompts, wanted, [sink]).items():
            means[part, mode] = x.mean(0)
    return means


def _replaced(
    model: Any, block: int, part: str, mode: str, sink: int, outputs: dict[Any, Tensor]
) -> Any:
    """The intervention that replaces a part of a block at the sink."""
    if mode == "zero":
        return RemoveOutput(model, block, PARTS[part], sink)
    return SetActivation(
        model, block, None, sink, outputs[part, mode][block], at=f"{PARTS[part]}_out"
    )


def _summary(result: PeakTrace) -> str:
    facts = result.statistics()
    head = (
        f"The residual state of position {result.sink} is largest after layer "
        f"{facts['peak_layer']}: {facts['peak']}, {facts['peak_ratio']} times the median of the "
        f"others. Mean attention to it in {_later(facts)}: {facts['attention_after_peak']}."
    )
    if not result.is_peak:
        return f"{head} This is no peak, so there is nothing to trace."
    parts = [head]
    if any(facts[mode]["needed"] for mode in result.modes):
        parts += [
            f"One part of one block at a time is replaced, at position {result.sink} alone. Parts "
            "without which less than half of the peak is left:",
            _table(result, facts),
        ]
    parts += [text for mode in result.modes for text in _sentences(result, facts, mode)]
    return "\n".join(parts)


def _later(facts: dict[str, Any]) -> str:
    first, last = facts["later_layers"]
    return f"layers {first} to {last}" if last > first else f"layer {first}"


def _table(result: PeakTrace, facts: dict[str, Any]) -> str:
    heads = result.attention[:, result.later].mean(0).numel()

    def read(row: dict[str, Any]) -> list[str]:
        return [row["attention_after_peak"].to_decimals(3), f"{row['sink_heads']} of {heads}"]

    rows = [["nothing", "", "100 %", *read(facts)]]
    rows += [
        [_named(one), _MODES[mode], one["peak_left"].in_percent(), *read(one)]
        for mode in result.modes
        for one in facts[mode]["needed"]
    ]
    columns = ["replaced", "by", "peak left", "attention after it", f"heads above {SINK_HEAD}"]
    return table_as_text(columns, rows)


def _sentences(result: PeakTrace, facts: dict[str, Any], mode: str) -> list[str]:
    """Sentences on what writes the peak, what else is necessary, and what reads it."""
    how = f"replaced by {_MODES[mode]}" if mode != "zero" else "set to zero"
    needed = facts[mode]["needed"]
    if not needed:
        return [_none_needed(result, mode, how)]
    first, *others = needed
    was, now = (x["attention_after_peak"].mean for x in (facts, first))
    writes = "writes" if first["block"] == facts["written_in"] else "is necessary for"
    text = (
        f"The {_named(first)} {writes} the peak: {how}, it leaves {_left(first['peak_left'])}, and "
        f"attention to position {result.sink} {'falls' if now <= was else 'rises'} by "
        f"{100 * abs(1 - now / was):.0f} %."
    )
    if others:
        text += f" Also necessary: {listed(_grouped(others))}."
    if not any(one["part"] == "attention" for one in needed) and "attention" in result.parts:
        text += " No block's attention is necessary."
    heads = [
        f"{one['layer']}.{one['head']} ({one['attention']:.2f} → {one['attention_without']:.2f})"
        for one in facts[mode]["readers"]
    ]
    return [f"{text} Heads that lose most: {listed(heads)}."]


def _none_needed(result: PeakTrace, mode: str, how: str) -> str:
    """Sentence that no part is significantly necessary, with the smallest share left."""
    block, part, share = result.least(mode)
    if share.mean >= 0.5:
        least = 100 * share.mean
        return f"Whichever single part is {how}, at least {least:.0f} % of the peak is left" + (
            ": it hardly depends on the text." if mode == "mean" and least > 90 else "."
        )
    return (
        f"No single part is significantly necessary for the peak: {how}, the "
        f"{_named({'block': block, 'part': part})} leaves least, {_left(share)}, and that interval "
        "does not end below half; more prompts may decide."
    )


def _left(share: Interval) -> str:
    """Return the share of the peak left; if negative, the norm is below that of the others."""
    if round(100 * share.mean) < 0:
        return f"nothing of it (a norm below that of the others: {share.in_percent()})"
    return f"{share.in_percent()} of it"


def _named(one: dict[str, Any]) -> str:
    return f"{PART_WORDS[one['part']]} of block {one['block']}"


def _grouped(needed: list[dict[str, Any]]) -> list[str]:
    """The blocks of each part together: "the FFNs of blocks 8 and 9"."""
    blocks: dict[str, list[int]] = {}
    for one in needed:
        blocks.setdefault(one["part"], []).append(one["block"])
    return [
        f"the {PART_WORDS[part]} of block {where[0]}"
        if len(where) == 1
        else f"the {PART_WORDS[part]}s of blocks {listed([str(b) for b in sorted(where)])}"
        for part, where in blocks.items()
    ]
