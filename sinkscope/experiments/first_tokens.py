"""Put tokens first in real prompts, and measure whether the sink is there or elsewhere.

1. Take the prompts, without the special tokens at their start, and replace their first token by
   each token; once as it is, and once behind the special tokens.
2. Measure the attention to position 0, the attention that every position receives in the layers
   after the peak is written, the residual norm at the block of the peak, and the loss of the later
   tokens, which are the same for all first tokens.
3. Tokens come in pairs of an exception, which makes no peak, and a control of the same class, which
   does, so that intervals are those of paired differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.experiments import readout
from sinkscope.models.capabilities import capabilities
from sinkscope.prompts.tokens import Texts, token_ids
from sinkscope.report.labelled import Labelled
from sinkscope.statistics import Interval, estimate

EXCEPTION, CONTROL = 0, 1


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FirstTokens(Labelled):
    """Measurements with exceptions and their controls as the first token of real prompts.

    Exceptions and controls run along `group`, in this order, and the prompts along `host`, since a
    `Vocabulary` stores them in the same file. The prompts behind special tokens are longer by
    these: `received` and `ratio` end in nan for the others.

    Attributes:
        conditions: Names along `placement`, the place of the token in the text.
        ahead: Number of special tokens before the token in each condition.
        exceptions: Ids of tokens that make no peak.
        controls: Ids of tokens that make one.
        later: First and last layer that attention is averaged over.
        attention: Attention of the later queries to position 0, mean over heads and later layers
            [probability].
        received: Mean attention that a position receives from the queries that see it, mean over
            heads and later layers [probability].
        ratio: ‖h‖ after the block of the peak over the norm of a later token of real text [ratio].
        loss: Mean loss of the tokens after the first two of the text [nat]; None without a trained
            head.
    """

    conditions: list[str]
    ahead: list[int]
    exceptions: Int[Tensor, "pair"]
    controls: Int[Tensor, "pair"]
    later: list[int]
    attention: Float[Tensor, "placement group pair host"]
    received: Float[Tensor, "placement group pair host position"]
    ratio: Float[Tensor, "placement group pair host position"]
    loss: Float[Tensor, "placement group pair host"] | None = None

    @property
    def new_position(self) -> Int[Tensor, "placement group pair host"]:
        """The position after 0 that receives most attention.

        The last quarter of a prompt is left out, since few queries see its keys.
        """
        return self._elsewhere.argmax(-1) + 1

    @property
    def new_attention(self) -> Float[Tensor, "placement group pair host"]:
        """The attention that `new_position` receives [probability]."""
        return self._elsewhere.amax(-1)

    @property
    def new_ratio(self) -> Float[Tensor, "placement group pair host"]:
        """`ratio` at `new_position` [ratio]."""
        return self.ratio.gather(-1, self.new_position[..., None])[..., 0]

    @property
    def _elsewhere(self) -> Float[Tensor, "placement group pair host position"]:
        length = self.received.shape[-1]
        return self.received[..., 1 : length - length // 4].nan_to_num(-1)

    def over_pairs(self, x: Float[Tensor, "placement group pair host"]) -> list[dict[str, Any]]:
        """One quantity of exceptions and controls, and their difference, condition by condition.

        Args:
            x: The quantity.

        Returns:
            Records of exception, control and difference: means over prompts and pairs, with 95 %
            bootstrap intervals over pairs.
        """
        by_pair = x.mean(-1)
        return [
            {
                "exception": estimate(one[EXCEPTION]),
                "control": estimate(one[CONTROL]),
                "difference": estimate(one[EXCEPTION] - one[CONTROL]),
            }
            for one in by_pair
        ]

    def statistics(self, threshold: float) -> list[dict[str, Any]]:
        """Return all statistics, condition by condition.

        Args:
            threshold: Norm ratio above which a position is a peak.
        """
        facts = []
        quantities = {
            "attention": self.over_pairs(self.attention),
            "peak": self.over_pairs(self.ratio[..., 0]),
            "loss": None if self.loss is None else self.over_pairs(self.loss),
            "attention_elsewhere": self.over_pairs(self.new_attention),
            "peak_elsewhere": self.over_pairs(self.new_ratio),
        }
        for index, condition in enumerate(self.conditions):
            row: dict[str, Any] = {"condition": condition}
            row |= {name: x[index] for name, x in quantities.items() if x is not None}
            places = self.new_position[index, EXCEPTION].flatten()
            row["most_common_place"] = int(places.mode().values)
            row["at_most_common_place"] = float((places == places.mode().values).float().mean())
            # Where the new place is a peak itself, the sink has moved; otherwise it is gone.
            moved = (self.new_ratio[index] > threshold).float().mean(-1)
            row["a_peak_elsewhere"] = {
                "exception": estimate(moved[EXCEPTION]),
                "control": estimate(moved[CONTROL]),
            }
            facts.append(row)
        return facts

    def by_pair(self, condition: int, group: int, pair: int) -> dict[str, Interval]:
        """Attention to position 0 and the largest elsewhere of one token, over prompts."""
        at = condition, group, pair
        return {
            "attention": estimate(self.attention[at]),
            "attention_elsewhere": estimate(self.new_attention[at]),
        }


def first_tokens(
    model: Any,
    prompts: Texts,
    exceptions: Sequence[int],
    controls: Sequence[int],
    *,
    conditions: dict[str, tuple[int, ...]],
    ahead: int,
    layer: int,
    ordinary: float,
    progress: bool = True,
) -> FirstTokens:
    """Measure every prompt with each token as its first.

    Args:
        model: A bridge.
        prompts: Of equal length.
        exceptions: Token ids.
        controls: As many token ids.
        conditions: Name of each condition, and the special tokens put before the token in it.
        ahead: Number of special tokens at the start of the prompts, which are left out.
        layer: The block of the peak.
        ordinary: Norm of a later token of real text after it [activation].
        progress: Whether to draw a progress bar.
    """
    body = prompts.tokens[:, ahead + 1 :]  # without the first token of the text
    before = [tuple(prefix) for prefix in conditions.values()]
    width = max(map(len, before)) + 1 + body.shape[1]
    rows: list[dict[str, Tensor]] = []
    total = len(before) * 2 * len(exceptions)
    with tqdm(total=total, unit="first token", disable=not progress, leave=False) as bar:
        for prefix in before:
            for token in (*exceptions, *controls):
                tokens = torch.tensor([*prefix, token]).expand(len(body), -1)
                rows.append(_read(model, torch.cat([tokens, body], dim=1), len(prefix), layer))
                bar.update()
    shape = len(before), 2, len(exceptions)

    def stacked(name: str) -> Tensor:
        result = [row[name] for row in rows]
        if result[0].ndim == 2:
            result = [
                torch.nn.functional.pad(x, (0, width - x.shape[1]), value=torch.nan) for x in result
            ]
        return torch.stack(result).unflatten(0, shape)

    later = _later(capabilities(model).n_layers, layer)
    return FirstTokens(
        conditions=list(conditions),
        ahead=[len(prefix) for prefix in before],
        exceptions=torch.tensor(list(exceptions)),
        controls=torch.tensor(list(controls)),
        later=[later.start, later.stop - 1],
        attention=stacked("attention"),
        received=stacked("received"),
        ratio=stacked("norm") / ordinary,
        loss=stacked("loss") if "loss" in rows[0] else None,
    )


def _read(
    model: Any, tokens: Int[Tensor, "prompt position"], ahead: int, layer: int
) -> dict[str, Tensor]:
    prompts = token_ids(tokens)
    wanted = {
        "norm": readout.RESIDUAL_NORM,
        "received": readout.RECEIVED,
        "attention": readout.TO_SINKS,
    }
    measured = readout.measure(model, prompts, wanted)
    later = _later(measured["norm"].shape[1], layer)
    row = {
        "norm": measured["norm"][:, layer],
        "received": measured["received"][:, later].nanmean(1),
        "attention": measured["attention"][:, later].nanmean((1, 2)),
    }
    losses = readout.losses(model, prompts)
    if losses is not None:
        row["loss"] = losses[:, ahead + 1 : -1].mean(1)  # the last query has no next token
    return row


def _later(n_layers: int, layer: int) -> slice:
    """Return the layers after a block, which can read what it wrote."""
    return slice(min(layer + 1, n_layers - 1), n_layers)
