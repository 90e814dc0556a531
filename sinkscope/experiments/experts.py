"""Which experts of a routed model write its massive activations, and what ablating them does.

Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv
2507.23279): a handful of experts write the massive activations at the first token; pruning them
breaks the model and its sinks, pruning as many random experts does not.

1. Compute the output of every expert for every token that is sent to it, from what transformers'
   own modules are called with (`sinkscope.models.experts`); their weighted sum is compared with
   what those modules return, block by block and batch by batch.
2. Take the largest |output| of each expert, its token and dim, and the neurons
   whose contributions a_n · W_down[n, dim] are largest there.
3. Find the super experts by the paper's rule (`metrics.experts`).
4. Compare the weights that the router gives each expert at the sink and at the other tokens.
5. Ablate the super experts, and as many random other experts of the same layers, and measure the
   largest residual activation, the attention to the sink, and the loss once more.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture import paths, runner
from sinkscope.capture.accumulators import Accumulator, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers import Observer, Scope
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.interventions import AblateExperts
from sinkscope.metrics import residual
from sinkscope.metrics.experts import PERCENTILE, SHARE, forms_massive, super_experts
from sinkscope.metrics.magnitude_median import magnitude_median
from sinkscope.metrics.positions import masked_mean
from sinkscope.metrics.residual import MASSIVE_MINIMUM, MASSIVE_RATIO
from sinkscope.models.capabilities import capabilities
from sinkscope.models.experts import Experts, Routing, experts_of, routed
from sinkscope.models.load import load_model
from sinkscope.output import counted, listed, number, table_as_text
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import estimate
from sinkscope.validation import real_number, whole_number
from sinkscope.validation import seed as checked_seed

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NEURONS = 5
"""Number of contributing neurons kept for each expert's largest output."""
_SHOWN = 10
"""Largest number of rows in the summary's table."""
ABLATED = ("super experts", "random experts")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ExpertOutputs(Result):
    """The outputs of every expert of a routed model, and the model without its super experts.

    An expert's output is that of its down-projection, before the router's weight. Blocks that route
    to experts run along `routed`. Shared experts, which see every token, are not among them.

    Attributes:
        sink: The sink position.
        layers: Blocks along `routed`.
        minimum: Rule of massive activations, see `metrics.experts.forms_massive` [activation].
        ratio: The same.
        percentile: Rule of super experts, see `metrics.experts.super_experts`.
        share: The same.
        largest: Largest |output| over tokens and dims [activation]; nan where the prompt sends no
            token to the expert.
        norm: Mean ‖output‖ over the tokens after the sink and before it that are sent to the
            expert [activation].
        sink_norm: ‖output‖ at the sink [activation]; nan where the sink is not sent to the expert.
        weight: Mean weight w_e that the router gives the expert over the tokens other than the
            sink, 0 where they are not sent to it.
        sink_weight: The same at the sink.
        chosen: Share of the tokens other than the sink that are sent to the expert.
        sink_chosen: Whether the sink is sent to it, 0 or 1.
        position: Position of `largest`; -1 where it is nan.
        dim: Residual dim of `largest`; -1 where it is nan.
        value: The signed output there [activation].
        neuron: The neurons of the expert that contribute most to it, -1 where it is nan.
        contribution: What each adds to it, a_n · W_down[n, dim] [activation].
        peak: Largest |a| of the residual stream; state 0 enters block 0, state l + 1 leaves block l
            [activation].
        median: Median |a| of the same [activation].
        ablated: Names along `ablated`; empty if nothing was ablated.
        ablated_experts: The (layer, expert) pairs of each.
        attention: Mean attention to the sink [probability]; None if nothing was ablated.
        loss: Mean next-token loss [nat]; None as well, and where the model has no loss.
        peak_without: `peak` when these experts are ablated.
        attention_without: `attention` when these experts are ablated.
        loss_without: `loss` when these experts are ablated.
    """

    QUESTION = "Which experts write the massive activations?"

    sink: int
    layers: tuple[int, ...]
    minimum: float
    ratio: float
    percentile: float
    share: float
    largest: Float[Tensor, "prompt routed expert"]
    norm: Float[Tensor, "prompt routed expert"]
    sink_norm: Float[Tensor, "prompt routed expert"]
    weight: Float[Tensor, "prompt routed expert"]
    sink_weight: Float[Tensor, "prompt routed expert"]
    chosen: Float[Tensor, "prompt routed expert"]
    sink_chosen: Float[Tensor, "prompt routed expert"]
    position: Int[Tensor, "prompt routed expert"]
    dim: Int[Tensor, "prompt routed expert"]
    value: Float[Tensor, "prompt routed expert"]
    neuron: Int[Tensor, "prompt routed expert rank"]
    contribution: Float[Tensor, "prompt routed expert rank"]
    peak: Float[Tensor, "prompt state"]
    median: Float[Tensor, "prompt state"]
    ablated: tuple[str, ...] = ()
    ablated_experts: tuple[tuple[tuple[int, int], ...], ...] = ()
    attention: Float[Tensor, "prompt layer head"] | None = None
    loss: Float[Tensor, "prompt"] | None = None
    peak_without: Float[Tensor, "ablated prompt state"] | None = None
    attention_without: Float[Tensor, "ablated prompt layer head"] | None = None
    loss_without: Float[Tensor, "ablated prompt"] | None = None

    @property
    def size(self) -> Float[Tensor, "routed expert"]:
        """The largest |output| of each expert over all prompts; nan if no token is sent to it."""
        known = self.largest.nan_to_num(-torch.inf).amax(dim=0)
        return torch.where(known.isinf(), torch.nan, known)

    @property
    def forms(self) -> Bool[Tensor, "layer"]:
        """The layers in which massive activations form."""
        return forms_massive(self.peak, self.median, self.minimum, self.ratio, self.share)

    @property
    def is_super(self) -> Bool[Tensor, "routed expert"]:
        """Which experts are super experts by the rule."""
        forms = self.forms[list(self.layers)]
        return super_experts(self.size, forms, self.percentile, self.share)

    @property
    def super_experts(self) -> tuple[tuple[int, int], ...]:
        """The (layer, expert) pairs of the super experts, the largest output first."""
        experts = [(self.layers[row], expert) for row, expert in self.is_super.nonzero().tolist()]
        return tuple(sorted(experts, key=lambda one: -float(self.size[self._row(one[0]), one[1]])))

    def describe(self, layer: int, expert: int) -> dict[str, Any]:
        """Describe one expert: its largest output, with token, dim and neurons, and its tokens.

        Args:
            layer: A block of `layers`.
            expert: One of its experts.
        """
        row = self._row(layer)
        x = self.largest[:, row, expert]
        if bool(x.isnan().all()):
            prompt = 0
        else:
            prompt = int(x.nan_to_num(-1).argmax())
        where = prompt, row, expert
        return {
            "layer": layer,
            "expert": expert,
            "largest": float(x[prompt]),
            "prompt": prompt,
            "position": int(self.position[where]),
            "dim": int(self.dim[where]),
            "value": float(self.value[where]),
            "neurons": [
                {"neuron": neuron, "contribution": part}
                for neuron, part in zip(
                    self.neuron[where].tolist(), self.contribution[where].tolist(), strict=True
                )
                if neuron >= 0
            ],
            "norm": float(self.norm[:, row, expert].nanmean()),
            "sink_norm": float(self.sink_norm[:, row, expert].nanmean()),
            "weight": float(self.weight[:, row, expert].nanmean()),
            "sink_weight": float(self.sink_weight[:, row, expert].mean()),
            "chosen": float(self.chosen[:, row, expert].nanmean()),
            "sink_chosen": float(self.sink_chosen[:, row, expert].mean()),
        }

    def ranked(self, n: int = _SHOWN) -> list[dict[str, Any]]:
        """Describe the experts with the largest outputs, super experts or not; see `describe`.

        Args:
            n: How many.
        """
        size = self.size
        order = size.nan_to_num(-1).flatten().argsort(descending=True, stable=True)
        pairs = [divmod(index, size.shape[1]) for index in order.tolist()]
        return [
            self.describe(self.layers[row], expert) | {"super": bool(self.is_super[row, expert])}
            for row, expert in pairs[:n]
            if not size[row, expert].isnan()
        ]

    def statistics(self) -> dict[str, Any]:
        """The super experts, the largest outputs of the others, and the model without them."""
        facts: dict[str, Any] = {
            "sink": self.sink,
            "experts": int((~self.size.isnan()).sum()),
            "rule": {
                "percentile": self.percentile,
                "share": self.share,
                "minimum": self.minimum,
                "ratio": self.ratio,
            },
            "forms_massive": self.forms.nonzero().flatten().tolist(),
            "super_experts": [self.describe(*pair) for pair in self.super_experts],
            "largest": self.ranked(),
            "peak": estimate(self.peak[:, 1:].amax(1)),
        }
        if self.attention is not None:
            facts["attention"] = estimate(self.attention.mean((1, 2)))
        if self.loss is not None:
            facts["loss"] = estimate(self.loss)
        for index, name in enumerate(self.ablated):
            assert self.peak_without is not None and self.attention_without is not None
            facts[f"without {name}"] = {
                "experts": [list(pair) for pair in self.ablated_experts[index]],
                "peak": estimate(self.peak_without[index, :, 1:].amax(1)),
                "attention": estimate(self.attention_without[index].mean((1, 2))),
            }
            if self.loss is not None and self.loss_without is not None:
                change = estimate(self.loss_without[index] - self.loss)
                facts[f"without {name}"]["loss_change"] = change
        return facts

    def summary(self) -> str:
        """The rule, the super experts, the experts with the largest outputs, and the ablation."""
        facts = self.statistics()
        forms = facts["forms_massive"]
        layers = (
            f"Massive activations form in {_layers(forms)}."
            if forms
            else "No layer forms massive activations, so that no expert is a super expert."
        )
        experts = self.super_experts
        rule = (
            f"{counted(len(experts), 'super expert')} of the {counted(facts['experts'], 'expert')} "
            f"that some token is sent to: |output| above the {self.percentile:g}th percentile and "
            f"above {self.share:g} of the maximum, in such a layer."
        )
        table = table_as_text(
            ["expert", "super", "largest", "at", "dim", "neurons", "sink", "others"],
            [_cells(one) for one in facts["largest"]],
        )
        legend = (
            "Largest: max |output| [activation] and its position; neurons: those that add at "
            "least 5 % of it; sink, others: share of tokens sent to the expert, and the router's "
            "mean weight."
        )
        return "\n".join([layers, rule, table, legend, *self._ablation_in_words(facts)])

    def _ablation_in_words(self, facts: dict[str, Any]) -> list[str]:
        if not self.ablated:
            return []
        loss = f", loss {facts['loss']} nat" if "loss" in facts else ""
        lines = [
            f"Unchanged model: largest residual activation {facts['peak']}, mean attention to "
            f"position {self.sink} {facts['attention']}{loss}."
        ]
        for name in self.ablated:
            one = facts[f"without {name}"]
            pairs = listed([f"{layer}.{expert}" for layer, expert in one["experts"]])
            change = (
                f", change of loss {one['loss_change'].signed()} nat"
                if "loss_change" in one
                else ""
            )
            lines.append(
                f"Without the {name} ({pairs}): {one['peak']}, {one['attention']}{change}."
            )
        return lines

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, layer and expert."""
        axes = {
            "prompt": range(len(self.largest)),
            "layer": self.layers,
            "expert": range(self.largest.shape[2]),
        }
        names = (
            "largest", "norm", "sink_norm", "weight", "sink_weight", "chosen", "sink_chosen",
            "position", "dim",
        )  # fmt: skip
        return tidy(axes, **{name: self[name] for name in names})

    def figures(self) -> dict[str, go.Figure]:
        """Maps [layer × expert] of the largest outputs, and of the weights at the sink."""
        from sinkscope.plot import expert_map

        frame = self.to_frame()
        return {
            name: expert_map(frame, name, about=self.about, marked=self.super_experts)
            for name in ("largest", "sink_weight", "weight")
        }

    def _row(self, layer: int) -> int:
        return self.layers.index(layer)


def experts(
    model: Any,
    texts: Any,
    *,
    sink: int = 0,
    ablate: bool = True,
    minimum: float = MASSIVE_MINIMUM,
    ratio: float = MASSIVE_RATIO,
    percentile: float = PERCENTILE,
    share: float = SHARE,
    seed: int = 0,
    progress: bool = True,
) -> ExpertOutputs:
    """Measure every expert of a routed model, find its super experts, and ablate them.

    Takes one pass over the texts; with `ablate`, where there is a super expert, three more, and as
    many for the loss.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts, each with at least one token after the sink.
        sink: The sink position.
        ablate: Whether to measure the model without its super experts, and without as many random
            other experts of the same layers.
        minimum: Magnitude that a massive activation exceeds [activation].
        ratio: Multiple of the median |a| of its hidden state that it exceeds.
        percentile: Percentile of all experts' largest outputs that a super expert's exceeds.
        share: Share of their maximum that it exceeds; also the smallest rise in a layer that forms
            massive activations (`metrics.experts.forms_massive`).
        seed: Seed of the choice of random experts.
        progress: Whether to draw a progress bar.

    Returns:
        The outputs of all experts, and the model with the super experts ablated.

    Raises:
        TextError: If a prompt ends at the sink or before it.
        UnsupportedError: If the model routes no tokens to experts, or its experts cannot be told
            apart (`sinkscope.models.experts.experts_of`).
    """
    model = load_model(model)
    routes = experts_of(model)
    sink = whole_number("sink", sink, error=TextError)
    minimum = real_number("minimum", minimum, at_least=0, error=UnsupportedError)
    ratio = real_number("ratio", ratio, at_least=0, error=UnsupportedError)
    percentile = real_number(
        "percentile", percentile, at_least=0, at_most=100, error=UnsupportedError
    )
    share = real_number("share", share, at_least=0, at_most=1, error=UnsupportedError)
    seed = checked_seed(seed, UnsupportedError)
    prompts = as_texts(texts).tokenize(model).right_padded()
    if int(prompts.lengths.min()) < sink + 2:
        raise TextError(
            f"Position {sink} should have a token after it, and the shortest prompt has "
            f"{int(prompts.lengths.min())} tokens; choose an earlier one, or longer prompts."
        )
    measured = _run(model, prompts, sink, routes, progress)
    result = ExpertOutputs(
        about=about(model, prompts),
        sink=sink,
        layers=tuple(routes),
        minimum=minimum,
        ratio=ratio,
        percentile=percentile,
        share=share,
        **measured,
    )
    if not ablate or not result.super_experts:
        return result
    return _with_ablation(result, model, prompts, seed)


def _with_ablation(result: ExpertOutputs, model: Any, prompts: Texts, seed: int) -> ExpertOutputs:
    """Return the result with peaks, sink attention and loss of the model without some experts."""
    chosen = [result.super_experts]
    if random := _random_experts(result, seed):
        chosen.append(random)
    losses = []
    for pairs in ((), *chosen):
        with AblateExperts(model, pairs) if pairs else nullcontext():
            losses.append(_state(model, prompts, result.sink))
    without = losses[1:]
    loss = losses[0]["loss"]
    return dataclasses.replace(
        result,
        ablated=ABLATED[: len(chosen)],
        ablated_experts=tuple(chosen),
        attention=losses[0]["attention"],
        loss=loss,
        peak_without=torch.stack([one["peak"] for one in without]),
        attention_without=torch.stack([one["attention"] for one in without]),
        loss_without=None if loss is None else torch.stack([one["loss"] for one in without]),
    )


def _random_experts(result: ExpertOutputs, seed: int) -> tuple[tuple[int, int], ...]:
    """Draw as many other experts of the same layers, among those to which tokens are sent."""
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in result.super_experts}):
        row = result.layers.index(layer)
        others = (~result.size[row].isnan() & ~result.is_super[row]).nonzero().flatten()
        order = torch.randperm(len(others), generator=generator)
        pairs += [(layer, int(e)) for e in others[order][: int(result.is_super[row].sum())]]
    return tuple(pairs)


def _state(model: Any, prompts: Texts, sink: int) -> dict[str, Any]:
    """Measure peaks, attention to the sink, and mean loss of the model in its current state."""
    peaks = _run(model, prompts, sink, {}, progress=False)
    attention = readout.measure(model, prompts, {"attention": readout.TO_SINKS}, [sink])
    loss = readout.losses(model, prompts)
    if loss is not None:
        predicts = prompts.mask.roll(-1, 1)
        predicts[:, -1] = False
        loss = masked_mean(loss.nan_to_num(), predicts, dim=1)
    return {"peak": peaks["peak"], "attention": attention["attention"], "loss": loss}


def _run(
    model: Any, prompts: Texts, sink: int, routes: dict[int, Experts], progress: bool
) -> dict[str, Tensor]:
    """Measure the tensors of `ExpertOutputs` in one pass over the prompts."""
    caps = capabilities(model)
    sinks = torch.zeros_like(prompts.mask)
    sinks[:, sink] = True
    scope = dataclasses.replace(readout.scope(caps), sizes={})  # routed layers alone, not all
    calls: dict[int, Routing] = {}
    states = [_States(scope, "resid_pre"), _States(scope, "resid_post")]
    own = [_EachExpert(scope, routes, calls)] if routes else []
    with routed(model, routes, calls.__setitem__):
        how = paths.choose(model, caps, "auto")
        order = runner.run(
            model, prompts, sinks, [*states, *own], how, causal=caps.causal, progress=progress
        )
    before, after = (one.results(order) for one in states)
    result = {name: torch.cat([before[name][:, :1], after[name]], dim=1).cpu() for name in before}
    for one in own:
        result |= {name: x.cpu() for name, x in one.results(order).items()}
    return result


class _States(Observer):
    """The largest and the median activation of hidden states."""

    def __init__(self, scope: Scope, signal: str) -> None:
        self.signal = signal  # type: ignore[misc]
        super().__init__(scope)

    def accumulator(self, name: str) -> Accumulator:
        return PerPrompt()

    def observe(
        self, x: Float[Tensor, "prompt position dim"], batch: Batch
    ) -> dict[str, Tensor] | None:
        if self.signal == "resid_pre" and self.layer:
            return None
        return {
            "peak": residual.token_peaks(x, batch.mask).amax(1).float(),
            "median": magnitude_median(x, batch.mask),
        }


class _EachExpert(Observer):
    """Reduces the calls of a block's experts once the block has run, when its batch is known."""

    signal = "resid_post"

    def __init__(self, scope: Scope, routes: dict[int, Experts], calls: dict[int, Routing]) -> None:
        super().__init__(scope)
        self._routes, self._calls = routes, calls
        self._most = max(one.count for one in routes.values())

    def accumulator(self, name: str) -> Accumulator:
        return PerPrompt()

    def drop(self) -> None:
        super().drop()
        self._calls.clear()

    def observe(
        self, x: Float[Tensor, "prompt position dim"], batch: Batch
    ) -> dict[str, Tensor] | None:
        if self.layer not in self._routes:
            return None
        one = self._routes[self.layer]
        return reduced(one, self._calls.pop(self.layer), batch, self._most)


def reduced(experts: Experts, call: Routing, batch: Batch, most: int) -> dict[str, Tensor]:
    """Reduce one call of a block's experts to values by prompt and expert.

    Args:
        experts: The experts.
        call: Their inputs and outputs.
        batch: Mask and sinks of the prompts, on the same device.
        most: Largest number of experts in any block.
    """
    prompts, length = batch.mask.shape
    real, is_sink = batch.mask.flatten(), batch.sinks.flatten()
    device, shape = call.hidden.device, (prompts, most)
    total = torch.zeros_like(call.output, dtype=torch.float32)
    norm = torch.zeros_like(call.weight, dtype=torch.float32)
    result = {
        "largest": torch.full(shape, torch.nan, device=device),
        "position": torch.full(shape, -1, device=device),
        "dim": torch.full(shape, -1, device=device),
        "value": torch.full(shape, torch.nan, device=device),
        "neuron": torch.full((*shape, NEURONS), -1, device=device),
        "contribution": torch.full((*shape, NEURONS), torch.nan, device=device),
    }
    for one in experts.split(call):
        weight = call.weight[one.token, one.choice, None].float()
        total.index_add_(0, one.token, one.added.float() * weight)
        norm[one.token, one.choice] = torch.linalg.vector_norm(one.out.float(), dim=1)
        kept = real[one.token].nonzero().flatten()
        prompt, rows = _largest_of_prompts(
            one.token[kept] // length, one.out[kept].float().abs().amax(1)
        )
        rows = kept[rows]
        size, dim = one.out[rows].float().abs().max(dim=1)
        parts = experts.contributions(one.expert, one.neurons[rows], dim)
        top = parts.abs().topk(min(NEURONS, parts.shape[1]), dim=1).indices
        result["largest"][prompt, one.expert] = size
        result["position"][prompt, one.expert] = one.token[rows] % length
        result["dim"][prompt, one.expert] = dim
        result["value"][prompt, one.expert] = one.out[rows, dim].float()
        ranks = slice(top.shape[1])
        result["neuron"][prompt, one.expert, ranks] = top
        result["contribution"][prompt, one.expert, ranks] = parts.gather(1, top)
    experts.check(call, total)
    return result | _routing(call, norm, batch, real, is_sink, most)


def _largest_of_prompts(
    prompt: Int[Tensor, "row"], size: Float[Tensor, "row"]
) -> tuple[Int[Tensor, "kept"], Int[Tensor, "kept"]]:
    """Return the prompts that occur, and for each the first row of largest size."""
    unique, which = prompt.unique(return_inverse=True)
    best = size.new_full(unique.shape, -torch.inf).scatter_reduce(0, which, size, "amax")
    rows = torch.arange(len(size), device=size.device)
    rows = torch.where(size == best[which], rows, len(size))
    first = torch.full_like(unique, len(size)).scatter_reduce(0, which, rows, "amin")
    return unique, first


def _routing(
    call: Routing,
    norm: Float[Tensor, "token choice"],
    batch: Batch,
    real: Bool[Tensor, "token"],
    is_sink: Bool[Tensor, "token"],
    most: int,
) -> dict[str, Tensor]:
    """Norms and weights at the sink and at the others, by prompt and expert."""
    prompts, length = batch.mask.shape
    choices = call.expert.shape[1]
    prompt = torch.arange(prompts, device=norm.device).repeat_interleave(length)
    cell = (prompt[:, None] * most + call.expert).flatten()
    kinds = {"": real & ~is_sink, "sink_": real & is_sink}

    def summed(x: Float[Tensor, "token choice"], kept: Bool[Tensor, "token"]) -> Tensor:
        x = torch.where(kept[:, None].expand(-1, choices), x, 0.0).flatten()
        return x.new_zeros(prompts * most).index_add_(0, cell, x).view(prompts, most)

    result = {}
    for kind, kept in kinds.items():
        tokens = kept.view(prompts, length).sum(1, keepdim=True)
        times = summed(torch.ones_like(norm), kept)
        result[f"{kind}norm"] = summed(norm, kept) / times  # nan where no token is sent to it
        result[f"{kind}weight"] = summed(call.weight.float(), kept) / tokens
        result[f"{kind}chosen"] = times / tokens
    return result


# -- words -----------------------------------------------------------------------------------------


def _layers(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {listed([str(layer) for layer in layers])}"


def _cells(one: dict[str, Any]) -> list[str]:
    writers = [
        f"{part['neuron']} ({100 * part['contribution'] / one['value']:.0f} %)"
        for part in one["neurons"]
        if abs(part["contribution"]) >= 0.05 * one["largest"]
    ]
    return [
        f"{one['layer']}.{one['expert']}",
        "yes" if one["super"] else "",
        number(one["largest"]),
        f"{one['prompt']}:{one['position']}",
        str(one["dim"]),
        ", ".join(writers[:3]),
        _share(one["sink_chosen"], one["sink_weight"]),
        _share(one["chosen"], one["weight"]),
    ]


def _share(chosen: float, weight: float) -> str:
    return f"{100 * chosen:.0f} %, {number(weight)}"
