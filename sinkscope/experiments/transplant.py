"""Whether a sink matters for the attention it absorbs or for the constant it adds.

A sink acts on later tokens through its keys and values. Its key determines how much attention it
absorbs; its value is what that attention adds to every query. This experiment separates the two:

1. Run prompts as they are ("baseline"), and again with their sink erased ("host"): the FFN output
   of the block that adds most to the sink's norm is set to zero there. The remaining attention
   shows whether that erased the sink.
2. Take the sink's keys and values of every layer from donors on the unchanged model, and give them
   to the hosts (`interventions.SinkTransplant`): both; the key alone, with value zero, which
   absorbs attention and adds nothing; the value alone, with the key of the host; and both, or the
   key alone, in an extra slot at no position.
3. In each condition measure the attention of later queries to the transplanted key, the next-token
   loss, and the divergence of the predictions from those of the baseline run. Only queries after
   the sink are counted, the same ones in every condition.
4. In a routed model, record the experts that the router gives the sink and the later queries in
   each condition: an expert may take the sink, and others the tokens that follow it, only because
   of the sink.

If the sink only had to absorb attention, "key" would do what "both" does.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture import paths, runner
from sinkscope.errors import UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.interventions import RemoveOutput, SinkTransplant
from sinkscope.interventions.base import check_mode
from sinkscope.interventions.transplant import with_slot
from sinkscope.models.capabilities import capabilities
from sinkscope.models.experts import Experts, Routing, experts_of, routed
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.output import table_as_text
from sinkscope.prompts.tokens import Texts, token_ids
from sinkscope.statistics import estimate
from sinkscope.validation import whole_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BASELINE = "baseline"
CONDITIONS = ("host", "both", "key", "value", "slot", "slot key")
"""The conditions that are compared with the baseline run."""
DONORS = ("own", "mean")
"""Each prompt's own sink, or the mean sink of all prompts."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transplant(Result):
    """Attention to a transplanted sink, loss and divergence, condition by condition.

    Attributes:
        conditions: Names along `condition`; "baseline" is the first.
        erased_in: The block whose FFN output was set to zero at the sink; -1 if none was.
        attention: Mean attention of the queries after it to the sink's position, or to the slot
            [probability].
        loss: Mean next-token loss of the queries after the sink [nat].
        divergence: KL(baseline ‖ condition) of the predictions of the same queries [nat].
        routed_layers: Blocks along `routed`; none where experts cannot be distinguished.
        sink_weight: Weight that the router gives each expert at the prompt's first token, 0 where
            it is not sent there; None without routed layers.
        same_experts: Share of the experts of a query that it has in the baseline run too, mean
            over the same queries; None without routed layers.
    """

    QUESTION = "Does a sink matter by the attention it absorbs or by what it adds?"

    conditions: tuple[str, ...]
    erased_in: int
    attention: Float[Tensor, "condition prompt layer head"]
    loss: Float[Tensor, "condition prompt"]
    divergence: Float[Tensor, "condition prompt"]
    routed_layers: tuple[int, ...] = ()
    sink_weight: Float[Tensor, "condition prompt routed expert"] | None = None
    same_experts: Float[Tensor, "condition prompt routed"] | None = None

    def __post_init__(self) -> None:
        """Read the name that the baseline has in files of earlier versions."""
        names = tuple(BASELINE if name == "untouched" else name for name in self.conditions)
        object.__setattr__(self, "conditions", names)

    @property
    def sink_same_experts(self) -> Float[Tensor, "condition prompt routed"] | None:
        """Share of the sink's experts that it has in the baseline run too."""
        if self.sink_weight is None:
            return None
        chosen = self.sink_weight > 0
        return (chosen & chosen[:1]).sum(3) / chosen.sum(3)

    @property
    def later_attention(self) -> Float[Tensor, "condition prompt"]:
        """Mean `attention` over the heads of the layers after the erased block, if one was."""
        first = min(self.erased_in + 1, self.attention.shape[2] - 1)
        return self.attention[:, :, first:].mean((2, 3))

    def statistics(self) -> dict[str, Any]:
        """Attention, loss, its change from the baseline run, and divergence of each condition.

        Attention is `later_attention`, and shares of experts are means over the routed layers after
        the erased block; every number has its interval over prompts.
        """
        facts = {
            name: {
                "attention": estimate(self.later_attention[at]),
                "loss": estimate(self.loss[at]),
                "loss_change": estimate(self.loss[at] - self.loss[0]),
                "divergence": estimate(self.divergence[at]),
            }
            for at, name in enumerate(self.conditions)
        }
        after = [row for row, layer in enumerate(self.routed_layers) if layer > self.erased_in]
        shares = {"sink_same_experts": self.sink_same_experts, "same_experts": self.same_experts}
        for kind, share in shares.items():
            if share is not None and after:
                for at, name in enumerate(self.conditions):
                    facts[name][kind] = estimate(share[at][:, after].mean(1))
        return facts

    def summary(self) -> str:
        """Attention, loss and divergence of every condition in a table."""
        facts = self.statistics()
        erased = (
            f"Hosts: the FFN output of block {self.erased_in} is zero at position 0."
            if self.erased_in >= 0
            else "The hosts are the prompts as they are."
        )
        columns = ["condition", "attention", "loss", "change", "KL to baseline"]
        rows = [
            [
                name,
                one["attention"].to_decimals(3),
                one["loss"].to_decimals(3),
                one["loss_change"].signed(3),
                one["divergence"].to_decimals(4),
            ]
            for name, one in facts.items()
        ]
        text = f"{erased}\n{table_as_text(columns, rows)}"
        if "same_experts" not in facts[BASELINE]:
            return text
        shares = [
            [name, *(one[kind].to_decimals(3) for kind in ("sink_same_experts", "same_experts"))]
            for name, one in facts.items()
        ]
        columns = ["condition", "sink's experts kept", "later tokens' experts kept"]
        return (
            f"{text}\nShare of the router's choices that are those of the baseline run:\n"
            f"{table_as_text(columns, shares)}"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per condition, prompt and metric: attention, loss, divergence, shares of experts.

        Attention is `later_attention`. The last two, same_experts and sink_same_experts, are means
        over all routed layers.
        """
        axes = {"condition": self.conditions, "prompt": range(self.loss.shape[1])}
        metrics = {
            "attention": self.later_attention,
            "loss": self.loss,
            "divergence": self.divergence,
        }
        if self.same_experts is not None and self.sink_same_experts is not None:
            metrics["same_experts"] = self.same_experts.mean(2)
            metrics["sink_same_experts"] = self.sink_same_experts.mean(2)
        return stacked([tidy(axes, metric=name, value=x) for name, x in metrics.items()])

    def figures(self) -> dict[str, go.Figure]:
        """Attention, change of the loss, and divergence of every condition."""
        from sinkscope.plot import transplant_effects

        return {"transplant": transplant_effects(self.to_frame(), about=self.about)}


def transplant(
    model: Any,
    texts: Any,
    donor: str | Any = "own",
    *,
    erase: bool | int = True,
    conditions: Iterable[str] = CONDITIONS,
    progress: bool = True,
) -> Transplant:
    """Give prompts without a sink the keys, the values, or both, of a donor's sink.

    Args:
        model: A bridge, or anything that `load_model` takes; interventions in force stay in force.
        texts: Prompts of equal length, whose sink is position 0.
        donor: "own", each prompt's own sink; "mean", the mean over these prompts; or donor prompts,
            the mean over which is taken (a single BOS token, for prompts without one).
        erase: Whether the hosts' sink is erased, in the block that adds most to its norm; or the
            block. False for prompts that lack a sink as they are.
        conditions: Some of `CONDITIONS`.
        progress: Whether to draw a progress bar.

    Returns:
        Attention, loss and divergence of every condition, "baseline" first.

    Raises:
        UnsupportedError: If the model predicts no next tokens, a condition is unknown, or keys and
            values of this architecture cannot be edited.
        TextError: If the prompts differ in length or are shorter than three tokens.
    """
    model = load_model(model)
    caps = capabilities(model)
    prompts = readout.even(model, texts, 0, after=2)
    if not readout.has_loss(model):
        raise UnsupportedError(
            f"{caps.architecture} predicts no next tokens, so a transplant has no loss; measure it "
            "with scan inside SinkTransplant."
        )
    chosen = readout.chosen(conditions, CONDITIONS, "conditions")
    if isinstance(donor, str):
        check_mode(donor, DONORS)
    block = _erased(model, prompts, erase)
    run = _Run(model, prompts, donor, block)
    names = (BASELINE, *chosen)
    result: list[tuple[Tensor, ...]] = []
    with tqdm(total=len(prompts), unit="prompt", disable=not progress, leave=False) as bar:
        for row in range(len(prompts)):
            result.append(run.measure(row, names))
            bar.update()
    columns = (torch.stack(x, dim=1) for x in zip(*result, strict=True))
    attention, loss, divergence, *routes = columns
    return Transplant(
        about=about(model, prompts),
        conditions=names,
        erased_in=-1 if block is None else block,
        attention=attention,
        loss=loss,
        divergence=divergence,
        routed_layers=tuple(run.experts),
        **dict(zip(("sink_weight", "same_experts"), routes, strict=False)),
    )


def _erased(model: Any, prompts: Texts, erase: bool | int) -> int | None:
    """Return the block that adds most to ‖h_0‖, a given one, or none."""
    if erase is False:
        return None
    if not isinstance(erase, bool):
        last = capabilities(model).n_layers - 1
        return whole_number("erase", erase, at_most=last, error=UnsupportedError)
    norm = readout.measure(model, prompts, {"norm": readout.RESIDUAL_NORM})["norm"][..., 0].mean(0)
    return int(torch.diff(norm, prepend=norm.new_zeros(1)).argmax())


def _experts(model: Any) -> dict[int, Experts]:
    """Return the experts of a routed model by block; none where they cannot be distinguished."""
    if not capabilities(model).moe:
        return {}
    try:
        return experts_of(model)
    except UnsupportedError:
        return {}


class _Run:
    """Runs the conditions prompt by prompt, so that each can have its own donor."""

    def __init__(self, model: Any, prompts: Texts, donor: Any, block: int | None) -> None:
        self.model, self.prompts, self.block = model, prompts, block
        self._own = isinstance(donor, str) and donor == "own"
        self._donor = prompts if isinstance(donor, str) and donor == "mean" else donor
        self._kept: dict[tuple[int | None, str], SinkTransplant] = {}
        self.experts = _experts(model)
        self._calls: dict[int, Routing] = {}

    def measure(self, row: int, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Attention [condition layer head], loss and divergence [condition] of a prompt.

        In a routed model also the sink's weights [condition routed expert] and the share of the
        later queries' experts that are those of the baseline run [condition routed].
        """
        own = token_ids(self.prompts.tokens[row : row + 1])
        if self._own:
            self._kept.clear()
        baseline = self._log_probabilities(own, 0)
        next_tokens = own.tokens[0, 2:].to(baseline.device)
        attention, loss, divergence = [], [], []
        before, weights, shares = self._chosen(0), [], []
        for name in names:
            slot = name.startswith("slot")
            texts = with_slot(self.model, own) if slot else own
            given = None
            if name not in (BASELINE, "host"):
                what = name.removeprefix("slot").strip() or "both"
                given = self._transplant(None if slot else 0, what, own)
            with ExitStack() as stack:
                if self.block is not None and name != BASELINE:
                    stack.enter_context(RemoveOutput(self.model, self.block, "mlp", int(slot)))
                if given is not None:
                    stack.enter_context(given)
                paid = readout.measure(self.model, texts, {"to": readout.TO_SINKS})["to"][0]
                now = self._log_probabilities(texts, int(slot))
            attention.append(paid)
            picked = now[:-1].gather(1, next_tokens[:, None])[:, 0]
            loss.append(-picked.mean().cpu())
            kl = (baseline.exp() * (baseline - now)).sum(-1)
            divergence.append(kl.mean().cpu())
            if self.experts:
                given_to = self._chosen(int(slot))
                weights.append(given_to[:, 0])
                both = (given_to > 0) & (before > 0)
                shares.append((both.sum(2) / (given_to > 0).sum(2))[:, 1:].mean(1))
        routes = (torch.stack(weights), torch.stack(shares)) if self.experts else ()
        return torch.stack(attention), torch.stack(loss), torch.stack(divergence), *routes

    def _chosen(self, slot: int) -> Float[Tensor, "routed position expert"]:
        """The router's weights of the last pass, 0 where a token is not sent; no slot's."""
        if not self.experts:
            return torch.zeros(0, 0, 0)
        most = max(one.count for one in self.experts.values())
        result = []
        for layer in self.experts:
            call = self._calls[layer]
            weight = torch.zeros(len(call.expert), most)
            result.append(weight.scatter_(1, call.expert.cpu(), call.weight.float().cpu())[slot:])
        return torch.stack(result)

    def _transplant(self, position: int | None, what: str, own: Texts) -> SinkTransplant:
        key = position, what
        if key not in self._kept:
            donor = own if self._own else self._donor
            self._kept[key] = SinkTransplant(self.model, donor, position, what, donor_position=0)
        return self._kept[key]

    def _log_probabilities(self, texts: Texts, slot: int) -> Float[Tensor, "query token"]:
        """Return those of the queries after the prompt's first token, on the current model."""
        how = paths.choose(self.model, capabilities(self.model), "auto")
        with (
            torch.inference_mode(),
            runner.evaluating(self.model),
            how.opened(),
            routed(self.model, self.experts, self._calls.__setitem__),
        ):
            tokens = texts.tokens.to(input_device(self.model))
            logits = self.model(tokens, return_type="logits", use_cache=False)
            return logits[0, 1 + slot :].float().log_softmax(-1)
