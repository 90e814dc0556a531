"""How many heads can sleep within a tolerance of the loss: the result of `sleep`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.experiments import _result
from sinkscope.experiments._result import Estimate, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RANDOM = "random"
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sleeping(Result):
    """The loss with the heads asleep that a score flags.

    Attributes:
        scores: Names along `score`; the last is "random", any heads at all.
        asked: What the figures were made of.
        quantile: Share of heads that each threshold flags, over all prompts.
        loss: Mean next-token loss of each prompt with all heads [nat].
        loss_asleep: The same with the flagged heads' outputs zero [nat].
        share_removed: Share of each prompt's heads that were flagged.
    """

    QUESTION = "How many heads can sleep at once?"

    scores: list[str]
    asked: dict[str, Any]
    quantile: Float[Tensor, "quantile"]
    loss: Float[Tensor, "prompt"]
    loss_asleep: Float[Tensor, "score quantile prompt"]
    share_removed: Float[Tensor, "score quantile prompt"]

    def largest_share(self, tolerance: float = 0.01) -> dict[str, dict[str, Any]]:
        """How many heads each score can put to sleep within a tolerance of the untouched loss.

        The mean loss is followed from no head on until it first leaves the tolerance; the share in
        between two thresholds is read off the straight line. Intervals are over prompts.

        Args:
            tolerance: Share of the untouched loss.

        Returns:
            For each score: `share`; `over_random`, how much more than random heads (both with
            intervals, from the same resamples); and `censored`, whether even the largest share
            tried stays within the tolerance.
        """
        draws = torch.Generator().manual_seed(0)
        prompts = len(self.loss)
        drawn = torch.randint(prompts, (_RESAMPLES, prompts), generator=draws).numpy()
        share, asleep = (x.double().numpy() for x in (self.share_removed, self.loss_asleep))
        loss = self.loss.double().numpy()

        def reach(rows: np.ndarray) -> list[float]:
            limit = (1 + tolerance) * loss[rows].mean()
            means = share[..., rows].mean(-1), asleep[..., rows].mean(-1)
            return [
                last_within(x, y, loss[rows].mean(), limit) for x, y in zip(*means, strict=True)
            ]

        measured = np.array(reach(np.arange(prompts)))
        again = np.array([reach(rows) for rows in drawn])
        found = {}
        for index, score in enumerate(self.scores):
            over = again[:, index] - again[:, -1], measured[index] - measured[-1]
            found[score] = {
                "share": _estimate(measured[index], again[:, index], prompts),
                "over_random": _estimate(over[1], over[0], prompts),
                "censored": bool(measured[index] >= share[index].mean(-1).max()),
            }
        return found

    def frame(self) -> pd.DataFrame:
        """One row a score, threshold and prompt: score, share_removed, loss, prompt.

        `share_removed` is the mean over prompts, `share_of_prompt` that prompt's own; at a share of
        0 stands the untouched loss.
        """
        import pandas as pd

        quantiles = [0.0, *self.quantile.tolist()]
        prompts = range(len(self.loss))
        columns = _result.grid(score=self.scores, quantile=quantiles, prompt=prompts)
        none = torch.zeros_like(self.share_removed[:, :1])
        share = torch.cat([none, self.share_removed], dim=1)
        loss = torch.cat([self.loss.expand_as(none), self.loss_asleep], dim=1)
        mean = share.mean(dim=-1, keepdim=True).expand_as(share)
        columns |= {"share_removed": mean, "share_of_prompt": share, "loss": loss}
        return pd.DataFrame(
            {name: _result.flat(x) if isinstance(x, Tensor) else x for name, x in columns.items()}
        )

    def findings(self) -> dict[str, Any]:
        """The untouched loss, the largest share within 1 %, and what each share costs."""
        change = (self.loss_asleep - self.loss).mean(-1) / self.loss.mean()
        return {
            "loss": _result.estimate(self.loss),
            "largest_share": self.largest_share(),
            "relative_loss_change": {
                score: dict(zip(map(str, self.asked["shares"]), row.tolist(), strict=True))
                for score, row in zip(self.scores, change, strict=True)
            },
        }

    def summary(self) -> str:
        """How many heads can sleep, score by score, best first."""
        found = self.largest_share()
        loss = _result.estimate(self.loss)
        order = sorted(self.scores, key=lambda score: -found[score]["share"].mean)
        lines = [f"Heads that can sleep within 1 % of the loss ({loss} nat), per input:"]
        for score in order:
            figures = found[score]
            more = "at least " if figures["censored"] else ""
            line = f"  {score:<10} {more}{_percent(figures['share'])} of heads"
            if score != RANDOM:
                line += f" (over random {_percent(figures['over_random'])})"
            lines.append(line)
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Loss against the share of heads asleep, one line a score."""
        from sinkscope.plot import sleeping_heads

        return {"sleep": sleeping_heads(self.frame(), about=self.about)}


def last_within(shares: np.ndarray, losses: np.ndarray, untouched: float, limit: float) -> float:
    """Where a curve of loss against share first exceeds a limit, on straight lines between points.

    Args:
        shares: In rising order, none 0.
        losses: The loss at each.
        untouched: The loss at share 0.
        limit: What the loss may come to.

    Returns:
        The share; the largest one if the limit is never exceeded.
    """
    x, y = np.concatenate([[0.0], shares]), np.concatenate([[untouched], losses])
    beyond = np.flatnonzero(y > limit)
    if beyond.size == 0:
        return float(x[-1])
    at = beyond[0]
    part = (limit - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + part * (x[at] - x[at - 1]))


def _estimate(mean: float, again: np.ndarray, prompts: int) -> Estimate:
    low, high = np.quantile(again, [0.025, 0.975]) if prompts > 1 else (np.nan, np.nan)
    return Estimate(float(mean), float(low), float(high))


def _percent(share: Estimate) -> str:
    mean, low, high = (f"{100 * end:.1f}" for end in (share.mean, share.low, share.high))
    return f"{mean} %" if math.isnan(share.low) else f"{mean} % [{low}, {high}]"
