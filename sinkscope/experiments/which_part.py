"""Which part of what makes a position a sink is sufficient, and which is necessary.

Ours, after Yan et al. 2024 (arXiv 2407.01601), who make a sink by a mask, and Li et al. (arXiv
2605.06611).

1. Measure the natural sink, position 0: the layer that adds most to its residual norm, and the
   FFN-output dims that stand out there (`metrics.ffn.nonmixture_dims`).
2. At position 0, set those dims to zero or to their mean, or the norm to an ordinary one.
3. At another position, apply a self-only mask in some layers only, or with the dims set to zero; or
   no mask, with the dims or the norm set to the sink's.
4. Report attention to the position, residual peak and loss in each case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.errors import UnsupportedError
from sinkscope.experiments import conditions, readout
from sinkscope.experiments.conditions import Condition
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.interventions import ScaleActivation, SelfOnlyMask, SetActivation
from sinkscope.metrics import ffn
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.output import number, table_as_text
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WhichPart(Result):
    """Attention, peak and loss when only a part of what makes a sink is present.

    Attributes:
        position: The designated position.
        peak_layer: The layer that adds most to ‖h_0‖.
        dims: The FFN-output dims of that layer that were set.
        dims_by_rule: Whether those pass the non-mixture rule, or are only its three largest.
        cases: What was done, in words.
        targets: Which position each case is about: 0 or `position`. The first case is the natural
            sink, position 0 of the unchanged model.
        paid: Attention to the target in the later layers, mean over heads [probability].
        peak: ‖h_target‖ over the median of the others, where highest [ratio].
        loss: Mean loss of the queries after the position [nat]; None without a trained head.
    """

    QUESTION = "Which part of what makes the sink is sufficient, and which is necessary?"

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
        """Attention to the target as a share of that to the natural sink.

        Args:
            case: Index of the case.
        """
        return float(self.paid[case].mean() / self.paid[0].mean())

    def statistics(self) -> dict[str, Any]:
        """One record per case."""
        rows = []
        for case, name in enumerate(self.cases):
            row: dict[str, Any] = {
                "case": name,
                "target": self.targets[case],
                "attention": estimate(self.paid[case]),
                "share_of_sink": self.left(case),
                "peak": estimate(self.peak[case]),
            }
            if self.loss is not None:
                row["loss"] = estimate(self.loss[case])
            rows.append(row)
        return {
            "position": self.position,
            "peak_layer": self.peak_layer,
            "dims": list(self.dims),
            "dims_by_rule": self.dims_by_rule,
            "cases": rows,
        }

    def summary(self) -> str:
        """The cases in a table."""
        dims = ", ".join(map(str, self.dims))
        kind = "non-mixture dims" if self.dims_by_rule else "largest dims (none passes the rule)"
        head = (
            f"Layer {self.peak_layer} adds most to the residual norm of position 0; {kind} of its "
            f"FFN output: {dims}. Attention is that of the queries after {self.position} (all "
            "others, where attention is bidirectional) in the later half of the layers, share is "
            "its ratio to the attention to position 0 in the unchanged model. 95 % intervals over "
            "prompts."
        )
        rows = []
        for case, name in enumerate(self.cases):
            row = [
                name,
                str(self.targets[case]),
                estimate(self.paid[case]).to_decimals(3),
                f"{100 * self.left(case):.0f} %",
                number(float(self.peak[case].mean())),
            ]
            if self.loss is not None:
                row.append(f"{float(self.loss[case].mean()):.3f}")
            rows.append(row)
        columns = ["what was done", "at", "attention", "share", "peak"]
        columns += ["loss"] if self.loss is not None else []
        return f"{head}\n{table_as_text(columns, rows)}"

    def to_frame(self) -> pd.DataFrame:
        """Rows of condition (the case), prompt, layer (-1), position, metric and value."""
        pieces = []
        quantities = {"sink_attention": self.paid, "residual_peak": self.peak, "loss": self.loss}
        for metric, x in quantities.items():
            if x is None:
                continue
            axes = {"condition": self.cases, "prompt": range(x.shape[1]), "layer": [-1]}
            positions = np.repeat(self.targets, x.shape[1])
            pieces.append(tidy(axes, position=positions, metric=metric, value=x[..., None]))
        return stacked(pieces)

    def figures(self) -> dict[str, go.Figure]:
        """Every case side by side, for the designated position and for position 0."""
        from sinkscope.plot import before_after

        frame = self.to_frame()
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


Enter = Callable[[], AbstractContextManager[Any]]


def which_part(
    model: Any,
    texts: Any,
    position: int | None = None,
    *,
    start: str = "special",
    first_layers: Iterable[int] = (1, 2, 3),
    seed: int = 0,
    progress: bool = True,
) -> WhichPart:
    """Test each part of what makes a position a sink on its own.

    At `position`, designated by a self-only mask: the mask in the first layers only, in the layers
    up to the peak, only after it; everywhere but with the non-mixture dims set to zero; and without
    any mask, the dims set to what they are at the sink, or the norm scaled to the sink's. At the
    natural sink 0: the dims to zero and to their mean, and the norm scaled to an ordinary one.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length that go beyond `position`.
        position: The position; 255 by default, or two thirds of the way along short prompts.
        start: "special", "random" or "given".
        first_layers: Numbers of first layers to mask alone, one case each.
        seed: Seed of the random tokens.
        progress: Whether to draw a progress bar.

    Returns:
        One row per case, the natural sink first.

    Raises:
        UnsupportedError: If a number of first layers is not a whole number from 1.
        TextError: If prompts differ in length or end before the position.
    """
    model = load_model(model)
    first_layers = _counts(first_layers)
    prompts, position = conditions.designated(model, texts, position)
    prompts = conditions.started(model, prompts, [start], False, seed)[start]
    sink = _Sink.measure(model, prompts, position)
    cases = [*_natural(model, sink), *_designated(model, position, sink, first_layers)]
    result = []
    for name, _, enter in tqdm(cases, unit="case", disable=not progress, leave=False):
        case = Condition(name, start, "unchanged", prompts, enter)
        result.append(_read(model, case, position))
    targets = [target for _, target, _ in cases]
    losses = [one["loss"] for one in result if one["loss"] is not None]
    return WhichPart(
        about=about(model, prompts),
        position=position,
        peak_layer=sink.layer,
        dims=sink.dims,
        dims_by_rule=sink.by_rule,
        cases=tuple(name for name, _, _ in cases),
        targets=tuple(position if target else 0 for target in targets),
        paid=torch.stack([one["paid"][:, at] for one, at in zip(result, targets, strict=True)]),
        peak=torch.stack([one["peak"][:, at] for one, at in zip(result, targets, strict=True)]),
        loss=torch.stack(losses) if losses else None,
    )


def _counts(first_layers: Iterable[int]) -> tuple[int, ...]:
    """Check the numbers of first layers to mask.

    Raises:
        UnsupportedError: If one is not a whole number from 1.
    """
    wanted = tuple(first_layers)
    for n in wanted:
        if type(n) is not int or n < 1:
            raise UnsupportedError(
                f"{n!r} first layers cannot be masked alone; expected whole numbers from 1, such "
                "as (1, 2)."
            )
    return wanted


@dataclass(frozen=True)
class _Sink:
    """The natural sink in the layer that writes the peak.

    Attributes:
        layer: The layer that adds most to ‖h_0‖.
        dims: Its FFN's dims that stand out at 0.
        by_rule: Whether they pass the non-mixture rule.
        written: FFN output at 0 in those dims, mean over prompts.
        residual: Residual state at 0 in those dims after that layer, mean over prompts.
        norm: ‖h_0‖ after that layer.
        ordinary: Median norm of the others there.
    """

    layer: int
    dims: tuple[int, ...]
    by_rule: bool
    written: Float[Tensor, "dim"]
    residual: Float[Tensor, "dim"]
    norm: float
    ordinary: float

    @classmethod
    def measure(cls, model: Any, prompts: Texts, position: int) -> _Sink:
        """Measure the unchanged model."""
        wanted = {
            "norm": readout.RESIDUAL_NORM,
            "ffn": readout.at("mlp_out", 0),
            "mixed": readout.FFN_MIXED_MAX,
            "resid": readout.at("resid_post", 0),
        }
        measured = readout.measure(model, prompts, wanted)
        norm = measured["norm"].mean(0)
        growth = torch.diff(norm[:, 0], prepend=norm.new_zeros(1))
        layer = int(growth.argmax())
        x = measured["ffn"][:, layer]
        stands = ffn.nonmixture_dims(x, measured["mixed"][:, layer], ffn.median_over_dims(x))
        dims = tuple((stands.float().mean(0) >= 0.5).nonzero()[:, 0].tolist())
        by_rule = bool(dims)
        if not dims:
            dims = tuple(x.mean(0).abs().argsort(descending=True)[:3].tolist())
        return cls(
            layer=layer,
            dims=dims,
            by_rule=by_rule,
            written=x.mean(0)[list(dims)],
            residual=measured["resid"][:, layer].mean(0)[list(dims)],
            norm=float(norm[layer, 0]),
            ordinary=float(readout.median_of_others(norm[None], [0])[0, layer]),
        )


Case = tuple[str, int, Enter]
"""Name, target (0: position 0, 1: the position), and what to enter."""


def _natural(model: Any, sink: _Sink) -> list[Case]:
    """Cases about position 0, the unchanged model first."""

    def dims(value: Any) -> Enter:
        return lambda: SetActivation(model, sink.layer, sink.dims, 0, value, at="mlp_out")

    def norm() -> ScaleActivation:
        return ScaleActivation(model, sink.layer, 0, norm=sink.ordinary)

    return [
        ("unchanged", 0, nullcontext),
        ("the peak's dims set to 0", 0, dims("zero")),
        ("the peak's dims set to their mean", 0, dims(sink.written)),
        ("only the norm, set to an ordinary one", 0, norm),
    ]


def _designated(model: Any, p: int, sink: _Sink, first_layers: Iterable[int]) -> list[Case]:
    """Cases about position `p`."""
    n_layers = capabilities(model).n_layers
    peak = sink.layer

    def mask(layers: Iterable[int] | None = None) -> Enter:
        return lambda: SelfOnlyMask(model, p, layers=layers)

    def dims(value: Any, at: str) -> Enter:
        return lambda: SetActivation(model, peak, sink.dims, p, value, at=at)

    def norm() -> ScaleActivation:
        return ScaleActivation(model, peak, p, norm=sink.norm)

    first = [
        (f"masked in layers 0 to {n - 1}" if n > 1 else "masked in layer 0 only", 1, mask(range(n)))
        for n in first_layers
        if n <= n_layers and n != peak + 1
    ]
    after = range(peak + 1, n_layers)
    return [
        ("unchanged", 1, nullcontext),
        ("masked in every layer", 1, mask()),
        *first,
        (f"masked up to the peak (layer {peak})", 1, mask(range(peak + 1))),
        *([("masked only after the peak", 1, mask(after))] if len(after) else []),
        ("masked, the peak's dims set to 0", 1, _together(mask(), dims("zero", "mlp_out"))),
        ("unmasked, the dims set to the sink's", 1, dims(sink.residual, "resid_post")),
        ("unmasked, only the norm set to the sink's", 1, norm),
    ]


def _together(*enter: Enter) -> Enter:
    @contextmanager
    def entered() -> Any:
        with ExitStack() as stack:
            for one in enter:
                stack.enter_context(one())
            yield

    return entered


def _read(model: Any, case: Condition, position: int) -> dict[str, Any]:
    """Attention to and peaks of both targets [prompt target], and the later loss [prompt]."""
    wanted = {
        "norm": readout.RESIDUAL_NORM,
        "paid": readout.Quantity("attention", lambda x, batch: conditions.paid(x, batch, position)),
    }
    with case.enter():
        measured = readout.measure(model, case.texts, wanted)
        loss = readout.losses(model, case.texts)
    norm = measured["norm"]
    median = readout.median_of_others(norm, [0, position])
    ratio = norm[..., [0, position]] / median[..., None]
    later = norm.shape[1] // 2
    return {
        "peak": ratio.amax(1),
        "paid": measured["paid"][:, later:].mean((1, 2)),
        "loss": None if loss is None else loss[:, position + 1 : -1].mean(1),
    }
