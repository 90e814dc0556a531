"""What `dynamics` finds: a curve for each phenomenon, a table, words and a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.experiments import _result
from sinkscope.experiments._result import Result
from sinkscope.metrics.heads import is_dormant
from sinkscope.report import SinkReport

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PER_HEAD = ("sink_attention", "sink_importance", "attention_entropy", "value_drain", "honor")
PER_LAYER = ("residual_peak", "sink_residual_norm")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dynamics(Result):
    """The reports of a model's checkpoints.

    Attributes:
        reports: By training step, rising.
        loss: Mean next-token loss by step [nat]; without steps where the model has none.
        parked: Mean sink attention above which a head counts as dormant [probability].
    """

    QUESTION = "When in training do sinks, drains and peaks grow?"

    reports: dict[int, SinkReport]
    loss: dict[int, float]
    parked: float

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps."""
        return tuple(self.reports)

    def stacked(self, name: str) -> Float[Tensor, "step ..."]:
        """Mean over prompts of a field of the report, step by step."""
        return torch.stack([report.mean(name) for report in self.reports.values()])

    def overview(self) -> dict[str, Float[Tensor, "step"]]:
        """One curve for each phenomenon.

        Returns:
            sink_rate, of the first sink [share]; sink_attention, mean over heads [probability];
            dormant_share, of heads [share]; value_drain, median over layers and kv_heads [ratio];
            residual_peak, largest over layers [ratio]; and loss [nat] where there is one.
        """
        attention = self.stacked("sink_attention").flatten(1)
        rates = [report.sink_rate_at(report.settings.epsilon) for report in self.reports.values()]
        curves = {
            "sink_rate": torch.tensor(rates),
            "sink_attention": attention.mean(dim=1),
            "dormant_share": is_dormant(attention, self.parked).float().mean(dim=1),
            "value_drain": self.stacked("value_drain").flatten(1).median(dim=1).values,
            "residual_peak": self.stacked("residual_peak").amax(dim=1),
        }
        if self.loss:
            curves["loss"] = torch.tensor([self.loss[step] for step in self.steps])
        return curves

    def frame(self) -> pd.DataFrame:
        """One row a step, metric, layer and head: step, metric, layer, head, value.

        layer and head are -1 for the curves of `overview`, head alone for figures of a layer;
        value_drain has a kv_head in `head`. What one of the checkpoints cannot have (entropy
        without a softmax) is left out.
        """
        import pandas as pd

        pieces = [
            self._rows(name, curve[:, None, None], layers=[-1], heads=[-1])
            for name, curve in self.overview().items()
        ]
        for name in PER_LAYER:
            x = self.stacked(name)[:, :, None]
            pieces.append(self._rows(name, x, range(x.shape[1]), [-1]))
        for name in PER_HEAD:
            if any(getattr(report, name) is None for report in self.reports.values()):
                continue
            x = self.stacked(name)
            pieces.append(self._rows(name, x, range(x.shape[1]), range(x.shape[2])))
        return pd.concat(pieces, ignore_index=True)

    def _rows(
        self, metric: str, x: Float[Tensor, "step layer head"], layers: Any, heads: Any
    ) -> pd.DataFrame:
        import pandas as pd

        columns = _result.grid(metric=[metric], step=self.steps, layer=layers, head=heads)
        return pd.DataFrame(columns | {"value": _result.flat(x)})

    def findings(self) -> dict[str, Any]:
        """The curves, and when each phenomenon appears."""
        curves = {name: curve.tolist() for name, curve in self.overview().items()}
        return {"step": list(self.steps), "curves": curves, "half_way": self.half_way()}

    def half_way(self) -> dict[str, int | None]:
        """The first step at which each curve has come half of its way from first to last value."""
        found: dict[str, int | None] = {}
        for name, curve in self.overview().items():
            way = (curve - curve[0]) / (curve[-1] - curve[0])
            there = (way >= 0.5).nonzero()[:, 0]
            found[name] = self.steps[int(there[0])] if len(there) else None
        return found

    def summary(self) -> str:
        """First and last value of each curve, and when it was half-way between."""
        half = self.half_way()
        lines = [f"{len(self.steps)} checkpoints, steps {self.steps[0]:,} to {self.steps[-1]:,}:"]
        if len(self.steps) == 1:
            lines = [f"One checkpoint, step {self.steps[0]:,}:"]
        for name, curve in self.overview().items():
            first, last = (_result.number(float(value)) for value in (curve[0], curve[-1]))
            when = "" if half[name] is None else f", half-way by step {half[name]:,}"
            lines.append(f"  {name.replace('_', ' ')} {first} → {last}{when}")
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """One panel a phenomenon against the step."""
        from sinkscope.plot import training_curves

        frame = self.frame()
        curves = frame[(frame["layer"] == -1) & (frame["head"] == -1)]
        return {"dynamics": training_curves(curves, about=self.about, log_steps=False)}
