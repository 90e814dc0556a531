"""What `which_part` finds: what is left of a sink when only a part of what makes it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from sinkscope._summary import table_as_text
from sinkscope.experiments import _result
from sinkscope.experiments._result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WhichPart(Result):
    """What is left of a sink when only a part of what makes it is there.

    Attributes:
        position: The designated position.
        peak_layer: The layer that adds most to ‖h_0‖.
        dims: The FFN-output dims of that layer that were set.
        dims_by_rule: Whether those pass the non-mixture rule, or are only its three largest.
        cases: What was done, in words.
        targets: Which position each case is about: 0 or `position`. The first case is the natural
            sink, position 0 of the untouched model.
        paid: Attention to the target in the later layers, mean over heads [probability].
        peak: ‖h_target‖ over the median of the others, where highest [ratio].
        loss: Mean loss of the queries after the position [nat]; None without a trained head.
    """

    QUESTION = "Which part of what makes the sink is enough, and which is needed?"

    position: int
    peak_layer: int
    dims: tuple[int, ...]
    dims_by_rule: bool
    cases: tuple[str, ...]
    targets: tuple[int, ...]
    paid: Float[Tensor, "case prompt"]
    peak: Float[Tensor, "case prompt"]
    loss: Float[Tensor, "case prompt"] | None = None

    def left(self, case: int) -> float:
        """Attention to the target as a share of what the natural sink receives."""
        return float(self.paid[case].mean() / self.paid[0].mean())

    def findings(self) -> dict[str, Any]:
        """One record a case."""
        rows = []
        for case, name in enumerate(self.cases):
            row: dict[str, Any] = {
                "case": name,
                "target": self.targets[case],
                "attention": _result.estimate(self.paid[case]),
                "share_of_sink": self.left(case),
                "peak": _result.estimate(self.peak[case]),
            }
            if self.loss is not None:
                row["loss"] = _result.estimate(self.loss[case])
            rows.append(row)
        return {
            "position": self.position,
            "peak_layer": self.peak_layer,
            "dims": list(self.dims),
            "dims_by_rule": self.dims_by_rule,
            "cases": rows,
        }

    def summary(self) -> str:
        """The table of what remains."""
        dims = ", ".join(map(str, self.dims))
        kind = "non-mixture dims" if self.dims_by_rule else "largest dims (none passes the rule)"
        head = (
            f"Layer {self.peak_layer} adds most to the residual norm of position 0; {kind} of its "
            f"FFN output: {dims}. Attention is that of the queries after {self.position} (all "
            "others, where attention is bidirectional) in the later half of the layers, share is "
            "its ratio to what position 0 receives in the untouched model. 95 % intervals over "
            "prompts."
        )
        rows = []
        for case, name in enumerate(self.cases):
            row = [
                name,
                str(self.targets[case]),
                _result.estimate(self.paid[case]).to_decimals(3),
                f"{100 * self.left(case):.0f} %",
                _result.number(float(self.peak[case].mean())),
            ]
            if self.loss is not None:
                row.append(f"{float(self.loss[case].mean()):.3f}")
            rows.append(row)
        columns = ["what was done", "at", "attention", "share", "peak"]
        columns += ["loss"] if self.loss is not None else []
        return f"{head}\n{table_as_text(columns, rows)}"

    def frame(self) -> pd.DataFrame:
        """Rows of condition (the case), prompt, layer (-1), position, metric and value."""
        import pandas as pd

        pieces = []
        quantities = {"sink_attention": self.paid, "residual_peak": self.peak, "loss": self.loss}
        for metric, x in quantities.items():
            if x is None:
                continue
            columns = _result.grid(condition=self.cases, prompt=range(x.shape[1]), layer=[-1])
            columns["position"] = torch.tensor(self.targets).repeat_interleave(x.shape[1]).numpy()
            pieces.append(pd.DataFrame(columns | {"metric": metric, "value": _result.flat(x)}))
        return pd.concat(pieces, ignore_index=True)

    def figures(self) -> dict[str, go.Figure]:
        """Every case side by side, for the designated position and for position 0."""
        from sinkscope.plot import before_after

        frame = self.frame()
        shown = {"sink_attention": "Attention to", "residual_peak": "Residual peak at"}
        return {
            f"{metric}-at-{target}": before_after(
                frame[frame["position"] == target],
                metric,
                about=self.about,
                by="condition",
                title=f"{what} position {target}, by condition",
            )
            for target in (self.position, 0)
            for metric, what in shown.items()
        }
