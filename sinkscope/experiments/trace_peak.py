"""Where the sink is made: take a block's attention or FFN output away at the sink, and look on.

Guo et al. (2410.13835, their table for Llama-3.1-8B): without the FFN of blocks 0 or 1 the residual
peak is gone, without any attention it stays. Here every block is removed in turn, and the residual
peak and the sink attention are read after every layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capabilities import capabilities
from sinkscope.experiments import _measure, _result
from sinkscope.experiments._result import Result
from sinkscope.interventions import RemoveOutput, SetActivation
from sinkscope.interventions._base import check_layers, check_mode
from sinkscope.metrics import residual
from sinkscope.models import load_model
from sinkscope.texts import Texts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PARTS = {"attention": "attn", "ffn": "mlp"}
MODES = ("zero", "typical", "mean")
_NEEDED = 0.5
"""A block is needed for the peak if less than this share of it is left without the block."""
_PEAK = 2.0
"""Below this many times the median of the others there is no peak to trace."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PeakTrace(Result):
    """What is left of the sink when one part of one block is taken away there.

    Removed blocks run along `removed`, parts along `part` (attention, ffn) and replacements along
    `mode`; `layer` is where it was read.

    Attributes:
        sink: The sink position.
        blocks: Blocks along `removed`.
        parts: Names along `part`.
        modes: Names along `mode`.
        peak: ‖h_sink‖ of the untouched model [activation].
        peak_ratio: The same over the median of the other positions [ratio].
        attention: Mean attention to the sink in the untouched model [probability].
        peak_without: `peak` when a part is removed.
        peak_ratio_without: `peak_ratio` when a part is removed.
        attention_without: `attention` when a part is removed.
    """

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
        """The layer after which the untouched peak is largest."""
        return int(self.peak.mean(0).argmax())

    def left(self, mode: str) -> Float[Tensor, "removed part"]:
        """Share of the peak that is left at `peak_layer`, over what an ordinary position has.

        (‖h_sink‖ without − median) / (‖h_sink‖ − median), so that 0 is "like any other position".
        """
        at = self.peak_layer
        usual = (self.peak / self.peak_ratio)[:, at]
        now = self.peak_without[:, :, self.modes.index(mode), :, at]
        return ((now - usual) / (self.peak[:, at] - usual)).mean(-1)

    @property
    def written_in(self) -> int:
        """The layer that adds most to ‖h_sink‖."""
        return int(torch.diff(self.peak.mean(0), prepend=self.peak.new_zeros(1)).argmax())

    def needed(self, mode: str = "zero") -> list[tuple[int, str, float]]:
        """The (block, part, share left) without which less than half of the peak is left.

        The one that writes it comes first, the others by how little is left without them. None
        where the sink is no peak.
        """
        if float(self.peak_ratio.mean(0).max()) < _PEAK:
            return []
        left = self.left(mode)
        found = [
            (self.blocks[row], self.parts[column], float(left[row, column]))
            for row, column in (left < _NEEDED).nonzero().tolist()
        ]
        return sorted(found, key=lambda one: (one[0] != self.written_in, one[2]))

    def readers(self, mode: str = "zero", n: int = 5) -> list[dict[str, Any]]:
        """The heads that lose most of their sink attention without the block that writes the peak.

        Args:
            mode: What took that block's place.
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

    def findings(self) -> dict[str, Any]:
        """The peak, and for each replacement the blocks it needs and the heads that read it."""
        at, later = self.peak_layer, self._later
        found: dict[str, Any] = {
            "sink": self.sink,
            "peak_layer": at,
            "written_in": self.written_in,
            "peak": _result.estimate(self.peak[:, at]),
            "peak_ratio": _result.estimate(self.peak_ratio[:, at]),
            "attention_after_peak": _result.estimate(self.attention[:, later].mean((1, 2))),
        }
        for mode in self.modes:
            needed = [
                {
                    "block": block,
                    "part": part,
                    "peak_left": share,
                    "attention_after_peak": _result.estimate(
                        self._without(block, part, mode)[:, later].mean((1, 2))
                    ),
                }
                for block, part, share in self.needed(mode)
            ]
            found[mode] = {"needed": needed, "readers": self.readers(mode)}
        return found

    @property
    def _later(self) -> slice:
        """The layers that can read the peak: those after it was written."""
        n_layers = self.peak.shape[1]
        return slice(min(self.written_in + 1, n_layers - 1), n_layers)

    def _without(self, block: int, part: str, mode: str) -> Float[Tensor, "prompt layer head"]:
        """Attention to the sink when one part is removed."""
        where = self.blocks.index(block), self.parts.index(part), self.modes.index(mode)
        return self.attention_without[where]

    def summary(self) -> str:
        """Which blocks write the peak and which heads read it, a sentence a replacement."""
        found = self.findings()
        lines = [
            f"The residual state of position {self.sink} is largest after layer "
            f"{found['peak_layer']}: {found['peak']}, {found['peak_ratio']} times the median of "
            f"the others. The layers after {found['written_in']} pay it "
            f"{found['attention_after_peak']} of their attention."
        ]
        if float(self.peak_ratio.mean(0).max()) < _PEAK:
            return f"{lines[0]} That is no peak, so there is nothing to trace."
        lines += [f"{_HEADINGS[mode]}: {self._sentence(found[mode])}" for mode in self.modes]
        return "\n".join(lines)

    def _sentence(self, found: dict[str, Any]) -> str:
        if not found["needed"]:
            return "no single block's attention or FFN is needed for the peak."
        blocks = [
            f"the {_PART[one['part']]} of block {one['block']} ({100 * one['peak_left']:.0f} % of "
            f"the peak left, sink attention {one['attention_after_peak']})"
            for one in found["needed"]
        ]
        heads = [
            f"{one['layer']}.{one['head']} ({one['attention']:.2f} → "
            f"{one['attention_without']:.2f})"
            for one in found["readers"]
        ]
        words = f"{blocks[0]} writes the peak"
        if found["needed"][0]["block"] != self.written_in:
            words = f"{blocks[0]} is needed for the peak"
        if blocks[1:]:
            words += f", which also needs {_result.listed(blocks[1:])}"
        return f"{words}; heads {_result.listed(heads)} read it."

    def frame(self) -> pd.DataFrame:
        """One row a removed block, part, replacement, prompt, read layer and metric."""
        import pandas as pd

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
        untouched = _result.grid(
            removed=[-1], part=["none"], mode=["none"], prompt=prompts, layer=layers
        )
        rows = _result.grid(
            removed=self.blocks, part=self.parts, mode=self.modes, prompt=prompts, layer=layers
        )
        pieces = []
        for metric in before:
            for columns, x in ((untouched, before[metric]), (rows, after[metric])):
                pieces.append(pd.DataFrame(columns | {"metric": metric, "value": _result.flat(x)}))
        return pd.concat(pieces, ignore_index=True)

    def figures(self) -> dict[str, go.Figure]:
        """Matrices [removed block × part × read layer] of the peak and of the sink attention."""
        from sinkscope.plot import peak_trace as draw

        frame = self.frame()
        return {
            f"{metric}-{mode}": draw(frame, metric, about=self.about, mode=mode)
            for metric in ("sink_residual_norm", "sink_attention")
            for mode in self.modes
        }


_HEADINGS = {
    "zero": "Set to zero",
    "typical": "Set to its mean over the other positions",
    "mean": "Set to its mean at that position",
}
_PART = {"attention": "attention", "ffn": "FFN"}


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
    """Remove attention or FFN output of each block at the sink, and read the sink in every layer.

    Costs one pass over the texts for each block, part and mode; a few short prompts are enough.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length.
        sink: The sink position.
        blocks: Which blocks to remove; all by default.
        parts: Of "attention" and "ffn".
        modes: What takes the place of what is removed. "zero"; "typical", the part's mean output
            at the other positions, as if the sink were one of them; or "mean", its mean at the
            sink over the prompts, which leaves what all prompts share (Sun et al. 2402.17762 find
            that this changes nothing).
        progress: Whether to draw a progress bar.

    Raises:
        TextError: If the prompts differ in length or end before the sink.
        UnsupportedError: If the model shows no attention or FFN outputs.
    """
    model = load_model(model)
    can = capabilities(model)
    prompts = _measure.even(model, texts, sink)
    chosen = check_layers(None if blocks is None else tuple(blocks), can.n_layers)
    parts = tuple(check_mode(part, tuple(PARTS)) for part in parts)
    modes = tuple(check_mode(mode, MODES) for mode in modes)
    outputs = _typical(model, prompts, sink, parts)
    untouched = _read(model, prompts, sink)
    without: list[dict[str, Tensor]] = []
    total = len(chosen) * len(parts) * len(modes)
    with tqdm(total=total, unit="removal", disable=not progress, leave=False) as bar:
        for block in chosen:
            for part in parts:
                for mode in modes:
                    with _removal(model, block, part, mode, sink, outputs):
                        without.append(_read(model, prompts, sink))
                    bar.update()
    shape = len(chosen), len(parts), len(modes)
    stacked = {
        name: torch.stack([one[name] for one in without]).unflatten(0, shape) for name in untouched
    }
    return PeakTrace(
        about=_result.about(model, prompts),
        sink=sink,
        blocks=chosen,
        parts=parts,
        modes=modes,
        **untouched,
        **{f"{name}_without": x for name, x in stacked.items()},
    )


def _read(model: Any, prompts: Texts, sink: int) -> dict[str, Tensor]:
    """Peak and sink attention in every layer, of the model as it is now."""
    wanted = {"norm": _measure.RESIDUAL_NORM, "attention": _measure.TO_SINKS}
    found = _measure.measure(model, prompts, wanted, [sink])
    norm = found["norm"]
    sinks = torch.zeros_like(prompts.mask).cpu()
    sinks[:, sink] = True
    median = torch.stack(
        [residual.median_of_others(layer, sinks, prompts.mask.cpu()) for layer in norm.unbind(1)],
        dim=1,
    )
    return {
        "peak": norm[..., sink],
        "peak_ratio": norm[..., sink] / median,
        "attention": found["attention"],
    }


def _typical(
    model: Any, prompts: Texts, sink: int, parts: Iterable[str]
) -> dict[tuple[str, str], Float[Tensor, "layer dim"]]:
    """What each part puts out on average, at the sink and elsewhere, by part and mode."""

    def others(x: Tensor, batch: Any) -> Tensor:
        return (x.float().sum(1) - x[:, sink].float()) / (x.shape[1] - 1)

    found: dict[tuple[str, str], Tensor] = {}
    for part in parts:
        signal = f"{PARTS[part]}_out"
        wanted = {
            "mean": _measure.at(signal, sink),
            "typical": _measure.Quantity(signal, others),
        }
        for mode, x in _measure.measure(model, prompts, wanted, [sink]).items():
            found[part, mode] = x.mean(0)
    return found


def _removal(
    model: Any, block: int, part: str, mode: str, sink: int, outputs: dict[Any, Tensor]
) -> Any:
    """The intervention that removes a part of a block at the sink."""
    if mode == "zero":
        return RemoveOutput(model, block, PARTS[part], sink)
    return SetActivation(
        model, block, None, sink, outputs[part, mode][block], at=f"{PARTS[part]}_out"
    )
