"""The life of the sink: which parts write, carry and erase its residual state.

After the small models of legibleweights, "outlier-position-anatomy" (writers and an eraser,
constant share of energy), and Sun et al. 2026 (arXiv 2603.05498: blocks of steps up and down; each
spike channel of a gated FFN is a quadratic form with one trigger direction).

1. u is the direction of the mean over prompts of the sink's residual state, after the layer where
   its norm is largest. What a part adds along it is its output at the sink times u. These and the
   embedding add up to the residual state along u, layer by layer, which is checked: where a norm
   stands behind each addition (BERT) they do not, and no share of the state is a part's.
2. A part that adds at least a tenth of the largest value along u is a writer, one that removes as
   much an eraser, every other a carrier. The blocks that add and remove most are the steps.
3. How much of the sink's state is the same in all prompts: ‖mean_p h‖² / mean_p ‖h‖², and the mean
   cosine between two prompts' states, at the sink and half-way between it and the end. Where all
   prompts have the same token at a causal position 0 the first two are 1 by definition.
4. In the FFN that adds most: what each neuron n adds, a_n W_out[n]·w, w the direction of the FFN's
   mean output at the sink.
5. If that FFN is gated, its output in the largest channel k is close to xᵀ S x while the gates are
   open: S is the symmetric part of Σ_n W_out[n, k] g_n v_nᵀ, with g_n and v_n the neuron's gate and
   input weights. Its eigenvector of largest |λ| is the trigger; x·s is read at every position.
6. Set the output of each writer, and of all of them, to zero at the sink, and measure attention to
   it and the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.capture import runner
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.experiments.trace_peak import PART_WORDS, PARTS
from sinkscope.interventions import RemoveOutput
from sinkscope.metrics.reductions import at_least_fp32
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.output import counted, listed, number, table_as_text
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import estimate
from sinkscope.validation import whole_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ROLE = 0.1
"""Smallest share of the largest value along the sink's direction for a writer or eraser."""
_AMISS = 0.05
"""Of that value, by which parts may fail to add up: bfloat16 rounds each of a hundred additions."""
_TOP = 5


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SinkLife(Result):
    """The sink's residual state from the embedding to the last layer.

    Attributes:
        sink: The sink position.
        control: Another position, for comparison.
        parts: Names along `part`: attention, ffn.
        tokens_at_sink: How many different tokens the prompts have at the sink [count].
        start: Input of the first block along the sink's direction [activation].
        along: The sink's residual state after each layer along that direction [activation].
        added: What each part adds along it [activation].
        norm: Norm of the sink's residual state [activation].
        ratio: The same over the median of the other positions [ratio].
        constant_share: Share of the energy that is one vector in all prompts, at the sink and at
            `control` [share].
        mean_cosine: Mean cosine between two prompts' states there; nan for one prompt.
        ffn_layer: The block whose FFN adds most.
        neuron: Its neurons that add most, strongest first.
        neuron_share: Share of the FFN's output along its own direction that each adds [share].
        no_neurons: Why neurons are unknown; "" where they are known.
        channel: The residual dim in which that FFN's output at the sink is largest.
        trigger: x·s, the FFN's input along the trigger, at every position [activation].
        trigger_energy: Share of ‖x‖² along the trigger [share].
        eigenvalue: The quadratic form's two largest eigenvalues by size.
        rank_one: λ₁² / Σ λ², the share of the form that is the trigger's [share].
        quadratic: xᵀ S x at the sink [activation].
        written: The FFN's output there in that channel, before any norm behind it [activation].
        no_trigger: Why there is no trigger; "" where there is one.
        removed: The cases of the last step, each a tuple of (block, part).
        attention: Mean attention of all heads to the sink; case 0 is the unchanged model
            [probability].
        ratio_without: `ratio` in each case.
        loss: Mean loss after the sink [nat]; None for a model without one.
    """

    QUESTION = "Where does the sink come from, what keeps it, and what takes it away?"

    sink: int
    control: int
    parts: tuple[str, ...]
    tokens_at_sink: int
    start: Float[Tensor, "prompt"]
    along: Float[Tensor, "prompt layer"]
    added: Float[Tensor, "part prompt layer"]
    norm: Float[Tensor, "prompt layer"]
    ratio: Float[Tensor, "prompt layer"]
    constant_share: Float[Tensor, "place layer"]
    mean_cosine: Float[Tensor, "place layer"]
    ffn_layer: int
    neuron: Int[Tensor, "neuron"] | None
    neuron_share: Float[Tensor, "neuron"] | None
    no_neurons: str
    channel: int | None
    trigger: Float[Tensor, "prompt position"] | None
    trigger_energy: Float[Tensor, "prompt position"] | None
    eigenvalue: Float[Tensor, "eigenvalue"] | None
    rank_one: float | None
    quadratic: Float[Tensor, "prompt"] | None
    written: Float[Tensor, "prompt"] | None
    no_trigger: str
    removed: tuple[tuple[tuple[int, str], ...], ...]
    attention: Float[Tensor, "case prompt layer"]
    ratio_without: Float[Tensor, "case prompt layer"]
    loss: Float[Tensor, "case prompt"] | None

    @property
    def peak_layer(self) -> int:
        """The layer after which the sink's norm, mean over prompts, is largest."""
        return int(self.norm.mean(0).argmax())

    def shares(self) -> Float[Tensor, "layer part"]:
        """What each part adds along the direction over the largest value along it [share]."""
        return (self.added.mean(1) / self.along.mean(0).max()).T

    def roles(self) -> dict[tuple[int, str], str]:
        """Whether each (block, part) is a "writer", "carrier" or "eraser"."""
        shares = self.shares()
        return {
            (layer, part): "writer" if share >= ROLE else "eraser" if share <= -ROLE else "carrier"
            for layer, row in enumerate(shares.tolist())
            for part, share in zip(self.parts, row, strict=True)
        }

    def of_role(self, role: str) -> list[tuple[int, str, float]]:
        """The (block, part, share) of a role, in the order of the blocks.

        Args:
            role: "writer", "carrier" or "eraser".
        """
        shares = self.shares()
        return [
            (layer, part, float(shares[layer, self.parts.index(part)]))
            for (layer, part), one in self.roles().items()
            if one == role
        ]

    def steps(self) -> dict[str, tuple[int, float]]:
        """The blocks that add ("up") and remove ("down") most along the direction [share]."""
        change = self.shares().sum(1)
        up, down = int(change.argmax()), int(change.argmin())
        return {"up": (up, float(change[up])), "down": (down, float(change[down]))}

    def statistics(self) -> dict[str, Any]:
        """Roles, steps, constant share, neurons, trigger, and the effect of removing writers."""
        at = self.peak_layer
        facts: dict[str, Any] = {
            "sink": self.sink,
            "tokens_at_sink": self.tokens_at_sink,
            "peak_layer": at,
            "peak_ratio": estimate(self.ratio[:, at]),
            "along": self.along.mean(0).tolist(),
            "writers": [self._part(*one) for one in self.of_role("writer")],
            "erasers": [self._part(*one) for one in self.of_role("eraser")],
            "steps": {name: list(step) for name, step in self.steps().items()},
            "constant_share": self.constant_share[0].tolist(),
            "constant_share_elsewhere": self.constant_share[1].tolist(),
            "mean_cosine": self.mean_cosine[0].tolist(),
            "mean_cosine_elsewhere": self.mean_cosine[1].tolist(),
            "ffn_layer": self.ffn_layer,
            "neurons": self.no_neurons,
            "trigger": self.no_trigger,
            "removed": self._removals(),
        }
        if self.neuron is not None and self.neuron_share is not None:
            pairs = zip(self.neuron.tolist(), self.neuron_share.tolist(), strict=True)
            facts["neurons"] = [{"neuron": n, "share": share} for n, share in pairs]
        if self.trigger is not None:
            facts["trigger"] = self._trigger()
        return facts

    def _part(self, layer: int, part: str, share: float) -> dict[str, Any]:
        added = self.added[self.parts.index(part), :, layer]
        largest = float(self.along.mean(0).max())
        return {"block": layer, "part": part, "share": estimate(added / largest)}

    def _trigger(self) -> dict[str, Any]:
        """How far the sink stands out along the trigger."""
        assert self.trigger is not None and self.trigger_energy is not None
        assert self.eigenvalue is not None
        size = self.trigger.abs()
        others = torch.ones(size.shape[1], dtype=torch.bool)
        others[self.sink] = False
        return {
            "channel": self.channel,
            "eigenvalues": self.eigenvalue.tolist(),
            "rank_one": self.rank_one,
            "sink": estimate(size[:, self.sink]),
            "others_median": estimate(size[:, others].quantile(0.5, dim=1)),
            "others_largest": estimate(size[:, others].amax(1)),
            "energy_at_sink": estimate(self.trigger_energy[:, self.sink]),
            "quadratic": estimate(self.quadratic),
            "written": estimate(self.written),
        }

    def _removals(self) -> list[dict[str, Any]]:
        """One record per case."""
        rows = []
        for case, removed in enumerate(self.removed):
            row: dict[str, Any] = {
                "removed": [list(one) for one in removed],
                "attention": estimate(self.attention[case].mean(1)),
                "peak_ratio": estimate(self.ratio_without[case].amax(1)),
            }
            if self.loss is not None:
                row["loss"] = estimate(self.loss[case])
                row["loss_change"] = estimate(self.loss[case] - self.loss[0])
            rows.append(row)
        return rows

    def summary(self) -> str:
        """Writers, erasers and trigger in words, and the effect of removing writers in a table."""
        return _summary(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per metric, part, prompt, layer and position: metric, part, …, value.

        `part` is the part, the place ("sink", "control") or the case; layer, position and prompt
        are -1 where a row has none.
        """
        prompts, layers = range(self.norm.shape[0]), range(self.norm.shape[1])
        names = [_named(removed) for removed in self.removed]
        places = {"part": ["sink", "control"], "prompt": [-1], "layer": layers, "position": [-1]}
        by_layer = {"prompt": prompts, "layer": layers}
        at_sink = {"part": ["sink"], **by_layer}
        pieces = [
            self._rows("added", {"part": self.parts, **by_layer}, self.added),
            self._rows("along", at_sink, self.along[None]),
            self._rows("residual_peak", at_sink, self.ratio[None]),
            tidy(places, metric="constant_share", value=self.constant_share[:, None, :, None]),
            tidy(places, metric="mean_cosine", value=self.mean_cosine[:, None, :, None]),
            self._rows("sink_attention", {"part": names, **by_layer}, self.attention),
        ]
        if self.loss is not None:
            axes = {"part": names, "prompt": prompts, "layer": [-1]}
            pieces.append(self._rows("loss", axes, self.loss[..., None]))
        if self.trigger is not None:
            positions = range(self.trigger.shape[1])
            axes = {"part": ["ffn"], "prompt": prompts, "layer": [self.ffn_layer]}
            value = self.trigger.abs()[None, :, None]
            pieces.append(tidy(axes | {"position": positions}, metric="trigger", value=value))
        return stacked(pieces)

    def _rows(self, metric: str, axes: dict[str, Any], value: Tensor) -> pd.DataFrame:
        return tidy(axes | {"position": [-1]}, metric=metric, value=value[..., None])

    def figures(self) -> dict[str, go.Figure]:
        """All panels in one figure."""
        from sinkscope.plot import sink_life as draw

        return {"life": draw(self.to_frame(), about=self.about)}


def sink_life(
    model: Any, texts: Any, *, sink: int = 0, most_removed: int = 4, progress: bool = True
) -> SinkLife:
    """Follow the sink's residual state from the embedding to the last layer.

    Costs three passes over the texts, and two for each writer that is removed. Nothing is kept to
    resume from: SmolLM2-135M takes half a minute on one core with 8 prompts of 64 tokens.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length.
        sink: The sink position.
        most_removed: How many writers to remove one by one, the strongest first.
        progress: Whether to draw a progress bar.

    Returns:
        Writers, carriers and erasers; steps; constant share; neurons and trigger; and the model
        without the writers.

    Raises:
        TextError: If the prompts differ in length or end before the sink.
        UnsupportedError: If the model shows no attention or FFN outputs, or these do not add up to
            its residual stream.
    """
    model = load_model(model)
    sink = whole_number("sink", sink, error=TextError)
    most_removed = whole_number("most_removed", most_removed, error=UnsupportedError)
    prompts = readout.even(model, texts, sink, after=2)
    control = sink + (prompts.tokens.shape[1] - sink) // 2
    wanted = {
        "norm": readout.RESIDUAL_NORM,
        "before": readout.at("resid_pre", sink),
        "state": readout.at("resid_post", sink),
        "control": readout.at("resid_post", control),
        **{part: readout.at(f"{hook}_out", sink) for part, hook in PARTS.items()},
    }
    measured = readout.measure(model, prompts, wanted, [sink])
    norm = measured["norm"][..., sink]
    mean = measured["state"].double().mean(0)[int(norm.mean(0).argmax())]
    u = mean / mean.norm()
    added = torch.stack([measured[part].double() @ u for part in PARTS])
    same = [_constant(measured[place].double()) for place in ("state", "control")]
    along = measured["state"].double() @ u
    start = measured["before"][:, 0].double() @ u
    _check_sum(model, start[:, None] + added.sum(0).cumsum(1), along)
    ffn_layer = int(added[1].mean(0).argmax())
    whole = SinkLife(
        about=about(model, prompts),
        sink=sink,
        control=control,
        parts=tuple(PARTS),
        tokens_at_sink=len(prompts.tokens[:, sink].unique()),
        start=start.float(),
        along=along.float(),
        added=added.float(),
        norm=norm,
        ratio=norm / readout.median_of_others(measured["norm"], [sink]),
        constant_share=torch.stack([one[0] for one in same]).float(),
        mean_cosine=torch.stack([one[1] for one in same]).float(),
        ffn_layer=ffn_layer,
        **_neurons(model, prompts, sink, ffn_layer),
        removed=(),
        attention=torch.empty(0, *norm.shape[:2]),
        ratio_without=torch.empty(0, *norm.shape[:2]),
        loss=None,
    )
    writers = whole.of_role("writer")
    strongest = sorted(writers, key=lambda one: -one[2])[:most_removed]
    cases = [(), *(((layer, part),) for layer, part, _ in strongest)]
    if len(writers) > 1:
        cases.append(tuple((layer, part) for layer, part, _ in writers))
    read = [
        _without(model, prompts, sink, case)
        for case in tqdm(cases, unit="case", disable=not progress, leave=False)
    ]
    losses = [one["loss"] for one in read if one["loss"] is not None]
    return replace(
        whole,
        removed=tuple(cases),
        attention=torch.stack([one["attention"] for one in read]),
        ratio_without=torch.stack([one["ratio"] for one in read]),
        loss=torch.stack(losses) if losses else None,
    )


def _check_sum(
    model: Any, summed: Float[Tensor, "prompt layer"], along: Float[Tensor, "prompt layer"]
) -> None:
    """Refuse a model in which embedding, attention and FFN do not add up to the residual stream.

    Raises:
        UnsupportedError: If they do not.
    """
    largest = along.abs().max()
    if not bool(((summed - along).abs() <= _AMISS * largest).all()):
        raise UnsupportedError(
            f"In {capabilities(model).architecture} the outputs of attention and FFN do not add up "
            "to the residual stream, as where a norm follows each addition, so that none has a "
            "share of it; `sinkscope trace-peak MODEL` measures the model without each of them."
        )


def _constant(
    state: Float[Tensor, "prompt layer dim"],
) -> tuple[Float[Tensor, "layer"], Float[Tensor, "layer"]]:
    """‖mean_p h‖² / mean_p ‖h‖², and the mean cosine over pairs of different prompts."""
    share = state.mean(0).square().sum(-1) / state.square().sum(-1).mean(0)
    unit = state / state.norm(dim=-1, keepdim=True)
    count = len(state)
    pairs = unit.sum(0).square().sum(-1) - count
    cosine = pairs / (count * (count - 1)) if count > 1 else torch.full_like(share, torch.nan)
    return share, cosine


def _without(
    model: Any, prompts: Texts, sink: int, removed: Iterable[tuple[int, str]]
) -> dict[str, Any]:
    """Measure attention to the sink, its peak and the loss, with some parts set to zero there."""
    with ExitStack() as stack:
        for layer, part in removed:
            stack.enter_context(RemoveOutput(model, layer, PARTS[part], sink))
        wanted = {"attention": readout.TO_SINKS, "norm": readout.RESIDUAL_NORM}
        measured = readout.measure(model, prompts, wanted, [sink])
        loss = readout.losses(model, prompts)
    norm = measured["norm"]
    return {
        "attention": measured["attention"].mean(-1),
        "ratio": norm[..., sink] / readout.median_of_others(norm, [sink]),
        "loss": None if loss is None else loss[:, sink + 1 : -1].mean(1),
    }


# -- the FFN that writes ---------------------------------------------------------------------------


@torch.inference_mode()
def _neurons(model: Any, prompts: Texts, sink: int, layer: int) -> dict[str, Any]:
    """Return the neurons that add most, and a gated FFN's trigger, or reasons for none."""
    none = dict.fromkeys(
        ("neuron", "neuron_share", "channel", "trigger", "trigger_energy", "eigenvalue",
         "rank_one", "quadratic", "written")
    )  # fmt: skip
    ffn = getattr(model.blocks[layer], "mlp", None)
    linear = {} if ffn is None else {name: _linear(ffn, name) for name in ("gate", "in", "out")}
    if linear.get("in") is None or linear.get("out") is None:
        reason = f"the FFN of block {layer} is not one pair of linear maps with neurons between"
        return none | {"no_neurons": reason, "no_trigger": reason}
    seen = _inputs(model, prompts, {"x": linear["in"], "a": linear["out"]})
    out = _weight(linear["out"], seen["a"].shape[-1])
    a = seen["a"][:, sink].double()
    written = a @ out  # without the bias, which is not from neurons
    w = written.mean(0) / written.mean(0).norm()
    shares = a.mean(0) * (out @ w) / (written.mean(0) @ w)
    top = shares.abs().argsort(descending=True)[:_TOP]
    facts = none | {
        "neuron": top.cpu(),
        "neuron_share": shares[top].float().cpu(),
        "no_neurons": "",
        "no_trigger": f"the FFN of block {layer} has no gate, so no channel is a quadratic form",
    }
    if linear["gate"] is None:
        return facts
    x = seen["x"].double()
    channel = int(written.mean(0).abs().argmax())
    gates, inputs = (_weight(linear[name], x.shape[-1]) for name in ("gate", "in"))
    form = (gates * out[:, channel]) @ inputs.T
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    order = values.abs().argsort(descending=True)
    s = vectors[:, order[0]]
    along = x @ s
    energy = along.square() / x.square().sum(-1)
    at_sink = x[:, sink]
    return facts | {
        "channel": channel,
        "trigger": along.float().cpu(),
        "trigger_energy": energy.float().cpu(),
        "eigenvalue": values[order[:2]].float().cpu(),
        "rank_one": float(values[order[0]].square() / values.square().sum()),
        "quadratic": torch.einsum("pd,de,pe->p", at_sink, form, at_sink).float().cpu(),
        "written": written[:, channel].float().cpu(),
        "no_trigger": "",
    }


def _linear(ffn: Any, name: str) -> nn.Module | None:
    """Return the linear map of that name in a bridge's FFN, or None."""
    from transformers.pytorch_utils import Conv1D

    inner = getattr(ffn, name, None)
    inner = getattr(inner, "original_component", inner)
    return inner if type(inner) in (nn.Linear, Conv1D) else None


def _weight(linear: nn.Module | None, size: int) -> Float[Tensor, "input output"]:
    """Return its matrix, W in xW, in float64."""
    assert linear is not None
    weight = next(iter(linear.parameters())).detach()
    eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
    return (linear(eye).double() - linear(torch.zeros_like(eye[:1])).double()).detach()


def _inputs(
    model: Any, prompts: Texts, modules: dict[str, nn.Module | None]
) -> dict[str, Float[Tensor, "prompt position dim"]]:
    """Return the inputs of some modules at every position."""
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():
        assert module is not None

        def keep(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            kept[name].append(at_least_fp32(args[0]).detach())

        handles.append(module.register_forward_pre_hook(keep))
    device = input_device(model)
    try:
        with runner.evaluating(model):
            for tokens in prompts.tokens.split(4):
                model(tokens.to(device), return_type="logits", use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


# -- in words --------------------------------------------------------------------------------------


def _named(removed: Iterable[tuple[int, str]]) -> str:
    """The parts of a case: "FFN 9, FFN 11"."""
    return ", ".join(f"{PART_WORDS[part]} {layer}" for layer, part in removed) or "nothing"


def _summary(result: SinkLife) -> str:
    facts = result.statistics()
    at = facts["peak_layer"]
    up, down = result.steps()["up"], result.steps()["down"]
    lines = [
        f"The residual state of position {result.sink} is largest after layer {at}: "
        f"{facts['peak_ratio']} times the median of the others. Shares are of its largest value "
        "along its own direction.",
        f"Writers: {_parts(facts['writers'])}. Erasers: {_parts(facts['erasers'])}. All other "
        f"parts carry it. Largest step up in block {up[0]} ({100 * up[1]:+.0f} %), down in block "
        f"{down[0]} ({100 * down[1]:+.0f} %).",
        f"One vector holds {100 * facts['constant_share'][at]:.2f} % of the energy of all prompts' "
        f"states there ({100 * facts['constant_share_elsewhere'][at]:.0f} % at position "
        f"{result.control}); mean cosine {facts['mean_cosine'][at]:.4f}. The prompts have "
        f"{counted(result.tokens_at_sink, 'different token')} there.",
    ]
    if result.no_neurons:
        lines.append(f"Neurons are not known: {result.no_neurons}.")
    else:
        neurons = [f"{n['neuron']} ({100 * n['share']:.0f} %)" for n in facts["neurons"]]
        lines.append(
            f"Neurons of the FFN of block {result.ffn_layer} that add most: {listed(neurons)}."
        )
    if result.no_trigger:
        lines.append(f"No trigger direction: {result.no_trigger}.")
    else:
        one = facts["trigger"]
        first, second = one["eigenvalues"]
        lines.append(
            f"Its output in dim {one['channel']} is {one['written']}; the quadratic form of its "
            f"input gives {one['quadratic']}, and the largest eigenvalues are {number(first)} and "
            f"{number(second)}. Along the first eigenvector the input at the sink is "
            f"{one['sink']}, the largest of the others {one['others_largest']}, their median "
            f"{one['others_median']}."
        )
    columns = ["set to zero at the sink", "attention to it", "peak ratio"]
    columns += ["loss"] if result.loss is not None else []
    rows = [
        [
            _named(tuple(map(tuple, row["removed"]))),
            row["attention"].to_decimals(3),
            number(row["peak_ratio"].mean),
            *([row["loss"].to_decimals(3)] if "loss" in row else []),
        ]
        for row in facts["removed"]
    ]
    return "\n".join([*lines, table_as_text(columns, rows)])


def _parts(parts: list[dict[str, Any]]) -> str:
    named = [
        f"{PART_WORDS[one['part']]} of block {one['block']} ({100 * one['share'].mean:+.0f} %)"
        for one in parts
    ]
    return listed(named) if named else "none"
