"""Which tokens can be a sink: the whole trajectory of every token of a vocabulary at position 0.

Peng et al. 2026 (arXiv 2603.06591) find that position 0 is recognised within two blocks whatever
its token is, and Sun et al. 2026 (arXiv 2603.05498) that more than 98 % of a vocabulary makes a
massive activation there. Under a causal mask position 0 attends to itself alone, so prompts of one
token give its residual stream exactly, at a hundredth of the cost of texts.

1. Measure real text: the norm of its later tokens after every block, the block after which
   position 0 stands out most, and the mean state of position 0 there, the sink vector. Verify that
   position 0 has the states that its token has alone.
2. Run every token alone, in large batches: its norm over that of later tokens, and its cosine to
   the sink vector, after every block. A token makes a sink if its ratio after the block of the
   peak exceeds a threshold. Sums of the states of these tokens give the share of their energy that
   is one constant vector, ‖mean h‖² / mean ‖h‖².
3. Do the same for a sample of tokens behind BOS, and, where positions are learned, with another
   position's vector.
4. Put a few exceptions, which make no sink, and controls of the same class first in real prompts
   (`first_tokens`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture import paths, runner
from sinkscope.capture.accumulators import Accumulator, PerPrompt
from sinkscope.capture.batches import Batch
from sinkscope.capture.observers import Observer, Scope
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.first_tokens import EXCEPTION, FirstTokens, first_tokens
from sinkscope.experiments.result import Result, about, stacked
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.interventions import PositionEmbeddingEdit
from sinkscope.metrics import residual
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model
from sinkscope.models.signals import close
from sinkscope.output import counted, number, printable, table_as_text
from sinkscope.prompts.special_tokens import special_tokens
from sinkscope.prompts.token_classes import CLASSES, token_classes
from sinkscope.prompts.tokens import Texts, token_ids
from sinkscope.statistics import Interval, estimate
from sinkscope.validation import real_number, shown, whole_number
from sinkscope.validation import seed as checked_seed

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FIRST = "first"
"""Name of the condition in which a token is the first of its prompt."""
_CHUNK = 1024
"""Number of tokens per chunk of computing and saving."""
_PROMPTS = 4
"""Number of prompts in which exceptions and controls are put first."""
_SHOWN = 20
"""Number of exceptions listed in the summary."""
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Vocabulary(Result):
    """Norms and cosines of every token of a vocabulary as the first token of a prompt.

    In the first condition a token is at position 0; in "after BOS" it follows the special tokens
    that texts begin with; in "first, vector of position N" its position embedding is another one.
    `norm` and `cosine` are nan where a token was not measured in a condition.

    Attributes:
        conditions: Names along `condition`.
        ids: Token ids along `token`.
        text: The text of each, spaces kept.
        classes: Names of the classes of tokens.
        kind: The class of each token, an index of `classes`.
        threshold: Norm ratio above which a token makes a sink.
        peak_layer: The block after which position 0 of the texts stands out most.
        whole: Whether `ids` is the whole vocabulary; otherwise a random sample of it.
        positions: Kind of the model's positions, "rotary", "learned", …
        later_norm: Median norm of the tokens after the first of real text [activation].
        text_norm: Norm of position 0 of real text [activation].
        sink_vector: Mean state of position 0 of real text [activation].
        norm: ‖h‖ of each token after every block [activation].
        cosine: Its cosine to `sink_vector`.
        sink_sum: Sum of the states of the tokens that make a sink, in pieces along `chunk`
            [activation]; nan where nothing was measured.
        confirmed: Exceptions and controls in real prompts; None if there are none, or before.
    """

    QUESTION = "Which tokens can be a sink?"

    conditions: list[str]
    ids: Int[Tensor, "token"]
    text: list[str]
    classes: list[str]
    kind: Int[Tensor, "token"]
    threshold: float
    peak_layer: int
    whole: bool
    positions: str
    later_norm: Float[Tensor, "prompt layer"]
    text_norm: Float[Tensor, "prompt layer"]
    sink_vector: Float[Tensor, "layer dim"]
    norm: Float[Tensor, "condition token layer"]
    cosine: Float[Tensor, "condition token layer"]
    sink_sum: Float[Tensor, "condition chunk layer dim"]
    confirmed: FirstTokens | None = None

    # -- what follows from it ------------------------------------------------------------------

    @property
    def ratio(self) -> Float[Tensor, "condition token layer"]:
        """‖h‖ over the norm of a later token of real text after the same block [ratio]."""
        return self.norm / self.later_norm.mean(0)

    @property
    def measured_tokens(self) -> Tensor:
        """Whether a token was measured in a condition [condition token]."""
        return ~self.norm[..., -1].isnan()

    @property
    def makes_sink(self) -> Tensor:
        """Whether a token makes a sink: its ratio at `peak_layer` exceeds the threshold.

        [condition token]; False where a token was not measured.
        """
        return self.ratio[..., self.peak_layer] > self.threshold

    def exceptions(self, condition: int = 0) -> list[int]:
        """The ids of the tokens that make no sink.

        Args:
            condition: Index of the condition in `conditions`.
        """
        chosen = self.measured_tokens[condition] & ~self.makes_sink[condition]
        return self.ids[chosen].tolist()

    def share(self, condition: int = 0, kind: int | None = None) -> Interval:
        """The share of the measured tokens that makes a sink, with a 95 % interval.

        The interval is over the prompts, whose later tokens set the scale of the threshold, and
        over the tokens if these are a sample, but not over the tokens of a whole vocabulary.

        Args:
            condition: Index of the condition in `conditions`.
            kind: Index in `classes`, to restrict to one class of tokens.
        """
        chosen = self.measured_tokens[condition]
        if kind is not None:
            chosen = chosen & (self.kind == kind)
        norm = self.norm[condition, chosen, self.peak_layer].double().numpy()
        if not len(norm):
            return Interval(np.nan, np.nan, np.nan)
        scale = self.later_norm[:, self.peak_layer].double().numpy()
        mean = float((norm > self.threshold * scale.mean()).mean())
        if len(scale) < 2:
            return Interval(mean, np.nan, np.nan)
        draw = np.random.default_rng(0)
        drawn = scale[draw.integers(len(scale), size=(_RESAMPLES, len(scale)))].mean(1)
        ordered = np.sort(norm)
        below = np.searchsorted(ordered, self.threshold * drawn, side="right")
        shares = 1 - below / len(norm)
        if not self.is_complete(condition):
            shares = draw.binomial(len(norm), shares) / len(norm)
        low, high = np.quantile(shares, [0.025, 0.975])
        return Interval(mean, min(float(low), mean), max(float(high), mean))

    def is_complete(self, condition: int = 0) -> bool:
        """Whether every token of the vocabulary was measured in a condition."""
        return self.whole and bool(self.measured_tokens[condition].all())

    def constant_share(self, condition: int = 0) -> Float[Tensor, "layer"]:
        """The share of the energy of the tokens that make a sink that is one constant vector.

        ‖mean h‖² / mean ‖h‖² over these tokens: 1 if their states are equal [share].

        Args:
            condition: Index of the condition in `conditions`.
        """
        chosen = self.makes_sink[condition]
        mean = self.sink_sum[condition].double().nansum(0) / chosen.sum()
        return mean.square().sum(-1) / self.norm[condition, chosen].double().square().mean(0)

    # -- as a result ---------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Shares (by class too), cosines and exceptions by condition, and those in real prompts."""
        at = self.peak_layer
        facts: dict[str, Any] = {
            "tokens": len(self.ids),
            "whole_vocabulary": self.whole,
            "threshold": self.threshold,
            "peak_layer": at,
            "positions": self.positions,
            "later_norm": estimate(self.later_norm[:, at]),
            "text_ratio": estimate(self.text_norm[:, at] / self.later_norm[:, at]),
            "conditions": [self._condition(index) for index in range(len(self.conditions))],
        }
        if self.confirmed is not None:
            facts["confirmed"] = self.confirmed.statistics(self.threshold)
        return facts

    def _condition(self, index: int) -> dict[str, Any]:
        at, measured = self.peak_layer, self.measured_tokens[index]
        ratio, sinks = self.ratio[index], self.makes_sink[index]
        row: dict[str, Any] = {
            "condition": self.conditions[index],
            "measured": int(measured.sum()),
            "share": self.share(index),
            "share_after_any_block": float(
                (ratio[measured].amax(-1) > self.threshold).float().mean()
            ),
            "by_class": {
                name: {
                    "measured": int((measured & (self.kind == kind)).sum()),
                    "no_sink": int((measured & ~sinks & (self.kind == kind)).sum()),
                    "share": self.share(index, kind),
                }
                for kind, name in enumerate(self.classes)
                if bool((measured & (self.kind == kind)).any())
            },
        }
        for name, chosen in (("of_sinks", sinks), ("of_exceptions", measured & ~sinks)):
            row[name] = {
                "ratio": _spread(ratio[chosen, at]),
                "cosine": _spread(self.cosine[index, chosen, at]),
            }
        if sinks.any():
            row["constant_share"] = float(self.constant_share(index)[at])
        text = dict(zip(self.ids.tolist(), self.text, strict=True))
        row["exceptions"] = {str(id): text[id] for id in self.exceptions(index)}
        return row

    def summary(self) -> str:
        """The shares by class in a table, the exceptions, and their effect in real prompts."""
        return _summary(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per condition and measured token, at the block of the peak.

        Columns condition, token, text, class, ratio [ratio], largest_ratio over blocks [ratio],
        cosine to the sink vector, sink (whether it makes one).
        """
        import pandas as pd

        pieces = []
        for index, condition in enumerate(self.conditions):
            rows = self.measured_tokens[index]
            chosen = rows.nonzero()[:, 0].tolist()
            ratio = self.ratio[index, rows]
            columns = {
                "condition": condition,
                "token": self.ids[rows].numpy(),
                "text": [self.text[i] for i in chosen],
                "class": [self.classes[i] for i in self.kind[rows].tolist()],
                "ratio": ratio[:, self.peak_layer].double().numpy(),
                "largest_ratio": ratio.amax(-1).double().numpy(),
                "cosine": self.cosine[index, rows, self.peak_layer].double().numpy(),
                "sink": self.makes_sink[index, rows].numpy(),
            }
            pieces.append(pd.DataFrame(columns))
        return stacked(pieces)

    def trajectories(self) -> pd.DataFrame:
        """Norm ratios by block: their spread over tokens that make a sink and over the others.

        Returns:
            Columns condition, group ("sink", "no sink"), tokens (how many), layer, low, median,
            high: the 5, 50 and 95 % quantiles over tokens [ratio].
        """
        import pandas as pd

        pieces = []
        for index, condition in enumerate(self.conditions):
            sinks, measured = self.makes_sink[index], self.measured_tokens[index]
            for group, chosen in (("sink", sinks), ("no sink", measured & ~sinks)):
                ratio = self.ratio[index, chosen].double().numpy()
                if not len(ratio):
                    continue
                low, median, high = np.quantile(ratio, [0.05, 0.5, 0.95], axis=0)
                columns = dict(layer=range(ratio.shape[1]), low=low, median=median, high=high)
                row = dict(condition=condition, group=group, tokens=len(ratio))
                pieces.append(pd.DataFrame(columns).assign(**row))
        return stacked(pieces)

    def figures(self) -> dict[str, go.Figure]:
        """Shares by class, norm ratios by block, and a map of the vocabulary."""
        from sinkscope.plot import vocabulary_map, vocabulary_norms, vocabulary_shares

        frame, scale = self.to_frame(), dict(about=self.about, threshold=self.threshold)
        return {
            "shares": vocabulary_shares(frame, **scale),
            "norms": vocabulary_norms(self.trajectories(), **scale),
            "map": vocabulary_map(frame[frame["condition"] == self.conditions[0]], **scale),
        }


def _spread(x: Float[Tensor, "token"]) -> dict[str, float]:
    """Return the median and the 5 and 95 % quantiles over tokens."""
    if not len(x):
        return dict.fromkeys(("low", "median", "high"), np.nan)
    low, median, high = np.quantile(x.double().numpy(), [0.05, 0.5, 0.95]).tolist()
    return {"low": low, "median": median, "high": high}


def vocabulary(
    model: Any,
    texts: Any,
    *,
    threshold: float = 10.0,
    sample: int | None = None,
    further: int = 4096,
    pairs: int = 8,
    bos: str | int = "auto",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> Vocabulary:
    """Measure every token of the vocabulary as the first token of a prompt.

    Args:
        model: A bridge, or anything that `load_model` takes; causal.
        texts: Real text of equal lengths, which sets the scale and takes exceptions and controls.
        threshold: A token makes a sink if its norm exceeds this many times that of a later token
            of `texts`, after the block where position 0 of `texts` stands out most.
        sample: How many tokens to measure, drawn at random; by default the whole vocabulary.
        further: How many of these, drawn at random, to measure in the further conditions (after
            BOS; with another position's vector); 0 for none.
        pairs: How many pairs of an exception and a control to put first in real prompts.
        bos: "auto" for the special tokens that the tokenizer puts before a text where it has any,
            "never" for no condition after BOS, or the id of a token to use as BOS.
        seed: Seed of the draws.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        Norms and cosines of every token after every block, and exceptions in real prompts.

    Raises:
        UnsupportedError: If the model is bidirectional, or position 0 has other states in a text
            than its token has alone.
        TextError: If the texts differ in length or have fewer than four tokens, or an argument is
            out of range.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.
    """
    model = load_model(model)
    caps = _causal(capabilities(model))
    threshold = real_number("threshold", threshold, at_least=0, error=TextError)
    sample = (
        caps.d_vocab
        if sample is None
        else whole_number("sample", sample, at_least=1, error=TextError)
    )
    further = whole_number("further", further, at_least=0, error=TextError)
    pairs = whole_number("pairs", pairs, at_least=0, error=TextError)
    seed = checked_seed(seed, TextError)
    file = kept_in(file, model)
    prompts = readout.even(model, texts, 0, after=3)
    prefix = _prefix(model, bos, caps.d_vocab)
    plan = _plan(caps, prefix, min(sample, caps.d_vocab), further, seed)
    request = {}
    if file is not None:
        options = dict(threshold=threshold, pairs=pairs, seed=seed)
        request = request_of(model, prompts, plan=[str(one) for one in plan], **options)
    with Kept(Vocabulary, file, request) as kept:
        result = kept.found or _begun(model, caps, prompts, plan, threshold)
        _fill(model, caps, result, plan, kept, progress)
        if result.confirmed is None and pairs:
            result = _confirm(model, prompts, result, prefix, pairs, seed, progress)
            kept.write(result)
    return result


# -- what to measure -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Condition:
    """A condition of `Vocabulary`.

    Attributes:
        name: Its name.
        before: Token ids before the token.
        rows: Which of the result's tokens are measured, rising.
        ids: Their ids.
        vector: The position whose learned embedding position 0 gets; None for its own.
    """

    name: str
    before: tuple[int, ...]
    rows: Int[Tensor, "row"]
    ids: Int[Tensor, "row"]
    vector: int | None = None

    def __str__(self) -> str:
        drawn = f"{len(self.ids)} tokens, sum of ids {int(self.ids.sum())}"
        return f"{self.name}, behind {list(self.before)}, {drawn}"

    def entered(self, model: Any) -> AbstractContextManager[Any]:
        """Context in which the model is in the state of the condition."""
        if self.vector is None:
            return nullcontext()
        return PositionEmbeddingEdit(model, self.vector, 0)

    def chunks(self) -> Iterator[tuple[int, Int[Tensor, "row"]]]:
        """Pieces of `rows`, numbered."""
        return enumerate(self.rows.split(_CHUNK))


def _causal(caps: Capabilities) -> Capabilities:
    """Return the capabilities, if position 0 attends only to itself.

    Raises:
        UnsupportedError: If it does not.
    """
    if not caps.causal:
        raise UnsupportedError(
            f"Attention of {caps.architecture} is bidirectional, so its first position attends to "
            "the whole prompt and a prompt of one token says nothing about it; `sinkscope waiver "
            "MODEL --ask norms,positions` measures what makes its sink."
        )
    return caps


def _prefix(model: Any, bos: str | int, d_vocab: int) -> tuple[int, ...]:
    """Return the special tokens that texts begin with, if any."""
    if isinstance(bos, int) and not isinstance(bos, bool):
        return (whole_number("bos", bos, at_least=0, at_most=d_vocab - 1, error=TextError),)
    if bos not in ("auto", "never"):
        raise TextError(f'bos is {shown(bos)}; expected "auto", "never" or a token id.')
    tokenizer = getattr(model, "tokenizer", None)
    if bos == "never" or tokenizer is None:
        return ()
    try:
        prefix = special_tokens(tokenizer, "always", d_vocab).prefix
    except TextError:  # it has no BOS
        return ()
    return tuple(id for id in prefix if id is not None)


def _plan(
    caps: Capabilities, prefix: tuple[int, ...], sample: int, further: int, seed: int
) -> list[_Condition]:
    """Return the conditions, and which tokens are measured in each."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: int, of: int) -> Int[Tensor, "row"]:
        if size >= of:
            return torch.arange(of)
        return torch.randperm(of, generator=generator)[:size].sort().values

    ids = drawn(sample, caps.d_vocab)
    plan = [_Condition(FIRST, (), torch.arange(len(ids)), ids)]
    rows = drawn(further, len(ids))
    if further and prefix:
        plan.append(_Condition("after BOS", prefix, rows, ids[rows]))
    if further and caps.positions == "learned" and caps.n_ctx is not None:
        middle = caps.n_ctx // 2
        name = f"first, vector of position {middle}"
        plan.append(_Condition(name, (), rows, ids[rows], middle))
    return plan


# -- measuring -------------------------------------------------------------------------------------


def _begun(
    model: Any, caps: Capabilities, prompts: Texts, plan: Sequence[_Condition], threshold: float
) -> Vocabulary:
    """Return a result in which only real text has been measured.

    Raises:
        UnsupportedError: If position 0 has other states there than its token has alone.
    """
    wanted = {"norm": readout.RESIDUAL_NORM, "state": readout.at("resid_post", 0)}
    measured = readout.measure(model, prompts, wanted)
    _verify(model, caps, prompts, measured["state"])
    later = readout.median_of_others(measured["norm"], [0])
    first = measured["norm"][..., 0]
    ids = plan[0].ids
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        text, classes = [f"<{id}>" for id in ids.tolist()], ["token"]
        kind = torch.zeros_like(ids)
    else:
        (text, kind), classes = token_classes(tokenizer, ids.tolist()), list(CLASSES)
    shape = len(plan), len(ids), caps.n_layers
    chunks = max(len(list(one.chunks())) for one in plan)
    return Vocabulary(
        about=about(model, prompts),
        conditions=[one.name for one in plan],
        ids=ids,
        text=text,
        classes=classes,
        kind=kind,
        threshold=threshold,
        peak_layer=int((first / later).mean(0).argmax()),
        whole=len(ids) == caps.d_vocab,
        positions=caps.positions,
        later_norm=later,
        text_norm=first,
        sink_vector=measured["state"].mean(0),
        norm=torch.full(shape, torch.nan),
        cosine=torch.full(shape, torch.nan),
        sink_sum=torch.full((len(plan), chunks, caps.n_layers, caps.d_model), torch.nan),
    )


def _verify(
    model: Any, caps: Capabilities, prompts: Texts, state: Float[Tensor, "prompt layer dim"]
) -> None:
    """Refuse a model whose position 0 depends on what comes after it."""
    alone = readout.measure(
        model, token_ids(prompts.tokens[:, :1]), {"state": readout.at("resid_post", 0)}
    )["state"]
    half = model.cfg.dtype in (torch.float16, torch.bfloat16)
    if not close(alone, state, 3e-2 if half else 1e-4):
        raise UnsupportedError(
            f"Position 0 of a text has other states in {caps.architecture} than its token has "
            "alone, so prompts of one token do not give its trajectory; `sinkscope trace-peak` "
            "measures it in texts."
        )


def _fill(
    model: Any,
    caps: Capabilities,
    result: Vocabulary,
    plan: Sequence[_Condition],
    kept: Kept[Vocabulary],
    progress: bool,
) -> None:
    """Measure the missing values, chunk by chunk, in place."""
    missing = [
        (index, condition, chunk, rows)
        for index, condition in enumerate(plan)
        for chunk, rows in condition.chunks()
        if bool(result.norm[index, rows, -1].isnan().any())
    ]
    bound = result.threshold * float(result.later_norm[:, result.peak_layer].mean())
    total = sum(len(rows) for *_, rows in missing)
    with tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
        for index, condition, chunk, rows in missing:
            bar.set_description(condition.name)
            scope = readout.scope(caps)
            observer = _Trajectory(scope, result.sink_vector, result.peak_layer, bound)
            before = torch.tensor(condition.before, dtype=torch.long).expand(len(rows), -1)
            prompts = token_ids(torch.cat([before, result.ids[rows, None]], dim=1))
            first = torch.zeros_like(prompts.mask)
            first[:, 0] = True
            how = paths.choose(model, caps, "auto")
            with condition.entered(model):
                order = runner.run(
                    model, prompts, first, [observer], how, causal=True, progress=False
                )
            one = observer.results(order)
            result.cosine[index, rows] = one["cosine"].cpu()
            result.sink_sum[index, chunk] = observer.sink_sum.float()
            # Last, since a chunk counts as measured once its norms are there.
            result.norm[index, rows] = one["norm"].cpu()
            bar.update(len(rows))
            kept.grew(result)


class _Trajectory(Observer):
    """Norm and cosine of the last token of every prompt, and the sum of the states of sinks.

    Args:
        scope: Of the model.
        direction: The vector of each layer that cosines are to.
        layer: The block of the peak.
        bound: Norm after it above which a token makes a sink.
    """

    signal = "resid_post"

    def __init__(
        self, scope: Scope, direction: Float[Tensor, "layer dim"], layer: int, bound: float
    ) -> None:
        super().__init__(scope)
        self._direction = torch.nn.functional.normalize(direction, dim=-1)
        self._at, self._bound = layer, bound
        self._states: dict[int, Tensor] = {}
        self.sink_sum = torch.zeros(direction.shape, dtype=torch.float64)

    def accumulator(self, name: str) -> Accumulator:
        return PerPrompt()

    def observe(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        state = x[:, -1].float()
        self._states[self.layer] = state
        norm = residual.residual_norms(state[:, None])[:, 0]
        along = state @ self._direction[self.layer].to(state.device)
        return {"norm": norm, "cosine": along / norm}

    def close(self, batch: Batch) -> Any:
        states = [self._states[layer] for layer in sorted(self._states)]
        sinks = residual.residual_norms(states[self._at][:, None])[:, 0] > self._bound
        total = torch.stack(
            [state[sinks.to(state.device)].double().sum(0).cpu() for state in states]
        )
        return super().close(batch), total

    def add(self, finished: Any, batch: Batch) -> None:
        measured, total = finished
        super().add(measured, batch)
        self.sink_sum += total

    def drop(self) -> None:
        super().drop()
        self._states.clear()


def _confirm(
    model: Any,
    prompts: Texts,
    result: Vocabulary,
    prefix: tuple[int, ...],
    pairs: int,
    seed: int,
    progress: bool,
) -> Vocabulary:
    """Return the result with exceptions and controls in real prompts, if there are both."""
    exceptions, controls = _pairs(result, pairs, seed)
    if not exceptions:
        return result
    few = Texts(prompts.tokens[:_PROMPTS], prompts.mask[:_PROMPTS], prompts.bos, prompts.source)
    begins = bool(prefix) and few.tokens[:, : len(prefix)].eq(torch.tensor(prefix)).all()
    conditions: dict[str, tuple[int, ...]] = {FIRST: ()}
    if prefix:
        conditions["after BOS"] = prefix
    confirmed = first_tokens(
        model,
        few,
        exceptions,
        controls,
        conditions=conditions,
        ahead=len(prefix) if begins else 0,
        layer=result.peak_layer,
        ordinary=float(result.later_norm[:, result.peak_layer].mean()),
        progress=progress,
    )
    return dataclasses.replace(result, confirmed=confirmed)


def _pairs(result: Vocabulary, pairs: int, seed: int) -> tuple[list[int], list[int]]:
    """Draw exceptions at random, with the nearest ids of their class that make a sink as controls.

    In a vocabulary of merges near ids are about equally frequent. Unused rows of the embedding are
    left out, and an exception whose class has no token that makes a sink, or none left.
    """
    unused = CLASSES.index("unused") if "unused" in result.classes else -1
    usable = result.measured_tokens[0] & (result.kind != unused)
    sinks, others = usable & result.makes_sink[0], usable & ~result.makes_sink[0]
    order = torch.randperm(len(result.ids), generator=torch.Generator().manual_seed(seed))
    exceptions: list[int] = []
    controls: list[int] = []
    free = sinks.clone()
    for row in order[others[order]].tolist():
        candidates = (free & (result.kind == result.kind[row])).nonzero()[:, 0]
        if len(exceptions) == pairs:
            break
        if not len(candidates):
            continue
        near = int(candidates[(result.ids[candidates] - result.ids[row]).abs().argmin()])
        free[near] = False
        exceptions.append(int(result.ids[row]))
        controls.append(int(result.ids[near]))
    return exceptions, controls


# -- in words --------------------------------------------------------------------------------------


def _summary(result: Vocabulary) -> str:
    facts = result.statistics()
    at, first = result.peak_layer, facts["conditions"][0]
    of = "the vocabulary" if result.whole else "the sample"
    lines = [
        f"Position 0 of real text stands out most after block {at}: its norm is "
        f"{facts['text_ratio']} times that of a later token. A token makes a sink if, alone at "
        f"position 0, it exceeds {number(result.threshold)} times that norm there: "
        f"{_percent(first['share'])} of {of} ({counted(first['measured'], 'token')}).",
        _class_table(result, facts),
    ]
    if result.makes_sink[0].any():
        ratio, cosine = first["of_sinks"]["ratio"], first["of_sinks"]["cosine"]
        lines.append(
            f"Tokens that make a sink: {number(ratio['median'])} times a later token's norm (5 to "
            f"95 % of them: {number(ratio['low'])} to {number(ratio['high'])}), cosine to the mean "
            f"state of position 0 in real text {cosine['median']:.3f} ({cosine['low']:.3f} to "
            f"{cosine['high']:.3f}). {100 * first['constant_share']:.1f} % of their energy is one "
            "constant vector."
        )
    lines += _exceptions(result, first)
    lines += [_further(result, one) for one in facts["conditions"][1:]]
    lines += _confirmation(result, facts)
    if result.positions == "learned":
        lines.append(
            "Positions are learned: a token alone also carries the vector of position 0, so a peak "
            "may come from that vector rather than from the token; the condition with another "
            "position's vector tells the two apart."
        )
    return "\n".join(lines)


def _class_table(result: Vocabulary, facts: dict[str, Any]) -> str:
    columns = ["class", "tokens", "no sink"]
    columns += [f"make a sink {name}" for name in result.conditions]
    rows = []
    for name, one in facts["conditions"][0]["by_class"].items():
        shares = [c["by_class"].get(name, {}).get("share") for c in facts["conditions"]]
        cells = ["" if share is None else _percent(share) for share in shares]
        rows.append([name, f"{one['measured']:,}", f"{one['no_sink']:,}", *cells])
    return table_as_text(columns, rows)


def _exceptions(result: Vocabulary, first: dict[str, Any]) -> list[str]:
    names = list(first["exceptions"].values())
    if not names:
        return ["Every token that was measured makes a sink."]
    ratio = first["of_exceptions"]["ratio"]
    shown = ", ".join(repr(printable(name)) for name in names[:_SHOWN])
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return [
        f"The others ({counted(len(names), 'token')}) have {number(ratio['median'])} times a later "
        f"token's norm ({number(ratio['low'])} to {number(ratio['high'])}): {shown}{more}."
    ]


def _further(result: Vocabulary, one: dict[str, Any]) -> str:
    return (
        f"Condition “{one['condition']}” ({counted(one['measured'], 'token')}): "
        f"{_percent(one['share'])} make a sink."
    )


def _confirmation(result: Vocabulary, facts: dict[str, Any]) -> list[str]:
    confirmed = result.confirmed
    if confirmed is None:
        return []
    first, last = confirmed.later
    lines = [
        f"{counted(len(confirmed.exceptions), 'pair')} of an exception and a control of the same "
        f"class, put first in {counted(confirmed.attention.shape[-1], 'real prompt')} (blocks "
        f"{first} to {last}; 95 % intervals over pairs), the attention to position 0 and the most "
        "that another position receives, norms over that of a later token at both, and the loss "
        "of the later tokens:"
    ]
    rows = []
    for one in facts["confirmed"]:
        for name, words in (
            ("attention", "attention to 0"),
            ("peak", "norm ratio at 0"),
            ("attention_elsewhere", "most elsewhere"),
            ("peak_elsewhere", "norm ratio there"),
            ("loss", "loss [nat]"),
        ):
            if name in one:
                values = [one[name][group] for group in ("exception", "control", "difference")]
                rows.append([f"{one['condition']}: {words}", *map(str, values)])
    lines.append(table_as_text(["", "exception", "control", "difference"], rows))
    for index, one in enumerate(facts["confirmed"]):
        elsewhere = one["a_peak_elsewhere"]
        places = confirmed.new_position[index, EXCEPTION]
        lines.append(
            f"{one['condition']}: behind an exception the position that receives most after 0 is "
            f"{one['most_common_place']} in {100 * one['at_most_common_place']:.0f} % of "
            f"{counted(places.numel(), 'prompt')}, and it is a peak itself in "
            f"{_percent(elsewhere['exception'])} (controls: {_percent(elsewhere['control'])})."
        )
    return lines


def _percent(share: Interval) -> str:
    if share.mean != share.mean:
        return "–"
    digits = 1 if 1 < 100 * share.mean < 99 else 2
    while 0 < share.mean < 1 and round(100 * share.mean, digits) in (0, 100):
        digits += 1  # all but one of a large class is not all
    if share.low != share.low or share.low == share.high:
        return f"{100 * share.mean:.{digits}f} %"
    low, high = 100 * share.low, 100 * share.high
    return f"{100 * share.mean:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"
