"""Measure a few quantities of every prompt and layer in one pass, for the experiments.

`measure` runs the texts once and returns tensors [prompt layer ...] for the given `Quantity`
objects; `losses` are the next-token losses; `even` checks that prompts have one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.capture import paths, runner
from sinkscope.capture.accumulators import Accumulator, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers import Observer, Scope
from sinkscope.capture.readers import AttentionReader
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import check_mode
from sinkscope.metrics import attention, ffn, residual, values
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.probe import input_device
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.validation import strings

LOSS_TOKENS = 1024
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Quantity:
    """A quantity to measure in every layer.

    Attributes:
        signal: "attention", or the name of an activation (see `Capabilities`).
        reduce: Maps the signal and its batch to [prompt ...].
        statistics: Methods of `AttentionReader` that `reduce` calls, see there.
    """

    signal: str
    reduce: Callable[[Any, Batch], Tensor]
    statistics: frozenset[str] = frozenset()


def _received(x: AttentionReader, batch: Batch) -> Float[Tensor, "prompt key"]:
    alpha = attention.importance(x.received(), batch.mask, batch.causal, x.window)
    return alpha.mean(dim=1)


def _to_sinks(x: AttentionReader, batch: Batch) -> Float[Tensor, "prompt head"]:
    return attention.sink_attention(x.on_keys(batch.sinks), batch.sinks, batch.mask, batch.causal)


def _value_norms(
    x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
) -> Float[Tensor, "prompt position"]:
    return values.norms(x).mean(dim=1)


RECEIVED = Quantity("attention", _received, frozenset({"received"}))
"""Importance of each key, mean over heads [prompt position]."""
TO_SINKS = Quantity("attention", _to_sinks)
"""Attention of the queries after the sinks to them [prompt head]."""
VALUE_NORM = Quantity("value", _value_norms)
"""Norm of each value, mean over KV heads [prompt position]."""
RESIDUAL_NORM = Quantity("resid_post", lambda x, batch: residual.residual_norms(x))
"""Norm of each residual state [prompt position]."""
FFN_MIXED_MAX = Quantity("mlp_out", lambda x, b: ffn.ffn_profile(x, b.sinks, b.mask)[1])
"""Largest |FFN output| over the positions that are not sinks [prompt dim]."""


def at(signal: str, position: int) -> Quantity:
    """Return the quantity of an activation at one position [prompt dim]."""
    return Quantity(signal, lambda x, batch: x[:, position].float())


class _Keep(Observer):
    """Keeps one quantity of every prompt."""

    def __init__(self, name: str, quantity: Quantity, scope: Scope) -> None:
        self.signal, self.statistics = quantity.signal, quantity.statistics  # type: ignore[misc]
        self._name = name
        self._reduce = quantity.reduce
        super().__init__(scope)

    def accumulator(self, name: str) -> Accumulator:
        return PerPrompt()

    def observe(self, x: Any, batch: Batch) -> dict[str, Tensor]:
        return {self._name: self._reduce(x, batch)}


def measure(
    model: Any, texts: Texts, quantities: dict[str, Quantity], sinks: Iterable[int] = (0,)
) -> dict[str, Float[Tensor, "prompt layer ..."]]:
    """Measure quantities in every layer, in one pass over the texts.

    Args:
        model: A bridge; active interventions apply.
        texts: Prompts of equal length, right-padded.
        quantities: By name.
        sinks: The sink positions of every prompt.

    Returns:
        Tensors [prompt layer ...] by name, on the CPU.
    """
    caps = capabilities(model)
    where = torch.zeros_like(texts.mask)
    where[:, list(sinks)] = True
    of_model = scope(caps)
    observers = [_Keep(name, quantity, of_model) for name, quantity in quantities.items()]
    how = paths.choose(model, caps, "auto")
    order = runner.run(model, texts, where, observers, how, causal=caps.causal, progress=False)
    return {
        name: tensor.cpu()
        for observer in observers
        for name, tensor in observer.results(order).items()
    }


def scope(caps: Capabilities) -> Scope:
    """Return the scope for observers that do not need the output projections."""

    def no_gram(layer: int) -> Tensor:
        raise NotImplementedError("these observers do not use W_O")

    sizes = {"layer": caps.n_layers}
    return Scope(0.3, caps.n_heads, bucket_edges=(1,), gram=no_gram, sizes=sizes)


def median_of_others(
    norms: Float[Tensor, "prompt layer position"], positions: list[int]
) -> Float[Tensor, "prompt layer"]:
    """Median norm of all positions but these, see `metrics.residual.median_of_others`."""
    real = torch.ones(len(norms), norms.shape[-1], dtype=torch.bool)
    taken = torch.zeros_like(real)
    taken[:, positions] = True
    return torch.stack(
        [residual.median_of_others(layer, taken, real) for layer in norms.unbind(1)], dim=1
    )


def chosen(names: Iterable[str], choices: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return the chosen names, at least one.

    Args:
        names: The names.
        choices: The allowed names.
        what: What to call them in errors, in the plural.

    Raises:
        UnsupportedError: If one is unknown, or none is named.
    """
    valid = tuple(check_mode(name, choices) for name in strings(what, names, UnsupportedError))
    if not valid:
        raise UnsupportedError(f"No {what} are named; name some of {', '.join(choices)}.")
    return valid


def has_loss(model: Any) -> bool:
    """Return whether a model predicts next tokens with a trained output head."""
    caps = capabilities(model)
    return caps.causal and caps.lm_head


def losses(model: Any, texts: Texts) -> Float[Tensor, "prompt query"] | None:
    """Loss of each query's prediction of the next token [nat]; nan at the last one.

    None for a model that does not predict next tokens or has no trained output head.
    """
    if not has_loss(model):
        return None
    rows = max(1, LOSS_TOKENS // texts.tokens.shape[1])
    device = input_device(model)
    parts = []
    with (
        torch.inference_mode(),
        runner.evaluating(model),
        paths.choose(model, capabilities(model), "auto").opened(),
    ):
        for tokens in texts.tokens.split(rows):
            tokens = tokens.to(device)
            logits = model(tokens, return_type="logits", use_cache=False)
            nll = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:].to(logits.device),
                reduction="none",
            )  # fmt: skip
            parts.append(torch.nn.functional.pad(nll, (0, 1), value=torch.nan).cpu())
    return torch.cat(parts)


def even(model: Any, texts: Any, position: int | None = None, after: int = 1) -> Texts:
    """Return prompts of equal length that extend beyond a position.

    Args:
        model: A bridge.
        texts: The prompts.
        position: The position.
        after: How many tokens there should be after it.

    Raises:
        TextError: If they differ in length, or end at the position or too soon after it.
    """
    prompts = as_texts(texts).tokenize(model).right_padded()
    length = prompts.tokens.shape[1]
    if not prompts.mask.all():
        raise TextError(
            "This experiment needs prompts of equal length; these have "
            f"{int(prompts.lengths.min())} to {length} tokens."
        )
    if position is not None and not 0 <= position < length - after:
        wanted = "a token" if after == 1 else f"{after} tokens"
        raise TextError(
            f"Position {position} should have {wanted} after it, and these prompts have {length} "
            f"tokens; choose one from 0 to {length - after - 1}, or longer prompts."
        )
    return prompts
