"""The Bigram-Backcopy task (Guo et al. 2024, arXiv 2410.13835, §2), generated and solved exactly.

Most symbols are followed as in a character bigram. After a *trigger* symbol the chain instead
copies the symbol before the trigger: `x[t+1] = x[t-1]`. A head that handles the triggers has
nothing to do at other queries, at which the attention sink forms.

The pair (x[t-1], x[t]) is a Markov chain, so its exact properties (Bayes loss, trigger share,
entropies) are computed by propagating V x V probabilities, without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.bb.source import BigramSource
from sinkscope.errors import TextError

# Most prompts drawn at once: the chain is sequential in positions, so only prompts are parallel.
WIDTH = 2**17


class BigramBackcopy:
    """Bigram-Backcopy over a bigram source.

    Ids 0 … V-1 are the source's symbols, V is BOS and V+1 a delimiter that is never emitted (as in
    the reference, where 65 symbols make a vocabulary of 67).

    With `bos` other than 1 the vocabulary differs from the reference's, where every BOS token has
    its own id: V + bos + 1 ids (66 without BOS; 68 with two, `<s_0>` and `<s_1>`). Here it is
    always V + 2, and all BOS tokens have the same id.

    Args:
        source: The base process; by default the English counts that come with sinkscope.
        triggers: Number of most frequent symbols that are triggers (the paper's k), or their ids.
        bos: Number of BOS tokens at the start of a sequence (the paper: 1, and 0 and 2 as
            ablations).

    Raises:
        TextError: If a trigger is not a symbol, or all symbols are triggers.
    """

    def __init__(
        self, source: BigramSource | None = None, triggers: int | Sequence[int] = 3, bos: int = 1
    ) -> None:
        self.source = source if source is not None else BigramSource.english()
        self.bos = bos
        self.symbols = len(self.source)
        self.bos_id, self.delimiter_id = self.symbols, self.symbols + 1
        self.vocab = self.symbols + 2
        if isinstance(triggers, int):
            by_frequency = torch.argsort(self.source.marginal, descending=True, stable=True)
            triggers = by_frequency[:triggers].tolist()
        self.triggers = tuple(triggers)
        if any(not 0 <= t < self.symbols for t in self.triggers):
            raise TextError(f"triggers {self.triggers} must be symbol ids below {self.symbols}")
        if bos < 0:
            raise TextError(f"the number of BOS tokens must be 0 or more, got {bos}")
        start = self.source.marginal.clone()
        start[list(self.triggers)] = 0.0
        if start.sum() <= 0:
            raise TextError("every symbol is a trigger, so no sequence can start: give fewer")
        self.start: Float[Tensor, "symbol"] = start / start.sum()

    @cached_property
    def is_trigger(self) -> Bool[Tensor, "vocab"]:
        """Mask of the token ids that are triggers."""
        flags = torch.zeros(self.vocab, dtype=torch.bool)
        flags[list(self.triggers)] = True
        return flags

    # ------------------------------------------------------------------ generation

    @cached_property
    def _edges(self) -> Float[Tensor, "edge"]:
        """Inverse CDFs of all rows, concatenated: row x fills the interval [x, x+1).

        In one sorted list a draw is one binary search for any row. Row V is the start.
        """
        rows = torch.cat([self.source.transition, self.start[None]])
        cdf = rows.cumsum(1)
        cdf = cdf / cdf[:, -1:]  # exactly 1 from each row's last possible symbol on
        offsets = torch.arange(len(rows), dtype=torch.float64)
        return rearrange(cdf + offsets[:, None], "row symbol -> (row symbol)")

    def sample(
        self, prompts: int, length: int, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Int[Tensor, "prompt position"]:
        """Draw sequences of `length` tokens, BOS included; equal seeds on equal devices agree.

        Raises:
            TextError: if there is no prompt or no token to draw.
        """
        if min(prompts, length) < 1:
            raise TextError(f"cannot draw {prompts} prompts of {length} tokens; ask for 1 or more")
        generator = torch.Generator(device).manual_seed(seed)
        draws = torch.rand(
            (length, prompts), generator=generator, device=device, dtype=torch.float64
        )
        edges, is_trigger = self._edges.to(device), self.is_trigger.to(device)
        previous = now = torch.full((prompts,), self.bos_id, device=device)
        tokens = [now] * min(self.bos, length)
        for draw in draws[len(tokens) :]:
            fresh = torch.searchsorted(edges, now + draw, right=True) - now * self.symbols
            # now + draw may round up to the next row: probability 2^-46, kept in this row
            fresh = fresh.clamp(max=self.symbols - 1)
            previous, now = now, torch.where(is_trigger[now], previous, fresh)
            tokens.append(now)
        return torch.stack(tokens, dim=1)

    # ------------------------------------------------------------------ exact solution

    def oracle(
        self, tokens: Int[Tensor, "prompt position"]
    ) -> Float[Tensor, "prompt position symbol"]:
        """Return the true distribution of the next symbol after each position [probability].

        It is one-hot after a trigger. A second BOS, if the task has one, counts as known: its query
        gets the row of the first symbol; risks are never computed on BOS queries.
        """
        device = tokens.device
        rows = torch.cat([self.source.transition, self.start[None]]).to(device)
        following = rows[tokens.clamp(max=self.bos_id)]
        before = tokens.roll(1, dims=1)
        copied = torch.nn.functional.one_hot(before.clamp(max=self.symbols - 1), self.symbols)
        at_trigger = self.is_trigger.to(device)[tokens][..., None]
        return torch.where(at_trigger, copied.double(), following)

    def statistics(self, length: int) -> ChainStatistics:
        """Solve the task exactly for `length` queries (positions 0 … length-1).

        Propagates the joint distribution of (x[t-1], x[t]) position by position.
        """
        transition = self.source.transition
        is_trigger = self.is_trigger[: self.symbols]
        row_entropy = torch.special.entr(transition).sum(1)
        start_entropy = torch.special.entr(self.start).sum()
        now = torch.zeros(length, self.symbols, dtype=torch.float64)
        # What precedes the first symbol is BOS or nothing. The first symbol is never a trigger,
        # so it is never copied, and the pair chain can start with all mass on "from nowhere".
        pair: Float[Tensor, "previous current"] | None = None
        for position in range(self.bos, length):
            if pair is None:
                now[position] = self.start
                pair = torch.diag(self.start)  # the previous symbol does not matter here
            else:
                pair = self._step(pair, is_trigger)
                now[position] = pair.sum(0)
        bigram_mass = now[:, ~is_trigger]
        after_symbols = bigram_mass @ row_entropy[~is_trigger]
        entropy = after_symbols.clone()
        if self.bos and length >= self.bos:
            entropy[self.bos - 1] = start_entropy
        return ChainStatistics(
            symbol_probability=now,
            query_entropy=entropy,
            trigger_share=float(now[:, is_trigger].sum() / length),
            bigram_entropy=float(after_symbols.sum() / bigram_mass.sum()),
            bayes_loss=float(entropy.mean()),
        )

    def _step(
        self, pair: Float[Tensor, "previous current"], is_trigger: Bool[Tensor, "symbol"]
    ) -> Float[Tensor, "current following"]:
        copied = torch.where(is_trigger[:, None], pair.T, 0.0)
        drawn = torch.where(is_trigger, 0.0, pair.sum(0))[:, None] * self.source.transition
        return copied + drawn

    def __repr__(self) -> str:
        shown = self.triggers
        if self.source.symbols is not None:
            shown = tuple(self.source.symbols[t] for t in self.triggers)
        name = self.source.name
        return f"BigramBackcopy({name}, V={self.vocab}, triggers={shown}, bos={self.bos})"


@dataclass(frozen=True)
class ChainStatistics:
    """The exact solution of a Bigram-Backcopy task for a given number of queries.

    Attributes:
        symbol_probability: P(x[t] = symbol) at each position; zero on BOS positions [probability].
        query_entropy: expected entropy of the next token given the past [nat].
        trigger_share: expected share of all queries that are triggers.
        bigram_entropy: expected entropy of the next symbol over non-trigger queries [nat].
        bayes_loss: the lowest possible mean loss over all queries, BOS included [nat].
    """

    symbol_probability: Float[Tensor, "position symbol"]
    query_entropy: Float[Tensor, "position"]
    trigger_share: float
    bigram_entropy: float
    bayes_loss: float


class Batches:
    """An endless, seeded, random-access stream of fresh batches: `batches[step]`.

    Batch `step` depends only on (seed, step), so a resumed run gets the same batches.
    Neighbouring batches are drawn together, to amortise the sequential loop over positions.
    """

    def __init__(
        self,
        task: BigramBackcopy,
        batch: int,
        length: int,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.task, self.batch, self.length, self.seed = task, batch, length, seed
        self.device = device
        self.steps = max(1, min(256, WIDTH // batch))
        self._chunk: tuple[int, Int[Tensor, "step prompt position"]] | None = None

    def __getitem__(self, step: int) -> Int[Tensor, "prompt position"]:
        chunk = step // self.steps
        if self._chunk is None or self._chunk[0] != chunk:
            self._chunk = None  # free the old chunk before the new one is drawn
            tokens = self.task.sample(
                self.steps * self.batch, self.length, mixed_seed(self.seed, chunk), self.device
            )
            batches = rearrange(tokens, "(step prompt) t -> step prompt t", step=self.steps)
            self._chunk = chunk, batches
        return self._chunk[1][step % self.steps]


def mixed_seed(*parts: int) -> int:
    """Mix several small non-negative integers into one 63-bit seed."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return int(state) >> 1
