"""Chance levels of a scan: sink attention, residual peak and value drain in absence of a sink.

There are three nulls, each with the requested number of draws:

1. *initial*: the same architecture with transformers' initial weights, drawn anew each time (no
   trained weight is read). Causality alone makes early keys receive more.
2. *random*: another position of the prompt's first half, drawn for each prompt, serves as the sink.
   Since fewer queries see later keys, and queries with more visible keys give each of them less,
   attention to it is divided by its value under uniform attention, and multiplied by that of the
   sink. Its residual norm and value norm are compared with the others' like the sink's.
3. *shuffled*: the keys of each prompt are put into a random order, and sink attention of a query is
   its attention to the first of its visible keys in this order. Adjacent queries thus mostly share
   their key, as they share the sink, and uniform attention is the same as for the sink. Queries
   whose window no longer includes the sink count as 0.

Every draw has its own random stream (numpy's `SeedSequence`), given by the scan's seed, the null,
and the number of the model or prompt: scans with different seeds share no draws, and the draws of a
prompt do not depend on its batch. `report.chance` computes p-values from them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sinkscope.capture.accumulators import Accumulator, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers.base import Observer, Scope
from sinkscope.capture.readers import AttentionReader
from sinkscope.capture.reductions import all_layers
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.metrics import positions, residual, values
from sinkscope.models.active import in_force, user_hooks
from sinkscope.models.load import load_model
from sinkscope.report.chance import QUANTITIES

_INITIAL, _RANDOM, _SHUFFLED = range(3)


def check_one_sink(sinks: Bool[Tensor, "prompt position"]) -> None:
    """Check that every prompt has exactly one sink.

    Raises:
        TextError: If a prompt has none or several.
    """
    counts = sinks.sum(dim=1)
    if bool((counts != 1).any()):
        raise TextError(
            f"Nulls require one sink per prompt, but prompts here have {int(counts.min())} to "
            f"{int(counts.max())}; choose one position with sinks=[0]."
        )


def initial_models(model: Any, draws: int, seed: int = 0) -> Iterator[Any]:
    """Yield bridges of the model at initialisation, one at a time.

    Args:
        model: A bridge.
        draws: Number of models.
        seed: Seed of the scan; no model is drawn for two of them.

    Raises:
        UnsupportedError: If interventions or hooks are active, which a new model would lack, or
            transformers cannot create the model from its config.
    """
    original = model.original_model
    if in_force(model) or user_hooks(model):
        raise UnsupportedError(
            "Nulls compare a model with the same architecture at initialisation, which would lack "
            "the interventions or hooks active here; scan without nulls under them."
        )
    quantised = getattr(original, "quantization_method", None) is not None
    if not isinstance(original, PreTrainedModel) or quantised:
        raise UnsupportedError(
            f"A {type(original).__name__} cannot be created from its configuration, so there is "
            "no model at initialisation to compare it with; scan it without nulls."
        )
    weight = next(original.parameters())
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, _INITIAL, draw))
            fresh = type(original)(copy.deepcopy(original.config))
        yield load_model(fresh.to(weight.device, weight.dtype).eval())


def initial_fields(
    model: Any, draws: int, measure: Callable[[Any], dict[str, Tensor]], seed: int = 0
) -> dict[str, Tensor]:
    """The fields of the initial null.

    Args:
        model: A bridge.
        draws: Number of draws.
        measure: Returns the fields of a bridge by name, each with the prompt first.
        seed: Seed of the scan.

    Returns:
        The measured ones of `QUANTITIES`, with draws along the last dimension.
    """
    drawn = [measure(fresh) for fresh in initial_models(model, draws, seed)]
    return {
        f"initial_{name}": torch.stack([one[name] for one in drawn], dim=-1)
        for name in QUANTITIES
        if name in drawn[0]
    }


class _Drawn(Observer):
    """Base class of the nulls over positions, whose draws depend only on the prompt.

    Args:
        scope: Scope of the scan.
        draws: Number of draws.
        seed: Seed of the scan.
    """

    def __init__(self, scope: Scope, draws: int, seed: int = 0) -> None:
        super().__init__(scope)
        self.draws, self.seed = draws, seed

    def accumulator(self, name: str) -> Accumulator:
        """Store every prompt."""
        return PerPrompt()

    def other_sinks(self, batch: Batch) -> Int[Tensor, "prompt draw"]:
        """Positions from the first half of each prompt except its sink; -1 if there are none."""

        def compute() -> Tensor:
            lengths, sinks = batch.mask.sum(dim=1).tolist(), batch.first_sink.tolist()
            chosen = []
            for row, length, sink in zip(batch.rows.tolist(), lengths, sinks, strict=True):
                places = torch.tensor([at for at in range(length // 2) if at != sink])
                if len(places):
                    source = _generator(self.seed, _RANDOM, row)
                    drawn = torch.randint(len(places), (self.draws,), generator=source)
                    chosen.append(places[drawn])
                else:
                    chosen.append(torch.full((self.draws,), -1))
            return torch.stack(chosen).to(batch.mask.device)

        return batch.once(("other sinks", self.draws, self.seed), compute)

    def at_others(
        self, definition: Callable[..., Tensor], layers: dict[str, Tensor], batch: Batch
    ) -> Float[Tensor, "layer prompt ... draw"]:
        """Evaluate a definition on norms, with each drawn position in turn as the sink."""
        index = torch.arange(batch.length, device=batch.mask.device)
        result = [
            all_layers(definition, layers["norm"], index == place[:, None], batch.mask)
            for place in self.other_sinks(batch).unbind(-1)
        ]
        return torch.stack(result, dim=-1)


class NullAttention(_Drawn, reads="attention"):
    """Sink attention of the random and shuffled nulls.

    The pattern is read key by key.
    """

    def observe(self, x: AttentionReader, batch: Batch) -> dict[str, Tensor]:
        """Weighted sums of the columns of the pattern."""
        weights = self._weights(batch, x.window)
        total: Tensor | None = None
        for key, column in enumerate(x.by_key()):
            part = torch.einsum("phq,pqd->phd", column, weights.of(key))
            total = part if total is None else total + part
        assert total is not None
        random, shuffled = total.split(self.draws, dim=-1)
        return {
            "random_sink_attention": random * weights.scale[:, None],
            "shuffled_sink_attention": shuffled,
        }

    def _weights(self, batch: Batch, window: int | None) -> _Weights:
        return batch.once(
            ("null weights", window, self.draws, self.seed),
            lambda: _Weights(batch, window, self.other_sinks(batch), self.draws, self.seed),
        )


class _Weights:
    """Weights of each query's attention to a key in each draw.

    Args:
        batch: The batch.
        window: Sliding window of the layer.
        others: The positions of the random null.
        draws: Number of draws of each null.
        seed: Seed of the scan.

    Attributes:
        scale: Uniform attention to the sink over that to the other position.
    """

    def __init__(
        self,
        batch: Batch,
        window: int | None,
        others: Int[Tensor, "prompt draw"],
        draws: int,
        seed: int,
    ) -> None:
        visible = positions.visible(batch.mask, batch.causal, window)  # [prompt query key]
        uniform = visible.float() / visible.sum(-1, keepdim=True).clamp(min=1)
        index = torch.arange(batch.length, device=batch.mask.device)
        queries = batch.mask[..., None] & (index[:, None] != others[:, None])
        if batch.causal:
            queries = queries & (index[:, None] > others[:, None])
        queries = queries & (others >= 0)[:, None]
        self._others = others
        self._random = queries.float() / queries.sum(dim=1, keepdim=True)  # nan where there is none
        at = others.clamp(min=0)[:, None].expand(-1, batch.length, -1)
        expected = (uniform.gather(-1, at) * self._random).sum(1)
        after = batch.queries.float() / batch.queries.sum(dim=1, keepdim=True)
        to_sink = (uniform * batch.sinks[:, None]).sum(-1)
        self.scale = (to_sink * after).sum(1, keepdim=True) / expected
        ranks = torch.full((len(batch.mask), draws, batch.length), 2.0)
        lengths = batch.mask.sum(dim=1).tolist()
        for at, (row, length) in enumerate(zip(batch.rows.tolist(), lengths, strict=True)):
            source = _generator(seed, _SHUFFLED, row)
            ranks[at, :, :length] = torch.rand(draws, length, generator=source)
        ranks = ranks.to(batch.mask.device)
        first = [
            torch.where(visible, ranks[:, draw, None], 2).argmin(dim=-1) for draw in range(draws)
        ]
        self._first = torch.stack(first, dim=-1)  # [prompt query draw]
        # Queries whose window no longer includes the sink count as 0, as in sink attention.
        self._after = torch.where(to_sink > 0, after, 0)[..., None]

    def of(self, key: int) -> Float[Tensor, "prompt query draw"]:
        """The weights of one key: the draws of the random null, then those of the shuffled null."""
        random = torch.where((self._others == key)[:, None], self._random, 0)
        shuffled = torch.where(self._first == key, self._after, 0)
        return torch.cat([random, shuffled], dim=-1)


class NullPeak(_Drawn, reads="resid_post"):
    """The residual peak of the random null."""

    def observe(self, x: Float[Tensor, "prompt position dim"], batch: Batch) -> dict[str, Tensor]:
        """One norm per token."""
        return {"norm": residual.residual_norms(x)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Peaks of all drawn positions in all layers."""
        return {"random_residual_peak": self.at_others(residual.residual_peak, layers, batch)}


class NullDrain(_Drawn, reads="value"):
    """The value drain of the random null."""

    def observe(
        self, x: Float[Tensor, "prompt position kv_head d_head"], batch: Batch
    ) -> dict[str, Tensor]:
        """One norm per vector."""
        return {"norm": values.norms(x)}

    def finish(self, layers: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Drains of all drawn positions in all layers."""
        return {"random_value_drain": self.at_others(values.drain, layers, batch)}


def stream(seed: int, null: int, number: int) -> int:
    """Seed of the random stream of one draw, or one prompt, of a null."""
    return int(np.random.SeedSequence([seed, null, number]).generate_state(1)[0])


def _generator(seed: int, null: int, row: int) -> torch.Generator:
    """Random generator of a prompt, independent of its batch."""
    return torch.Generator().manual_seed(stream(seed, null, row))
