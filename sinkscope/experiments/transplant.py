"""Whether a sink matters by the attention it absorbs or by the constant it adds.

A sink acts on later tokens through its keys and values. Its key decides how much attention it
absorbs; its value is what that attention adds to every query. This experiment separates the two:

1. Run prompts as they are ("untouched"), and again with their sink erased ("host"): the FFN output
   of the block that adds most to the sink's norm is set to zero there. The attention that is left
   says whether that erased the sink.
2. Take the sink's keys and values of every layer from donors on the unchanged model, and give them
   to the hosts (`interventions.SinkTransplant`): both; the key alone, with value zero, which
   absorbs attention and adds nothing; the value alone, with the key of the host; and both, or the
   key alone, in an extra slot at no position.
3. In each condition measure the attention of later queries to the transplanted key, the next-token
   loss, and the divergence of the predictions from those of the untouched run. Queries after the
   sink count, the same ones in every condition.

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
from sinkscope.interventions.base import check_layers, check_mode
from sinkscope.interventions.transplant import with_slot
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.output import table_as_text
from sinkscope.prompts.tokens import Texts, token_ids
from sinkscope.statistics import estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONDITIONS = ("host", "both", "key", "value", "slot", "slot key")
"""What is compared with the untouched run."""
DONORS = ("own", "mean")
"""Each prompt's own sink, or the mean sink of all prompts."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transplant(Result):
    """Attention to a transplanted sink, loss and divergence, condition by condition.

    Attributes:
        conditions: Names along `condition`; "untouched" is the first.
        erased_in: The block whose FFN output was set to zero at the sink; -1 if none was.
        attention: Mean attention of the queries after it to the sink's position, or to the slot
            [probability].
        loss: Mean next-token loss of the queries after the sink [nat].
        divergence: KL(untouched ‖ condition) of the predictions of the same queries [nat].
    """

    QUESTION = "Does a sink matter by the attention it absorbs or by what it adds?"

    conditions: tuple[str, ...]
    erased_in: int
    attention: Float[Tensor, "condition prompt layer head"]
    loss: Float[Tensor, "condition prompt"]
    divergence: Float[Tensor, "condition prompt"]

    def statistics(self) -> dict[str, Any]:
        """Attention, loss, its change from the untouched run, and divergence of each condition.

        Attention is the mean over heads of the layers after the erased block (all layers if none
        was erased); every number has its interval over prompts.
        """
        later = slice(min(self.erased_in + 1, self.attention.shape[2] - 1), None)
        return {
            name: {
                "attention": estimate(self.attention[at, :, later].mean((1, 2))),
                "loss": estimate(self.loss[at]),
                "loss_change": estimate(self.loss[at] - self.loss[0]),
                "divergence": estimate(self.divergence[at]),
            }
            for at, name in enumerate(self.conditions)
        }

    def summary(self) -> str:
        """Attention, loss and divergence of every condition in a table."""
        found = self.statistics()
        erased = (
            f"Hosts: the FFN output of block {self.erased_in} is zero at position 0."
            if self.erased_in >= 0
            else "The hosts are the prompts as they are."
        )
        columns = ["condition", "attention", "loss", "change", "KL to untouched"]
        rows = [
            [
                name,
                one["attention"].to_decimals(3),
                one["loss"].to_decimals(3),
                one["loss_change"].signed(3),
                one["divergence"].to_decimals(4),
            ]
            for name, one in found.items()
        ]
        return f"{erased}\n{table_as_text(columns, rows)}"

    def to_frame(self) -> pd.DataFrame:
        """One row a condition, prompt and metric: attention, loss, divergence."""
        axes = {"condition": self.conditions, "prompt": range(self.loss.shape[1])}
        metrics = {
            "attention": self.attention.mean((2, 3)),
            "loss": self.loss,
            "divergence": self.divergence,
        }
        return stacked([tidy(axes, metric=name, value=x) for name, x in metrics.items()])

    def figures(self) -> dict[str, go.Figure]:
        """None: five numbers a condition are a table."""
        return {}


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
        conditions: Of `CONDITIONS`.
        progress: Whether to draw a progress bar.

    Returns:
        Attention, loss and divergence of every condition, "untouched" first.

    Raises:
        UnsupportedError: If the model predicts no next tokens, a condition is unknown, or keys and
            values of this architecture cannot be edited.
        TextError: If the prompts differ in length or are shorter than three tokens.
    """
    model = load_model(model)
    can = capabilities(model)
    prompts = readout.even(model, texts, 0, after=2)
    if not readout.has_loss(model):
        raise UnsupportedError(
            f"{can.architecture} predicts no next tokens, so a transplant has no loss; measure it "
            "with scan inside SinkTransplant."
        )
    chosen = readout.chosen(conditions, CONDITIONS, "conditions")
    if isinstance(donor, str):
        check_mode(donor, DONORS)
    block = _erased(model, prompts, erase)
    run = _Run(model, prompts, donor, block)
    names = ("untouched", *chosen)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with tqdm(total=len(prompts), unit="prompt", disable=not progress, leave=False) as bar:
        for row in range(len(prompts)):
            found.append(run.measure(row, names))
            bar.update()
    attention, loss, divergence = (torch.stack(x, dim=1) for x in zip(*found, strict=True))
    return Transplant(
        about=about(model, prompts),
        conditions=names,
        erased_in=-1 if block is None else block,
        attention=attention,
        loss=loss,
        divergence=divergence,
    )


def _erased(model: Any, prompts: Texts, erase: bool | int) -> int | None:
    """The block that adds most to ‖h_0‖, a given one, or none."""
    if erase is False:
        return None
    if erase is not True:
        (block,) = check_layers(erase, capabilities(model).n_layers)
        return block
    norm = readout.measure(model, prompts, {"norm": readout.RESIDUAL_NORM})["norm"][..., 0].mean(0)
    return int(torch.diff(norm, prepend=norm.new_zeros(1)).argmax())


class _Run:
    """The conditions, prompt after prompt, so that each can have its own donor."""

    def __init__(self, model: Any, prompts: Texts, donor: Any, block: int | None) -> None:
        self.model, self.prompts, self.block = model, prompts, block
        self._own = isinstance(donor, str) and donor == "own"
        self._donor = prompts if isinstance(donor, str) and donor == "mean" else donor
        self._kept: dict[tuple[int | None, str], SinkTransplant] = {}

    def measure(self, row: int, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention [condition layer head], loss and divergence [condition] of a prompt."""
        own = token_ids(self.prompts.tokens[row : row + 1])
        if self._own:
            self._kept.clear()
        untouched = self._log_probabilities(own, 0)
        next_tokens = own.tokens[0, 2:].to(untouched.device)
        attention, loss, divergence = [], [], []
        for name in names:
            slot = name.startswith("slot")
            texts = with_slot(self.model, own) if slot else own
            given = None
            if name not in ("untouched", "host"):
                what = name.removeprefix("slot").strip() or "both"
                given = self._transplant(None if slot else 0, what, own)
            with ExitStack() as stack:
                if self.block is not None and name != "untouched":
                    stack.enter_context(RemoveOutput(self.model, self.block, "mlp", int(slot)))
                if given is not None:
                    stack.enter_context(given)
                paid = readout.measure(self.model, texts, {"to": readout.TO_SINKS})["to"][0]
                now = self._log_probabilities(texts, int(slot))
            attention.append(paid)
            picked = now[:-1].gather(1, next_tokens[:, None])[:, 0]
            loss.append(-picked.mean().cpu())
            kl = (untouched.exp() * (untouched - now)).sum(-1)
            divergence.append(kl.mean().cpu())
        return torch.stack(attention), torch.stack(loss), torch.stack(divergence)

    def _transplant(self, position: int | None, what: str, own: Texts) -> SinkTransplant:
        key = position, what
        if key not in self._kept:
            donor = own if self._own else self._donor
            self._kept[key] = SinkTransplant(self.model, donor, position, what, donor_position=0)
        return self._kept[key]

    def _log_probabilities(self, texts: Texts, slot: int) -> Float[Tensor, "query token"]:
        """Of the queries after the prompt's first token, on the model as it is now."""
        how = paths.choose(self.model, capabilities(self.model), "auto")
        with torch.inference_mode(), runner.evaluating(self.model), how.opened():
            tokens = texts.tokens.to(runner.input_device(self.model))
            logits = self.model(tokens, return_type="logits", use_cache=False)
            return logits[0, 1 + slot :].float().log_softmax(-1)
