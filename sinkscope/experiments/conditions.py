"""Measure a model under several conditions: start tokens × changes to one position.

1. `designated` and `started` prepare the prompts: equal lengths, and a special, random or given
   first token.
2. `observe` runs the model under each `Condition` and measures, for every position, the attention
   that it receives, its value and residual norms and its FFN output; and the loss.
3. `Conditions` is the result: comparisons with the unchanged model, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture.batches import Batch
from sinkscope.capture.readers import AttentionReader
from sinkscope.errors import TextError
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.interventions import ReplaceEnd, ReplaceStart
from sinkscope.metrics import ffn
from sinkscope.metrics.positions import masked_mean
from sinkscope.models.capabilities import capabilities
from sinkscope.output import listed, table_as_text
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import Interval, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BY_POSITION = ("received_attention", "value_norm", "residual_norm")
STARTS = ("special", "random", "given")

Dims = frozenset[tuple[int, int]]
"""Pairs of layer and dim."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Conditions(Result):
    """Attention, norms and FFN outputs of every position, by condition and prompt.

    Attributes:
        position: The position that was changed.
        starts: Start token of each condition: special, random or given.
        changes: Change made in each condition; "unchanged" for the reference.
        names: Title of each condition.
        causal: Whether attention is causal.
        received_attention: Importance of each key, mean over heads [probability].
        value_norm: Norm of each value, mean over KV heads [activation].
        residual_norm: Norm of each residual state after a layer [activation].
        paid: Attention of the queries after `position` (of all other queries where attention is
            bidirectional) to position 0 and to `position` [probability]. The same queries can see
            both, so the two are comparable.
        ffn_output: FFN output at position 0 and at `position` [activation].
        ffn_mixed_max: Largest |FFN output| over all other positions [activation].
        loss: Loss of each query's next token [nat]; None without a trained head or causality.
    """

    position: int
    starts: tuple[str, ...]
    changes: tuple[str, ...]
    names: tuple[str, ...]
    causal: bool
    received_attention: Float[Tensor, "condition prompt layer position"]
    value_norm: Float[Tensor, "condition prompt layer position"]
    residual_norm: Float[Tensor, "condition prompt layer position"]
    paid: Float[Tensor, "condition prompt layer head target"]
    ffn_output: Float[Tensor, "condition prompt layer target dim"]
    ffn_mixed_max: Float[Tensor, "condition prompt layer dim"]
    loss: Float[Tensor, "condition prompt query"] | None = None

    @property
    def later(self) -> slice:
        """Slice of the later half of the layers."""
        n_layers = self.residual_norm.shape[2]
        return slice(n_layers // 2, n_layers)

    @property
    def layers(self) -> list[int]:
        """The indices of the later layers."""
        return list(range(self.residual_norm.shape[2]))[self.later]

    def reference(self, index: int) -> int:
        """The unchanged condition with the same start."""
        return next(
            i
            for i, (start, change) in enumerate(zip(self.starts, self.changes, strict=True))
            if start == self.starts[index] and change == "unchanged"
        )

    def attention_to(self, index: int, target: int) -> Float[Tensor, "prompt"]:
        """Attention to position 0 (target 0) or the position (target 1) in the later layers."""
        return self.paid[index, :, self.later, :, target].mean((1, 2))

    def peak(self, index: int, position: int) -> Float[Tensor, "prompt layer"]:
        """‖h‖ at a position over the median of all others but 0 and `position` [ratio]."""
        norm = self.residual_norm[index]
        return norm[..., position] / readout.median_of_others(norm, [0, self.position])

    def highest_peak(self, index: int, position: int) -> Float[Tensor, "prompt"]:
        """`peak` after the layer where it is highest on average [ratio]."""
        peak = self.peak(index, position)
        return peak[:, int(peak.mean(0).argmax())]

    def drain(self, index: int, position: int) -> Float[Tensor, "prompt"]:
        """Value norm at a position over the mean of the others, mean over later layers [ratio]."""
        norm = self.value_norm[index, :, self.later]
        others = torch.ones(norm.shape[-1], dtype=torch.bool)
        others[[0, self.position]] = False
        return (norm[..., position] / norm[..., others].mean(-1)).mean(-1)

    def nonmixture_dims(
        self, index: int, target: int, share: float = 0.5
    ) -> list[tuple[int, int, float]]:
        """List (layer, dim, mean value) of the dims that stand out at position 0 or the position.

        Args:
            index: Index of the condition.
            target: 0 for position 0, 1 for `position`.
            share: Smallest share of prompts in which a dim stands out.
        """
        x = self.ffn_output[index, :, :, target]
        median = ffn.median_over_dims(x)
        passes = ffn.nonmixture_dims(x, self.ffn_mixed_max[index], median).float().mean(0)
        return [
            (layer, dim, float(x[:, layer, dim].mean()))
            for layer, dim in (passes >= share).nonzero().tolist()
        ]

    def same_dims(self, index: int) -> Float[Tensor, "layer"]:
        """Cosine between the FFN outputs at the position and at 0, mean over prompts."""
        first, other = self.ffn_output[index].unbind(2)
        return torch.cosine_similarity(first, other, dim=-1).mean(0)

    def loss_change(self, index: int) -> dict[str, Interval] | None:
        """Loss minus that of the reference, at the position and after it; None without a loss."""
        if self.loss is None:
            return None
        change = self.loss[index] - self.loss[self.reference(index)]
        p = self.position
        without = torch.cat([change[:, :p], change[:, p + 1 : -1]], dim=1)
        return {
            "at_the_position": estimate(change[:, p]),
            "after_it": estimate(change[:, p + 1 : -1].mean(1)),
            "of_all_other_queries": estimate(without.mean(1)),
        }

    @property
    def where(self) -> str:
        """The later layers in words."""
        return f"layers {self.layers[0]} to {self.layers[-1]}"

    @property
    def seeing(self) -> str:
        """The queries whose attention is compared, in words."""
        return f"the queries {'after' if self.causal else 'other than 0 and'} {self.position}"

    def statistics(self) -> dict[str, Any]:
        """Attention, peaks, drains, non-mixture dims and losses of every condition."""
        facts: dict[str, Any] = {"position": self.position, "layers": self.layers}
        for index, name in enumerate(self.names):
            facts[name] = {
                "attention_to_0": estimate(self.attention_to(index, 0)),
                "attention_to_position": estimate(self.attention_to(index, 1)),
                "peak_at_0": estimate(self.highest_peak(index, 0)),
                "peak_at_position": estimate(self.highest_peak(index, self.position)),
                "drain_at_0": estimate(self.drain(index, 0)),
                "drain_at_position": estimate(self.drain(index, self.position)),
                "nonmixture_dims_at_0": self._dims(index, 0),
                "nonmixture_dims_at_position": self._dims(index, 1),
                "loss": None if self.loss is None else estimate(self._loss(index)),
                "loss_change": self.loss_change(index),
            }
        return facts

    def _loss(self, index: int) -> Float[Tensor, "prompt"]:
        assert self.loss is not None
        return self.loss[index, :, :-1].mean(1)

    def _dims(self, index: int, target: int) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "dim": dim, "value": value}
            for layer, dim, value in self.nonmixture_dims(index, target)
        ]

    def summary(self) -> str:
        """The statistics of every condition in a table, and what changed in sentences."""
        return _summary(self)

    def to_frame(self) -> pd.DataFrame:
        """Rows of condition, prompt, layer, position, metric and value, as figures take them.

        Every position as its mean over the later layers (layer -1), position 0 and the position
        in every layer, and each prompt's loss. `sink_attention` is that of the queries that
        `seeing` names.
        """
        prompts, layers, length = self.residual_norm.shape[1:]
        axes = {"condition": self.names, "prompt": range(prompts)}
        every_position = axes | {"layer": [-1], "position": range(length)}
        every_layer = axes | {"layer": range(layers), "position": [0, self.position]}
        pieces = []
        for metric in BY_POSITION:
            x = self[metric]
            mean = x[:, :, self.later].mean(2, keepdim=True)
            pieces.append(tidy(every_position, metric=metric, value=mean))
            pieces.append(tidy(every_layer, metric=metric, value=x[..., [0, self.position]]))
        pieces.append(tidy(every_layer, metric="sink_attention", value=self.paid.mean(3)))
        if self.loss is not None:
            mean = self.loss[:, :, :-1].mean(2)[..., None, None]
            pieces.append(tidy(axes | {"layer": [-1], "position": [-1]}, metric="loss", value=mean))
        return stacked(pieces)

    def figures(self) -> dict[str, go.Figure]:
        """Panels in the shape of the paper's figures 3 and 4, and the same by layer."""
        from sinkscope.plot import before_after

        frame = self._in_order(self.to_frame())
        averaged, layered = frame[frame["layer"] < 0], frame[frame["layer"] >= 0]
        panels: dict[str, Any] = dict(about=self.about, positions=(0, self.position))
        if len(set(self.changes)) > 2:
            panels["columns"] = len(set(self.starts))
        title = f"Attention of {self.seeing}, by layer"
        drawn = {
            "attention-by-layer": before_after(
                layered, "sink_attention", by="layer", title=title, **panels
            )
        }
        for metric in BY_POSITION:
            note = f"{self.about} · mean over {self.where}"
            if metric == "received_attention":  # summary and table state `paid`
                note += ", of all queries that see a position"
            drawn[f"{metric}-by-position"] = before_after(
                averaged, metric, **(panels | {"about": note})
            )
        for metric in BY_POSITION[1:]:
            drawn[f"{metric}-by-layer"] = before_after(layered, metric, by="layer", **panels)
        if self.loss is not None:
            drawn["loss"] = before_after(averaged, "loss", about=self.about, by="condition")
        return drawn

    def _in_order(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Sort the panels: a row per start, or a row per change where there are many changes."""
        if len(set(self.changes)) <= 2:
            return frame
        order = sorted(range(len(self.names)), key=lambda i: self.changes.index(self.changes[i]))
        rank = {self.names[index]: place for place, index in enumerate(order)}
        return frame.sort_values("condition", key=lambda names: names.map(rank), kind="stable")


@dataclass(frozen=True)
class Condition:
    """One panel of the paper's figures.

    Attributes:
        name: Its title, such as "special start · 255 designated".
        start: Of `STARTS`.
        change: What is done to the position; "unchanged" for the reference.
        texts: The prompts, with that start.
        enter: Makes the intervention.
    """

    name: str
    start: str
    change: str
    texts: Texts
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext


def observe(
    model: Any, prompts: Texts, conditions: list[Condition], position: int, progress: bool = True
) -> dict[str, Any]:
    """Measure every condition, and return the fields of `Conditions`.

    Args:
        model: A bridge.
        prompts: The prompts before any start token was inserted.
        conditions: In the order of the panels.
        position: The position that is changed.
        progress: Whether to draw a progress bar.
    """
    observed: list[dict[str, Tensor]] = []
    with tqdm(conditions, unit="condition", disable=not progress, leave=False) as bar:
        for condition in bar:
            with condition.enter():
                observed.append(_observe(model, condition, position))
    stacked = {name: torch.stack([one[name] for one in observed]) for name in observed[0]}
    own = all(condition.start == "given" for condition in conditions)
    return {
        "about": about(model, prompts, None if own else "as each condition says"),
        "position": position,
        "starts": tuple(condition.start for condition in conditions),
        "changes": tuple(condition.change for condition in conditions),
        "names": tuple(condition.name for condition in conditions),
        "causal": capabilities(model).causal,
        **stacked,
    }


def _observe(model: Any, condition: Condition, position: int) -> dict[str, Tensor]:
    quantities = {
        "received_attention": readout.RECEIVED,
        "value_norm": readout.VALUE_NORM,
        "residual_norm": readout.RESIDUAL_NORM,
        "ffn_output": readout.Quantity("mlp_out", lambda x, _: x[:, [0, position]].float()),
        "ffn_mixed_max": readout.FFN_MIXED_MAX,
        "paid": readout.Quantity("attention", lambda x, batch: paid(x, batch, position)),
    }
    measured = readout.measure(model, condition.texts, quantities, [0, position])
    loss = readout.losses(model, condition.texts)
    return measured if loss is None else measured | {"loss": loss}


def paid(x: AttentionReader, batch: Batch, position: int) -> Float[Tensor, "prompt head target"]:
    """Attention to 0 and to the position, from the queries after both."""
    index = torch.arange(batch.length, device=batch.mask.device)
    queries = batch.mask & (index != 0) & (index != position)
    if batch.causal:
        queries = queries & (index > position)
    targets = [x.on_keys(_only(batch.mask, key)) for key in (0, position)]
    return torch.stack([masked_mean(paid, queries[:, None], dim=-1) for paid in targets], dim=-1)


def _only(mask: Bool[Tensor, "prompt key"], key: int) -> Bool[Tensor, "prompt key"]:
    keys = torch.zeros_like(mask)
    keys[:, key] = True
    return keys


def started(
    model: Any, texts: Texts, starts: Iterable[str], ends: bool, seed: int
) -> dict[str, Texts]:
    """Return the prompts with each kind of start token, and with `ends` also of end token.

    Args:
        model: A bridge.
        texts: The prompts.
        starts: Of `STARTS`.
        ends: Whether to replace the last token too.
        seed: Seed of the random tokens.

    Raises:
        UnsupportedError: If a start is unknown, or none is named.
        TextError: If the model's tokenizer has no special token.
    """
    made: dict[str, Texts] = {}
    for start in readout.chosen(starts, STARTS, "starts"):
        made[start] = texts
        if start != "given":
            made[start] = ReplaceStart(model, start, seed=seed)(made[start])
            if ends:
                made[start] = ReplaceEnd(model, start, seed=seed + 1)(made[start])
    return made


def designated(model: Any, texts: Any, position: int | None) -> tuple[Texts, int]:
    """Return the prompts and the position to change, which has predicting queries after it.

    Args:
        model: A bridge.
        texts: The prompts.
        position: The position; None for `default_position`.

    Raises:
        TextError: If prompts differ in length, or end at the position or too soon after it.
    """
    prompts = readout.even(model, texts)
    position = default_position(prompts.tokens.shape[1], position)
    return readout.even(model, prompts, position, after=1 + readout.has_loss(model)), position


def default_position(length: int, position: int | None) -> int:
    """Return the paper's 255 if prompts are long enough, otherwise two thirds of their length.

    Args:
        length: Tokens of each prompt.
        position: The requested position; None for the default.

    Raises:
        TextError: If the position is the first one.
    """
    if position is None:
        return 255 if length > 272 else max(1, min(2 * length // 3, length - 3))
    if position < 1:
        raise TextError(
            f"Position {position} cannot be made a sink beside position 0; choose one from 1."
        )
    return position


def _summary(result: Conditions) -> str:
    usual = _dims(result, 0, 0)
    parts = [_head(result), _table(result)]
    parts += [f"Non-mixture dims of position 0, {result.names[0]}: {_listed(usual)}."]
    parts += [
        f"{result.starts[index]} start, {change}: {_sentence(result, index, usual)}"
        for index, change in enumerate(result.changes)
        if change != "unchanged"
    ]
    return "\n".join(parts)


def _head(result: Conditions) -> str:
    return (
        f"Attention: of {result.seeing} to a position, mean over heads and {result.where}. "
        "Peak: residual norm over the median of the other positions, after the layer where it is "
        f"highest. Drain: value norm over the mean of the others, mean over {result.where}. "
        "95 % intervals over prompts."
    )


def _table(result: Conditions) -> str:
    rows = []
    for index, (start, change) in enumerate(zip(result.starts, result.changes, strict=True)):
        for target, position in enumerate((0, result.position)):
            row = [
                "" if target else f"{start}, {change}",
                str(position),
                estimate(result.attention_to(index, target)).to_decimals(3),
                str(estimate(result.highest_peak(index, position))),
                estimate(result.drain(index, position)).to_decimals(3),
            ]
            rows.append(row)
    return table_as_text(["start, change", "at", "attention", "peak", "drain"], rows)


def _sentence(result: Conditions, index: int, usual: Dims) -> str:
    """What changed against the same start unchanged."""
    before, p = result.reference(index), result.position
    moves = [
        f"{where} {float(result.attention_to(before, target).mean()):.3f} → "
        f"{float(result.attention_to(index, target).mean()):.3f}"
        for target, where in ((1, f"attention to {p}"), (0, "to 0"))
    ]
    dims = _dims(result, index, 1)
    same = "the same as those of 0" if dims and dims == usual else _listed(dims)
    words = [f"{', '.join(moves)}; non-mixture dims of {p}: {same}."]
    change = result.loss_change(index)
    if change is not None:
        after = change["after_it"]
        unsure = ", not significantly different from 0" if after.low <= 0 <= after.high else ""
        words.append(f"The loss of the tokens after {p} changes by {after.signed()} nat{unsure}.")
    return " ".join(words)


def _dims(result: Conditions, index: int, target: int) -> Dims:
    return frozenset((layer, dim) for layer, dim, _ in result.nonmixture_dims(index, target))


def _listed(dims: Dims) -> str:
    """Dims with the layers that write them: "507 (layers 11, 28 and 29)"."""
    layers: dict[int, list[str]] = {}
    for layer, dim in sorted(dims):
        layers.setdefault(dim, []).append(str(layer))
    named = [
        f"{dim} (layer{'s' if len(where) > 1 else ''} {listed(where)})"
        for dim, where in layers.items()
    ]
    return listed(named) or "none"
