"""Batches of prompts as passed to observers: right-padded, with mask and sinks.

With right padding a position's index is its token index, and under a causal mask no real query can
see a pad key, so causal models need no attention mask and use their fastest kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.devices import sent
from sinkscope.metrics import attention, positions

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Batch:
    """Some prompts of a text, on one device.

    Attributes:
        rows: Indices of the prompts in the text, on the CPU.
        tokens: Token ids; pads are 0, to the right of the real tokens.
        mask: True at real tokens.
        sinks: True at sink positions.
        causal: Whether a query sees only itself and earlier keys.
        ragged: Whether any prompt is shorter than the batch, so that there are pads.
        most_sinks: Largest number of sinks in a prompt.
        one_sink_each: Whether every prompt has exactly one sink.
        sink_is_first_token: Whether that one sink is position 0 in every prompt.
        has_external_hooks: Whether other hooks may edit an activation after an observer read it.
    """

    rows: Int[Tensor, "prompt"]
    tokens: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    sinks: Bool[Tensor, "prompt position"]
    causal: bool
    ragged: bool
    most_sinks: int
    one_sink_each: bool
    sink_is_first_token: bool
    has_external_hooks: bool = False
    _elsewhere: dict[torch.device, Batch] = field(default_factory=dict, repr=False, compare=False)
    _derived: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Batch:
        """This batch on `device`; the layers of one model may be on several devices."""
        if device == self.tokens.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = replace(
                self,
                tokens=self.tokens.to(device),
                mask=self.mask.to(device),
                sinks=self.sinks.to(device),
                _elsewhere={},
                _derived={},
            )
        return self._elsewhere[device]

    def once(self, key: object, compute: Callable[[], Shared]) -> Shared:
        """Compute a value shared by all layers once, and cache it under `key`."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    @property
    def length(self) -> int:
        """Columns of the batch, pads included."""
        return self.tokens.shape[1]

    @property
    def first_sink(self) -> Int[Tensor, "prompt"]:
        """The first sink position of each prompt."""
        return self.once("first sink", lambda: positions.first_true(self.sinks))

    @property
    def first_sink_mask(self) -> Bool[Tensor, "prompt position"]:
        """True at the first sink position of each prompt only."""
        index = torch.arange(self.length, device=self.mask.device)
        return self.once("first sink mask", lambda: index == self.first_sink[:, None])

    @property
    def others(self) -> Bool[Tensor, "prompt position"]:
        """Real positions that are not sinks."""
        return self.once("others", lambda: self.mask & ~self.sinks)

    @property
    def queries(self) -> Bool[Tensor, "prompt query"]:
        """Queries over which sink attention is averaged; see `metrics.positions.queries_after`."""
        return self.once(
            "queries", lambda: positions.queries_after(self.sinks, self.mask, self.causal)
        )

    @property
    def roles(self) -> Int[Tensor, "prompt position"]:
        """Bit flags of each position: 1 for a sink, 2 another real key, 4 one of `queries`."""
        return self.once(
            "roles", lambda: (self.sinks & self.mask).int() + 2 * self.others + 4 * self.queries
        )

    @property
    def seen(self) -> Float[Tensor, "prompt 2 position"]:
        """Numbers of sinks, and of other keys except its own, that each query sees causally."""

        def compute() -> Tensor:
            kinds = torch.stack([self.sinks & self.mask, self.others], dim=1).float()
            seen = kinds.cumsum(dim=-1)
            seen[:, 1] -= kinds[:, 1]
            return seen

        return self.once("seen", compute)

    @property
    def first_token(self) -> Bool[Tensor, "prompt position"]:
        """True at position 0 of each prompt only."""
        index = torch.arange(self.length, device=self.mask.device)
        return self.once("first token", lambda: self.mask & (index == 0))

    @property
    def last_token(self) -> Bool[Tensor, "prompt position"]:
        """True at the last real position of each prompt only."""
        index = torch.arange(self.length, device=self.mask.device)
        return self.once("last token", lambda: index == self.mask.sum(dim=1, keepdim=True) - 1)

    @property
    def eligible_keys(self) -> Bool[Tensor, "prompt key"]:
        """See `metrics.attention.eligible_keys`."""
        return self.once("eligible keys", lambda: attention.eligible_keys(self.mask, self.causal))

    def per_query(self, window: int | None) -> Float[Tensor, "prompt key"]:
        """1 / number of real queries that see each key with this window; 0 for pads."""

        def compute() -> Tensor:
            seen_by = positions.visible_queries(self.mask, self.causal, window)
            return torch.where(self.mask, 1 / seen_by, 0.0)

        return self.once(("per query", window), compute)

    def per_uniform(self, window: int | None) -> Float[Tensor, "prompt key"]:
        """1 / received attention of each key under uniform attention; 0 for pads."""

        def compute() -> Tensor:
            uniform = positions.uniform_received(self.mask, self.causal, window)
            return torch.where(self.mask, 1 / uniform, 0.0)

        return self.once(("per uniform", window), compute)

    def constant(self, values: tuple[float, ...]) -> Float[Tensor, "value"]:
        """Constants on this device, copied there once per batch."""
        return self.once(("constant", values), lambda: sent(torch.tensor(values), self.mask.device))

    def averages(self, *sets: str) -> Float[Tensor, "prompt position set"]:
        """Weights for averages over several sets of positions by a single matrix product.

        Args:
            sets: Names of boolean [prompt position] properties: "mask", "sinks", "others", ...

        Returns:
            One column per set, see `mean_weights`.
        """
        return self.once(
            sets, lambda: mean_weights(torch.stack([getattr(self, name) for name in sets], dim=-1))
        )

    def sink_averages(
        self, window: int | None, edges: tuple[int, ...]
    ) -> Float[Tensor, "prompt query set"]:
        """Weights for a column of attention to a sink.

        Args:
            window: Sliding window of the layer.
            edges: Lower edges of the buckets of query positions.

        Returns:
            Columns in this order: queries after the sink; all real queries; queries that see the
            first sink (itself included, as in Gu's importance); then one column per bucket of the
            queries after the sink.
        """

        def compute() -> Tensor:
            index = torch.arange(self.length, device=self.mask.device)
            distance = index - self.first_sink[:, None]
            before, after = positions.reach(self.causal, window)
            seeing = self.mask & (distance >= (-self.length if after is None else -after))
            if before is not None:
                seeing = seeing & (distance <= before)
            seeing = seeing & self.sinks.any(dim=1, keepdim=True)
            columns = [self.queries, self.mask, seeing, *self.buckets(edges).unbind(-1)]
            return mean_weights(torch.stack(columns, dim=-1))

        return self.once(("sink", window, edges), compute)

    def beyond(self, window: int | None) -> Bool[Tensor, "prompt query width"]:
        """For each width in `metrics.attention.RECENT`, see `metrics.positions.queries_beyond`."""

        def compute() -> Tensor:
            where = self.sinks, self.mask, self.causal, window
            return torch.stack(
                [positions.queries_beyond(width, *where) for width in attention.RECENT], dim=-1
            )

        return self.once(("beyond", window), compute)

    def uniform_nearby(self, window: int | None) -> Float[Tensor, "prompt span"]:
        """Uniform attention to each span of `metrics.attention.nearby_attention`."""

        def compute() -> Tensor:
            where = self.mask, self.causal, window
            shares = [
                positions.uniform_nearby(width, itself, *where)
                for itself in (True, False)
                for width in attention.RECENT
            ]
            queries = self.beyond(window).repeat(1, 1, 2)
            return positions.masked_mean(torch.stack(shares, dim=-1), queries, dim=1)

        return self.once(("uniform nearby", window), compute)

    def buckets(self, edges: tuple[int, ...]) -> Bool[Tensor, "prompt query bucket"]:
        """Bucket membership of each query after the sink."""

        def compute() -> Tensor:
            index = torch.arange(self.length, device=self.mask.device)
            bounds = sent(torch.tensor([*edges, self.length]), self.mask.device)
            inside = (index[:, None] >= bounds[:-1]) & (index[:, None] < bounds[1:])
            return self.queries[:, :, None] & inside

        return self.once(("buckets", edges), compute)


def mean_weights(sets: Bool[Tensor, "prompt position set"]) -> Float[Tensor, "prompt position set"]:
    """1 / n at the n members of each set; all nan for a set that is empty in a prompt."""
    return sets.float() / sets.sum(dim=1, keepdim=True)


def average(
    values: Float[Tensor, "prompt head position"], weights: Float[Tensor, "prompt position set"]
) -> Float[Tensor, "prompt head set"]:
    """Averages over positions with the weights of a batch, in fp32."""
    return values.float() @ weights


def cut(
    tokens: Int[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
    sinks: Bool[Tensor, "prompt position"],
    rows: Int[Tensor, "row"],
    *,
    causal: bool,
    device: torch.device,
    has_external_hooks: bool = False,
) -> Batch:
    """Build the batch of prompts `rows` of a text, cut to the length of its longest prompt."""
    # In numpy, because waking torch's thread pool for a few numbers takes longer than a layer.
    index = rows.numpy()
    real = mask.cpu().numpy()[index]
    length = int(real.sum(axis=1).max())
    real, at_sinks = real[:, :length], sinks.cpu().numpy()[index, :length]
    number = at_sinks.sum(axis=1)
    one_each = bool((number == 1).all())

    def there(x: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(np.ascontiguousarray(x)), device)

    return Batch(
        rows=rows,
        tokens=there(tokens.cpu().numpy()[index, :length]),
        mask=there(real),
        sinks=there(at_sinks),
        causal=causal,
        ragged=not bool(real.all()),
        most_sinks=int(number.max()),
        one_sink_each=one_each,
        sink_is_first_token=one_each and bool(at_sinks[:, 0].all()),
        has_external_hooks=has_external_hooks,
    )


def classes(
    mask: Bool[Tensor, "prompt position"], class_of: Callable[[int], int]
) -> Int[Tensor, "prompt"]:
    """The class of each prompt's length; equal classes are adjacent in the order of `by_length`."""
    return torch.tensor([class_of(length) for length in mask.sum(dim=1).tolist()])


def together(
    order: Int[Tensor, "row"], classes: Int[Tensor, "prompt"], size: int
) -> Iterator[Int[Tensor, "row"]]:
    """Split prompts into batches that a model may run together.

    Args:
        order: Prompts in the order of `by_length`, all or some.
        classes: The class of every prompt, see `classes`.
        size: Maximum number of prompts in a batch.

    Yields:
        Consecutive prompts in that order, of one class.
    """
    done = 0
    while done < len(order):
        rows = order[done : done + size]
        rows = rows[classes[rows] == classes[rows[0]]]
        yield rows
        done += len(rows)


def by_length(mask: Bool[Tensor, "prompt position"]) -> Int[Tensor, "prompt"]:
    """Prompts sorted from long to short, which reduces padding.

    The first batch then needs the most memory, so that a batch size that is too large fails early.
    """
    return torch.argsort(mask.sum(dim=1), descending=True, stable=True).cpu()
