"""What `mixing` finds: perturbations and collapse by condition, in a table, words and a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from sinkscope.experiments import _result
from sinkscope.experiments._result import Estimate, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Mixing(Result):
    """How a text's representations mix, condition by condition.

    `position` counts the text's own tokens from 0, BOS left out.

    Attributes:
        conditions: Names along `condition`.
        changed: The position whose token is changed.
        hidden_after: The layer after which "no sink" hides the front token; -1 without "no sink".
        front_rate: Share of heads for which the front token is a sink (sink rate, ε = 0.3).
        other_rate: The same of the position in the first half for which it is largest.
        perturbation: ‖h_i(x) − h_i(x')‖ after each block, where x' has another token at `changed`
            [activation].
        relative_perturbation: The same over ‖h_i(x)‖ [ratio].
        rank_collapse: μ(V) of the positions after the first [activation], see `metrics.mixing`.
        rank_share: μ(V) over ‖V‖_F of the same positions: 0 = all alike [ratio].
        matrix_entropy: Of the same positions, over its largest possible value [share].
    """

    QUESTION = "How far does one changed token spread, with and without a sink?"

    conditions: tuple[str, ...]
    changed: int
    hidden_after: int
    front_rate: Float[Tensor, "condition"]
    other_rate: Float[Tensor, "condition"]
    perturbation: Float[Tensor, "condition prompt layer position"]
    relative_perturbation: Float[Tensor, "condition prompt layer position"]
    rank_collapse: Float[Tensor, "condition prompt layer"]
    rank_share: Float[Tensor, "condition prompt layer"]
    matrix_entropy: Float[Tensor, "condition prompt layer"]

    @property
    def spread(self) -> Float[Tensor, "condition prompt layer"]:
        """Relative perturbation of the positions after the changed one, their mean [ratio]."""
        return self.relative_perturbation[..., self.changed + 1 :].mean(-1)

    def frame(self) -> pd.DataFrame:
        """One row a condition, prompt, layer, position and metric, as `plot.before_after` takes it.

        `position` is -1 for figures of a whole prompt.
        """
        import pandas as pd

        pieces = []
        for metric in ("perturbation", "relative_perturbation"):
            pieces.append(self._rows(metric, self[metric], range(self[metric].shape[-1])))
        wholes = {name: self[name] for name in ("rank_collapse", "rank_share", "matrix_entropy")}
        for metric, x in ({"spread": self.spread} | wholes).items():
            pieces.append(self._rows(metric, x[..., None], [-1]))
        return pd.concat(pieces, ignore_index=True)

    def _rows(self, metric: str, x: Tensor, positions: Iterable[int]) -> pd.DataFrame:
        import pandas as pd

        _, prompts, layers, _ = x.shape
        columns = _result.grid(
            metric=[metric],
            condition=self.conditions,
            prompt=range(prompts),
            layer=range(layers),
            position=positions,
        )
        return pd.DataFrame(columns | {"value": _result.flat(x)})

    def findings(self) -> dict[str, Any]:
        """Each condition's figures half-way up and after the last block, and their differences."""
        found: dict[str, Any] = {}
        for index, condition in enumerate(self.conditions):
            rates = {name: float(self[name][index]) for name in ("front_rate", "other_rate")}
            found[condition] = rates | self._at(lambda x, index=index: x[index])
        for index, condition in enumerate(self.conditions[1:], start=1):
            # The same prompts run in every condition, so differences are taken prompt by prompt.
            less = self._at(lambda x, index=index: x[index] - x[0])
            found[f"{condition} less {self.conditions[0]}"] = less
        return found

    def _at(
        self, choose: Callable[[Tensor], Float[Tensor, "prompt layer"]]
    ) -> dict[str, dict[str, Estimate]]:
        """Three figures, half-way up and after the last block."""
        figures = {
            "spread": self.spread,
            "rank_share": self.rank_share,
            "matrix_entropy": self.matrix_entropy,
        }
        layers = self.rank_share.shape[2]
        where = {"middle": layers // 2, "last": layers - 1}
        return {
            name: {place: _result.estimate(choose(x)[:, layer]) for place, layer in where.items()}
            for name, x in figures.items()
        }

    def summary(self) -> str:
        """Spread of a changed token and likeness of positions, condition by condition."""
        found = self.findings()
        lines = [
            f"One token changed (position {self.changed}); later positions move by this share of "
            "their norm, and share of ‖V‖_F that is not their common mean:"
        ]
        for condition in self.conditions:
            own = found[condition]
            lines.append(
                f"  {condition} (sink rate of the front token {own['front_rate']:.0%}, elsewhere "
                f"{own['other_rate']:.0%}): spread {own['spread']['middle']} half-way up, "
                f"{own['spread']['last']} at the end; μ(V)/‖V‖ {own['rank_share']['middle']}, "
                f"{own['rank_share']['last']}"
            )
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Relative perturbation by position, one panel a condition."""
        from sinkscope.plot import before_after

        rows = self.frame()
        return {
            "perturbation": before_after(
                rows, "relative_perturbation", about=self.about, positions=[self.changed]
            )
        }
