"""What `trace_peak` finds: what is left of the peak and of its readers without each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.experiments import _result
from sinkscope.experiments._result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SINK_HEAD = 0.3
"""A head that pays the sink more than this is counted as one of its readers (Gu et al.'s ε)."""
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
        """The layer after which the untouched peak is largest."""
        return int(self.peak.mean(0).argmax())

    def left(self, mode: str) -> Float[Tensor, "removed part"]:
        """Share of the peak that is left at `peak_layer`, mean over prompts; see `left_by_prompt`.

        Args:
            mode: What took the place of what was removed.
        """
        return self.left_by_prompt(mode).mean(-1)

    def left_by_prompt(self, mode: str) -> Float[Tensor, "removed part prompt"]:
        """Share of the peak that is left at `peak_layer`, over what an ordinary position has.

        (‖h_sink‖ without − median) / (‖h_sink‖ − median), so that 0 is "like any other position".
        """
        at = self.peak_layer
        usual = (self.peak / self.peak_ratio)[:, at]
        now = self.peak_without[:, :, self.modes.index(mode), :, at]
        return (now - usual) / (self.peak[:, at] - usual)

    @property
    def written_in(self) -> int:
        """The layer that adds most to ‖h_sink‖."""
        return int(torch.diff(self.peak.mean(0), prepend=self.peak.new_zeros(1)).argmax())

    def needed(self, mode: str = "zero") -> list[tuple[int, str, float]]:
        """The (block, part, share left) without which surely less than half of the peak is left.

        Surely: the 95 % interval over prompts ends below half; of a single prompt, its own share
        does. The one that writes it comes first, the others by how little is left without them.
        None where the sink is no peak.
        """
        if not self.is_peak:
            return []
        left = self.left(mode)
        found = [
            (self.blocks[row], self.parts[column], float(left[row, column]))
            for row, column in (left < _NEEDED).nonzero().tolist()
            if not self.share_left(mode, row, column).high >= _NEEDED  # nan of a single prompt
        ]
        return sorted(found, key=lambda one: (one[0] != self.written_in, one[2]))

    def share_left(self, mode: str, row: int, column: int) -> _result.Estimate:
        """Share of the peak that is left without one part, with its interval over prompts.

        Args:
            mode: What took its place.
            row: Its block's place in `blocks`.
            column: Its place in `parts`.
        """
        return _result.estimate(self.left_by_prompt(mode)[row, column])

    def least(self, mode: str = "zero") -> tuple[int, str, _result.Estimate]:
        """The (block, part, share left) without which least of the peak is left, sure or not."""
        row, column = divmod(int(self.left(mode).argmin()), len(self.parts))
        return self.blocks[row], self.parts[column], self.share_left(mode, row, column)

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
        at, later = self.peak_layer, self.later
        found: dict[str, Any] = {
            "sink": self.sink,
            "peak_layer": at,
            "written_in": self.written_in,
            "peak": _result.estimate(self.peak[:, at]),
            "peak_ratio": _result.estimate(self.peak_ratio[:, at]),
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
            found[mode] = {
                "needed": needed,
                "readers": self.readers(mode),
                "least_left": float(self.left(mode).min()),
            }
        return found

    def _paid(self, attention: Float[Tensor, "prompt layer head"]) -> dict[str, Any]:
        """What the later layers pay the sink, and how many of their heads pay it a lot."""
        later = attention[:, self.later]
        return {
            "attention_after_peak": _result.estimate(later.mean((1, 2))),
            "sink_heads": int((later.mean(0) > SINK_HEAD).sum()),
        }

    @property
    def is_peak(self) -> bool:
        """Whether the sink's residual norm stands out at all."""
        return float(self.peak_ratio.mean(0).max()) >= _PEAK

    @property
    def later(self) -> slice:
        """The layers that can read the peak: those after it was written."""
        n_layers = self.peak.shape[1]
        return slice(min(self.written_in + 1, n_layers - 1), n_layers)

    def _without(self, block: int, part: str, mode: str) -> Float[Tensor, "prompt layer head"]:
        """Attention to the sink when one part is removed."""
        where = self.blocks.index(block), self.parts.index(part), self.modes.index(mode)
        return self.attention_without[where]

    def summary(self) -> str:
        """The parts that the peak needs in a table, and who writes and reads it in sentences."""
        from sinkscope.experiments import _traced_words

        return _traced_words.summary(self)

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
