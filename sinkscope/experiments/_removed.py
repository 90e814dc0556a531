"""What `removal` finds: the cost of each head, in a table and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope._bootstrap import Interval, bootstrap
from sinkscope.experiments import _result
from sinkscope.experiments._result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Removal(Result):
    """The loss with all heads and without each of them.

    Attributes:
        mode: What took a head's place.
        asked: What the figures were made of.
        loss: Mean next-token loss of each prompt [nat]; nan where no head was removed.
        loss_without: The same without the head; nan where it was not removed.
    """

    QUESTION = "What does it cost to remove a head?"

    mode: str
    asked: dict[str, Any]
    loss: Float[Tensor, "prompt"]
    loss_without: Float[Tensor, "prompt layer head"]

    @property
    def loss_change(self) -> Float[Tensor, "prompt layer head"]:
        """What removing each head costs: the loss without it less the loss with it [nat]."""
        return self.loss_without - self.loss[:, None, None]

    def interval(self, level: float = 0.95) -> Interval:
        """Mean cost of each head over prompts with its bootstrap interval."""
        return bootstrap(self.loss_change, level)

    def frame(self) -> pd.DataFrame:
        """One row a head: loss_change with the ends of its interval, domain and mode."""
        import pandas as pd

        mean, low, high = self.interval()
        layers, heads = mean.shape
        columns = _result.grid(
            domain=[self.asked["texts"]], layer=range(layers), head=range(heads), mode=[self.mode]
        )
        costs = {"loss_change": mean, "loss_change_low": low, "loss_change_high": high}
        frame = pd.DataFrame(columns | {name: _result.flat(x) for name, x in costs.items()})
        return frame.dropna(subset="loss_change", ignore_index=True)

    def findings(self) -> dict[str, Any]:
        """The untouched loss, the dearest heads, and how many cost nothing that shows."""
        mean, low, high = (end.flatten() for end in self.interval())
        cost = mean[~mean.isnan()]
        heads = self.loss_without.shape[2]
        dearest = mean.nan_to_num(-torch.inf).argsort(descending=True)[: min(5, len(cost))]
        return {
            "mode": self.mode,
            "loss": _result.estimate(self.loss),
            "heads": len(cost),
            "median_cost": float(cost.median()),
            "dearest": [
                {"layer": at // heads, "head": at % heads, "loss_change": float(mean[at])}
                for at in dearest.tolist()
            ],
            "dear": int((low > 0).sum()),
            "harmful": int((high < 0).sum()),
        }

    def summary(self) -> str:
        """How much a head is worth, in words."""
        found = self.findings()
        number = _result.number
        dearest = [
            f"{head['layer']}.{head['head']} ({number(head['loss_change'])})"
            for head in found["dearest"]
        ]
        return (
            f"The loss is {found['loss']} nat. Without one of {found['heads']} heads "
            f"({self.mode}) it rises by {number(found['median_cost'])} in the median; by most "
            f"without {_result.listed(dearest)}. Heads that are "
            f"missed for sure: {found['dear']}; that do harm for sure: {found['harmful']} (95 % "
            "intervals over prompts, head by head)."
        )

    def figures(self) -> dict[str, go.Figure]:
        """None: a cost needs something to be drawn against, see `Dormancy.figures`."""
        return {}
