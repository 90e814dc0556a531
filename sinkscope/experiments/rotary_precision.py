"""Errors of rotary positions in low precision: attention under a shift of all position ids.

Rotary embedding (Su et al. 2021, arXiv 2104.09864) turns queries and keys by angles proportional to
their positions, so that their product depends on the distance alone. In exact arithmetic a shift Δ
of all position ids therefore changes nothing, and every difference is an error of the arithmetic.
Wang et al. 2024, "When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context
Training" (arXiv 2411.13476): in bfloat16 it does change attention, the error grows with the length,
and most of it is at the first token. Their exact formula is not public; the measures here are ours.

1. Run each prompt with its own position ids, in the arithmetic of transformers' eager functions
   (`attention.rounded`), and keep each layer's queries and keys as they enter the dot product.
2. Run it again with Δ added to all position ids, and in each layer compare the attention weights of
   the two runs: |A_ij(Δ) - A_ij(0)|, summed over keys for each query, averaged over queries for
   each key. A layer's difference includes that of earlier layers; only that of layer 0 is its own.
   Rows sum to one in both runs, so that one key has at most half of a row's summed error.
3. Do so in each dtype, and in half precision with parts of the computation in float32: the angles
   (cos and sin stay in float32, and so does the rotation, whose results are rounded), the scores
   (rounded queries and keys, but q·k, softmax and weights in float32, as in fused kernels), or
   both (nothing is rounded between the projections and the mixed values).
4. Compare next-token losses and distributions likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from sinkscope.attention.attend import Attended
from sinkscope.attention.call import AttentionCall
from sinkscope.attention.overrides import Overrides
from sinkscope.attention.rounded import rounded_patterns
from sinkscope.attention.streaming import streaming
from sinkscope.devices import trim
from sinkscope.errors import UnsupportedError
from sinkscope.experiments.partial_forward import Partway, with_loss, with_predictions
from sinkscope.experiments.result import Result, about, tidy
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.interventions.base import check_mode
from sinkscope.interventions.positions import length_dependent, rotaries, with_ids
from sinkscope.metrics.attention import bucket_edges
from sinkscope.metrics.positions import masked_mean, visible_queries
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model, unwrapped
from sinkscope.output import number, table_as_text
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import bootstrap, estimate, spearman
from sinkscope.validation import strings, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SHIFTS = (16, 1024, 16384)
DTYPES = ("bfloat16", "float16", "float32")
KEPT = ("", "angles", "scores", "both")
"""The parts that are kept in float32 in other dtypes."""
_WORDS = {
    "": "",
    "angles": ", float32 angles",
    "scores": ", float32 scores",
    "both": ", float32 angles and scores",
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RotaryPrecision(Result):
    """What a shift of all position ids changes, in each arithmetic.

    All errors are differences between the run with shifted ids and the run with the prompt's own.
    They are nan where an arithmetic has not run, and where its activations overflowed.

    Attributes:
        arithmetics: Names along `arithmetic`: a dtype, and what is kept in float32.
        shifts: Δ along `shift` [positions].
        bucket: Lower edge of each bucket of query positions.
        overflowed: 1 where an activation was not finite in this arithmetic, 0 where all were.
        loss: Mean next-token loss with the prompt's own ids [nat].
        first_attention: Mean over the queries after the first token of the attention to it.
        shifted_loss: Mean next-token loss with shifted ids [nat].
        divergence: Mean over positions of KL(p ‖ p with shifted ids) of the next token [nat].
        error: Mean over the queries after the first token of Σ_j |ΔA_ij|.
        first_error: Mean over these queries of |ΔA_i0|: the first token's part of `error`.
        largest_error: Largest |ΔA_ij|.
        error_by_query: `error`, mean over heads, by the query's position.
        first_error_by_query: `first_error` likewise.
        error_by_key: Mean of |ΔA_ij| over heads and the queries that see the key.
        largest_error_by_key: Largest |ΔA_ij| of any head and query at the key.
    """

    QUESTION = "How far does a shift of all positions change attention?"

    arithmetics: list[str]
    shifts: list[int]
    bucket: Int[Tensor, "bucket"]
    overflowed: Float[Tensor, "arithmetic prompt"]
    loss: Float[Tensor, "arithmetic prompt"]
    first_attention: Float[Tensor, "arithmetic prompt layer head"]
    shifted_loss: Float[Tensor, "arithmetic shift prompt"]
    divergence: Float[Tensor, "arithmetic shift prompt"]
    error: Float[Tensor, "arithmetic shift prompt layer head"]
    first_error: Float[Tensor, "arithmetic shift prompt layer head"]
    largest_error: Float[Tensor, "arithmetic shift prompt layer head"]
    error_by_query: Float[Tensor, "arithmetic shift prompt layer bucket"]
    first_error_by_query: Float[Tensor, "arithmetic shift prompt layer bucket"]
    error_by_key: Float[Tensor, "arithmetic shift prompt layer key"]
    largest_error_by_key: Float[Tensor, "arithmetic shift prompt layer key"]

    def first_share(self) -> Float[Tensor, "arithmetic shift"]:
        """Share of all errors that is at the first token, all layers and heads together.

        At most one half: what one key gains, others lose.
        """
        dims = (2, 3, 4)
        return self.first_error.nansum(dims) / self.error.nansum(dims)

    def to_frame(self) -> pd.DataFrame:
        """One row per arithmetic, shift, layer and head.

        Returns:
            arithmetic, shift, layer, head; error, first_error and first_attention (means over
            prompts), largest_error (the largest of any prompt).
        """
        axes = {
            "arithmetic": self.arithmetics,
            "shift": self.shifts,
            "layer": range(self.error.shape[3]),
            "head": range(self.error.shape[4]),
        }
        frame = tidy(
            axes,
            error=self.error.nanmean(2),
            first_error=self.first_error.nanmean(2),
            largest_error=_largest(self.largest_error, 2),
            first_attention=self.first_attention.nanmean(1)[:, None],
        )
        return frame.dropna(subset="error", ignore_index=True)

    def statistics(self) -> dict[str, Any]:
        """The effect of each shift in each arithmetic.

        Returns:
            For each arithmetic: overflowed (prompts); loss; first_attention (mean over layers and
            heads); and for each shift: error and first_error (means over layers and heads, with
            intervals over prompts), largest_error, first_share, layer_0_error, layer (the one with
            the largest mean error), divergence, loss_change, and follows_first_attention (rank
            correlation of the heads' errors with their attention to the first token).
        """
        share = self.first_share()
        facts: dict[str, Any] = {}
        for index, name in enumerate(self.arithmetics):
            shifts = {}
            for at, shift in enumerate(self.shifts):
                error = self.error[index, at]
                by_layer = error.nanmean((0, 2))
                attention = self.first_attention[index].nanmean(0).flatten()
                of_heads = error.nanmean(0).flatten()
                known = ~of_heads.isnan()
                shifts[str(shift)] = {
                    "error": estimate(error.nanmean((1, 2))),
                    "first_error": estimate(self.first_error[index, at].nanmean((1, 2))),
                    "largest_error": float(_largest(self.largest_error[index, at], None)),
                    "first_share": float(share[index, at]),
                    "layer_0_error": float(by_layer[0]),
                    "layer": int(by_layer.nan_to_num(-1).argmax()),
                    "divergence": estimate(self.divergence[index, at]),
                    "loss_change": estimate(self.shifted_loss[index, at] - self.loss[index]),
                    "follows_first_attention": float(spearman(of_heads[known], attention[known])),
                }
            facts[name] = {
                "overflowed": int(self.overflowed[index].nansum()),
                "loss": estimate(self.loss[index]),
                "first_attention": float(self.first_attention[index].nanmean()),
                "shifts": shifts,
            }
        return {"length": self.error_by_key.shape[-1], "arithmetics": facts}

    def summary(self) -> str:
        """One row per arithmetic and shift: errors, the first token's share, effect on the loss."""
        rows, notes = [], []
        for name, values in self.statistics()["arithmetics"].items():
            if values["overflowed"]:
                notes.append(
                    f"In {name} activations overflowed on {values['overflowed']} of "
                    f"{len(self.loss[0])} prompts, which are left out."
                )
            for shift, row in values["shifts"].items():
                if row["error"].mean == row["error"].mean:
                    rows.append(
                        [
                            name,
                            f"{int(shift):,}",
                            number(row["error"].mean),
                            number(row["layer_0_error"]),
                            number(row["largest_error"]),
                            f"{row['first_share']:.1%}",
                            number(row["divergence"].mean),
                            number(row["loss_change"].mean),
                        ]
                    )
        head = (
            "Attention with all position ids shifted against attention with the prompt's own: mean "
            "over queries, layers and heads of Σ_j |ΔA_ij|, the same in layer 0, the largest "
            "|ΔA_ij|, the first token's share of the errors (at most 50 %), and what it does to "
            "the next token [nat]."
        )
        columns = ["arithmetic", "shift", "error", "layer 0", "largest", "first", "KL", "Δ loss"]
        return "\n".join([head, table_as_text(columns, rows), *notes])

    def figures(self) -> dict[str, go.Figure]:
        """The error along the text, and at each key."""
        from sinkscope.plot import shift_errors, shift_errors_by_key

        return {
            "by-query": shift_errors(self.by_query(), about=self.about),
            "by-key": shift_errors_by_key(self.by_key(), about=self.about),
        }

    def by_query(self) -> pd.DataFrame:
        """One row per arithmetic, shift and bucket of query positions, for `plot.shift_errors`.

        Returns:
            arithmetic, shift, query (lower edge); error with the ends of its 95 % interval over
            prompts in error_low and error_high, and first_error; means over layers and heads.
        """
        axes = {
            "arithmetic": self.arithmetics,
            "shift": self.shifts,
            "query": self.bucket.tolist(),
        }
        error = self.error_by_query.nanmean(3)
        mean, low, high = bootstrap(error.movedim(2, 0))
        frame = tidy(
            axes,
            error=mean,
            error_low=low,
            error_high=high,
            first_error=self.first_error_by_query.nanmean((2, 3)),
        )
        return frame.dropna(subset="error", ignore_index=True)

    def by_key(self) -> pd.DataFrame:
        """One row per arithmetic, shift and key, as `plot.shift_errors_by_key` takes.

        Returns:
            arithmetic, shift, key; error (mean over prompts and layers), largest_error.
        """
        axes = {
            "arithmetic": self.arithmetics,
            "shift": self.shifts,
            "key": range(self.error_by_key.shape[-1]),
        }
        frame = tidy(
            axes,
            error=self.error_by_key.nanmean((2, 3)),
            largest_error=_largest(self.largest_error_by_key, (2, 3)),
        )
        return frame.dropna(subset="error", ignore_index=True)


def _largest(x: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """The largest number along some dimensions; nan where there is none."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    largest = x.nan_to_num(-torch.inf).amax(dims)
    return largest.masked_fill(largest == -torch.inf, torch.nan)


def rotary_precision(
    model: Any,
    texts: Any,
    *,
    shifts: Iterable[int] = SHIFTS,
    dtypes: Iterable[str] | None = None,
    keep: Iterable[str] = KEPT,
    device: str | torch.device | None = None,
    file: str | Path | None = None,
    progress: bool = True,
) -> RotaryPrecision:
    """Shift all position ids of a model with rotary positions, and measure what changes.

    Args:
        model: What `load_model` takes. A name, path or model in memory is measured in each dtype; a
            bridge in its own.
        texts: Prompts; each runs by itself. Full patterns are never stored, but all are computed:
            twice the work of eager attention.
        shifts: Δ [positions].
        dtypes: Of weights and activations, of `DTYPES`; by default all three, or the bridge's.
        keep: What to keep in float32 where the dtype is another, of `KEPT`; "" for nothing.
        device: Where to load the model.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        The errors of attention, and their effect on the next token, in each arithmetic.

    Raises:
        UnsupportedError: If the model's positions are not rotary, its angles depend on the largest
            id, it has no loss, its attention cannot be streamed, or it rounds what should be kept.
        TextError: If a prompt has a single token.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.

    Source: the effect is that of Wang et al. (2024), arXiv 2411.13476.
    """
    spec, _ = unwrapped(model, None)
    shifts = whole_numbers("shifts", shifts, at_least=1)
    plan = _plan(spec, dtypes, keep)
    first = _Opened(spec, plan[0][0], device)
    prompts = with_predictions(as_texts(texts).tokenize(first.bridge).right_padded())
    file = kept_in(file, first.bridge)
    request = {}
    if file is not None:
        names = [name + _WORDS[part] for name, part in plan]
        request = request_of(first.bridge, prompts, shifts=list(shifts), arithmetic=names)
    with Kept(RotaryPrecision, file, request) as kept:
        result = kept.found or _empty(first, prompts, plan, shifts)
        missing = result.overflowed.isnan()
        with tqdm(
            total=missing.numel() * (1 + len(shifts)),
            initial=int((~missing).sum()) * (1 + len(shifts)),
            unit="pass",
            disable=not progress,
            leave=False,
        ) as bar:
            for index, (dtype, part) in enumerate(plan):
                if not missing[index].any():
                    continue
                if first.dtype != dtype:
                    del first
                    first = _Opened(spec, dtype, device)
                run = _Run(first, part, result, index, shifts, bar.update)
                for prompt in missing[index].nonzero()[:, 0].tolist():
                    run.measure(prompt, prompts.tokens[prompt, prompts.mask[prompt]][None])
                    kept.grew(result)
    return result


def _plan(spec: Any, dtypes: Iterable[str] | None, keep: Iterable[str]) -> list[tuple[str, str]]:
    """Return each arithmetic: the dtype, and what is kept in float32.

    Raises:
        UnsupportedError: If a dtype or part is unknown, there is none, or a bridge has another.
    """
    own = str(spec.cfg.dtype).removeprefix("torch.") if isinstance(spec, TransformerBridge) else ""
    given = dtypes if dtypes is not None else (own,) if own else DTYPES
    names = strings("dtypes", given, UnsupportedError)
    parts = strings("keep", keep, UnsupportedError)
    for name in names:
        check_mode(name, DTYPES)
        if own and name != own:
            raise UnsupportedError(
                f"This bridge is in {own}, not {name}; pass the model's name or the transformers "
                "model, of which one in each dtype can be made."
            )
    for part in parts:
        check_mode(part, KEPT)
    if not names or not parts:
        raise UnsupportedError("dtypes and keep are empty; name at least one of each.")
    return [(name, part) for name in names for part in (parts if name != "float32" else ("",))]


class _Opened:
    """A model in one dtype."""

    def __init__(self, spec: Any, dtype: str, device: Any) -> None:
        self.dtype = dtype
        if isinstance(spec, TransformerBridge):
            self.bridge = load_model(spec)
        else:
            self.bridge = load_model(spec, device, dtype)
        self.caps = _check(self.bridge)
        self.partway = Partway(self.bridge)


def _check(model: Any) -> Capabilities:
    """Refuse a model for which a shift changes the exact result.

    Raises:
        UnsupportedError: With the reason.
    """
    caps = with_loss(capabilities(model))
    if "latent" in caps.signals:
        raise UnsupportedError(
            f"{caps.architecture} rotates channels of their own beside those from its latent, an "
            "arithmetic that is not reproduced here."
        )
    if caps.positions == "rotary" and rotaries(model):
        if kinds := length_dependent(rotaries(model)):
            raise UnsupportedError(
                f"The rotary angles of {caps.architecture} depend on the largest position id "
                f"({', '.join(kinds)}), so that a shift changes attention in exact arithmetic too."
            )
        return caps
    reasons = {
        "learned": "has learned positions: a shift gives every token another vector, so that it "
        "changes attention in exact arithmetic too",
        "alibi": "adds a position bias to its scores, which depends on no position id",
        "none": "has no positions to shift",
        "rotary": "computes its rotary angles where its position ids cannot be shifted",
    }
    reason = reasons.get(caps.positions, f"has {caps.positions} positions, which are not rotary")
    raise UnsupportedError(f"{caps.architecture} {reason}.")


def _empty(
    opened: _Opened, prompts: Texts, plan: list[tuple[str, str]], shifts: tuple[int, ...]
) -> RotaryPrecision:
    """The result before anything ran."""
    layers, heads = opened.caps.n_layers, opened.caps.n_heads
    n, length = prompts.tokens.shape
    edges = bucket_edges(length)

    def nothing(*shape: int) -> Tensor:
        return torch.full((len(plan), *shape), torch.nan)

    shifted = len(shifts), n
    return RotaryPrecision(
        about=about(opened.bridge, prompts),
        arithmetics=[dtype + _WORDS[part] for dtype, part in plan],
        shifts=list(shifts),
        bucket=torch.tensor(edges),
        overflowed=nothing(n),
        loss=nothing(n),
        first_attention=nothing(n, layers, heads),
        shifted_loss=nothing(*shifted),
        divergence=nothing(*shifted),
        error=nothing(*shifted, layers, heads),
        first_error=nothing(*shifted, layers, heads),
        largest_error=nothing(*shifted, layers, heads),
        error_by_query=nothing(*shifted, layers, len(edges)),
        first_error_by_query=nothing(*shifted, layers, len(edges)),
        error_by_key=nothing(*shifted, layers, length),
        largest_error_by_key=nothing(*shifted, layers, length),
    )


class _Run:
    """Runs one arithmetic of one model, prompt by prompt.

    Args:
        opened: The model.
        part: What is kept in float32.
        result: What is filled in.
        index: Which arithmetic it is.
        shifts: Δ of each further run.
        step: Called after each run.
    """

    def __init__(
        self,
        opened: _Opened,
        part: str,
        result: RotaryPrecision,
        index: int,
        shifts: tuple[int, ...],
        step: Callable[[], Any],
    ) -> None:
        self._opened, self._result, self._index = opened, result, index
        self._shifts, self._step = shifts, step
        self._wide_angles = part in ("angles", "both")
        self._wide_scores = part in ("scores", "both")
        self._rounds = part == "angles"
        self._base: dict[int, tuple[Tensor, Tensor]] = {}
        self._compare: Callable[..., None] | None = None

    def measure(self, prompt: int, tokens: Int[Tensor, "1 position"]) -> None:
        """Run a prompt with its own ids, then with each shift."""
        result, index = self._result, self._index
        partway = self._opened.partway
        tokens = tokens.to(partway.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        self._prompt, self._mask = prompt, mask
        with partway.opened(), self._attending():
            self._base.clear()
            self._compare = None
            final = self._run(tokens, mask, 0)
            overflowed = not bool(final.isfinite().all())
            if not overflowed:
                result.loss[index, prompt] = float(partway.losses(tokens, mask, final)[0])
            for at, shift in enumerate(self._shifts):
                if not overflowed:
                    self._compare = _Errors(result, (index, at, prompt), mask, self._opened.caps)
                    shifted = self._run(tokens, mask, shift)
                    loss = float(partway.losses(tokens, mask, shifted)[0])
                    result.shifted_loss[index, at, prompt] = loss
                    divergence = self._divergence(tokens, final, shifted)
                    result.divergence[index, at, prompt] = divergence
                else:
                    self._step()
            result.overflowed[index, prompt] = float(overflowed)
            self._base.clear()

    def _run(self, tokens: Tensor, mask: Tensor, shift: int) -> Float[Tensor, "1 position dim"]:
        with ExitStack() as undo:
            for rotary in rotaries(self._opened.bridge):
                edit = self._shifted_by(shift)
                handle = rotary.register_forward_pre_hook(edit, with_kwargs=True)
                undo.callback(handle.remove)
            final = self._opened.partway.final(tokens, mask)
        if final.device.type == "cpu":
            trim()
        self._step()
        return final

    def _shifted_by(self, shift: int) -> Callable[..., tuple[tuple, dict[str, Any]]]:
        def edit(rotary: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            args, kwargs = with_ids(args, kwargs, lambda ids: ids + shift)
            if self._wide_angles:  # cos and sin take the dtype of the first argument
                if args:
                    args = (args[0].float(), *args[1:])
                else:
                    kwargs = {**kwargs, "x": kwargs["x"].float()}
            return args, kwargs

        return edit

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Context in which every layer attends in this arithmetic."""
        with streaming(self._opened.bridge) as stream:
            overrides = Overrides()
            try:
                for layer, each in stream.layers.items():
                    overrides.attribute(each, "kernel", self._kernel(layer))
                    for point in (each.attn.hook_rot_q, each.attn.hook_rot_k):
                        # `attention.upstream` casts there, as transformers does in some models.
                        overrides.attribute(point, "forward", partial(HookPoint.forward, point))
                yield
            finally:
                overrides.undo()

    def _kernel(self, layer: int) -> Callable[..., Attended]:
        def attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Attended:
            query, key = self._in_this_arithmetic(query, key, value.dtype)
            now = rounded_patterns(query, key, call, wide=self._wide_scores)
            if self._compare is None:
                self._base[layer] = query, key
                before = None
            else:
                before = rounded_patterns(*self._base[layer], call, wide=self._wide_scores)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            mixed, to_first = [], []
            for rows, columns, pattern in now:
                values = value[:, :, columns].to(pattern.dtype)
                mixed.append(torch.matmul(pattern, values).to(value.dtype))
                if before is not None:
                    assert self._compare is not None
                    self._compare.add(layer, rows, columns, pattern, next(before)[2])
                elif columns.start == 0:
                    to_first.append(pattern[0, :, :, 0].float().sum(-1))
            if before is None:
                self._first_attention(layer, sum(to_first), query.shape[2])
            else:
                self._compare.close(layer)
            z = torch.cat(mixed, dim=2).transpose(1, 2).contiguous()
            return Attended(z, z.new_empty(0))

        return attend

    def _in_this_arithmetic(
        self, query: Tensor, key: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, rounded where this arithmetic rounds them.

        Raises:
            UnsupportedError: If the model has rounded them already.
        """
        if self._wide_angles and not self._rounds and query.dtype != torch.float32:
            rotates = self._opened.caps.architecture
            raise UnsupportedError(
                f"{rotates} rounds queries and keys after the rotation, so that they cannot be "
                'kept in float32; leave out "both".'
            )
        if self._rounds or not self._wide_angles:
            return query.to(dtype), key.to(dtype)
        return query, key

    def _first_attention(self, layer: int, total: Any, length: int) -> None:
        """Keep the mean attention to the first token; that of its own query, 1, left out."""
        if torch.is_tensor(total):
            mean = (total - 1) / (length - 1)
            self._result.first_attention[self._index, self._prompt, layer] = mean.cpu()

    def _divergence(self, tokens: Tensor, before: Tensor, after: Tensor) -> float:
        """Mean over positions of KL(p ‖ p with shifted ids) [nat], some positions at a time."""
        partway, total, end = self._opened.partway, 0.0, self._opened.caps.n_layers
        width = max(1, 2**22 // self._opened.caps.d_vocab)
        for start in range(0, tokens.shape[1], width):
            at = slice(start, start + width)
            p, q = (
                partway.logits(tokens[:, at], end, x[:, at]).double().log_softmax(-1)
                for x in (before, after)
            )
            total += float((p.exp() * (p - q)).sum(-1).sum())
        return total / tokens.shape[1]


class _Errors:
    """Sums of |ΔA| over the pieces of each layer's pattern, written into a result.

    Args:
        result: What is filled in.
        at: Which arithmetic, shift and prompt this is.
        mask: All real positions.
        can: The model's windows.
    """

    def __init__(
        self, result: RotaryPrecision, at: tuple[int, int, int], mask: Tensor, caps: Capabilities
    ) -> None:
        self._result, self._at, self._mask, self._caps = result, at, mask, caps
        self._rows: list[Tensor] = []
        self._first: list[Tensor] = []
        self._worst: list[Tensor] = []
        length = mask.shape[1]
        self._keys = torch.zeros(length, device=mask.device)
        self._worst_keys = torch.zeros(length, device=mask.device)

    def add(self, layer: int, rows: slice, columns: slice, now: Tensor, before: Tensor) -> None:
        """Add the errors of some queries."""
        change = (now[0].float() - before[0].float()).abs_()
        self._rows.append(change.sum(-1))
        first = change[..., 0] if columns.start == 0 else change.new_zeros(change.shape[:2])
        self._first.append(first)
        self._worst.append(change.amax((1, 2)))
        self._keys[columns] += change.sum((0, 1)).to(self._keys.device)
        worst = change.amax((0, 1)).to(self._keys.device)
        self._worst_keys[columns] = torch.maximum(self._worst_keys[columns], worst)

    def close(self, layer: int) -> None:
        """Write the result of a layer, and reset for the next."""
        result, at, length = self._result, self._at, self._mask.shape[1]
        rows, first = torch.cat(self._rows, dim=1), torch.cat(self._first, dim=1)
        result.error[*at, layer] = rows[:, 1:].mean(-1).cpu()
        result.first_error[*at, layer] = first[:, 1:].mean(-1).cpu()
        result.largest_error[*at, layer] = torch.stack(self._worst).amax(0).cpu()
        edges = [*result.bucket.tolist(), result.error_by_key.shape[-1]]
        index = torch.arange(length, device=rows.device)
        for bucket, (low, high) in enumerate(pairwise(edges)):
            inside = ((index >= low) & (index < high)).expand_as(rows)
            where = (*at, layer, bucket)
            result.error_by_query[where] = masked_mean(rows, inside, (0, 1)).cpu()
            result.first_error_by_query[where] = masked_mean(first, inside, (0, 1)).cpu()
        seen_by = visible_queries(self._mask, True, self._caps.windows[layer])[0] * len(rows)
        result.error_by_key[*at, layer, :length] = (self._keys / seen_by).cpu()
        result.largest_error_by_key[*at, layer, :length] = self._worst_keys.cpu()
        self._rows, self._first, self._worst = [], [], []
        self._keys.zero_()
        self._worst_keys.zero_()
