"""Perplexity of a long text when each query sees a few kept positions and a window.

Xiao, Tian, Chen, Han and Lewis 2023, "Efficient Streaming Language Models with Attention Sinks"
(StreamingLLM, arXiv 2309.17453): a model that sees a window of recent tokens only breaks down once
its first tokens have left the window, and recovers if a few of them are kept. Yan et al. 2024
(arXiv 2407.01601) claim that any designated waiver element suffices; here one in the middle of the
text is kept instead of the first tokens.

1. `plan` lists the settings: what is kept, the window, how positions are counted.
2. For each setting, `stream` runs the text in chunks through a cache that holds the kept positions
   and the window (`window_cache`), exactly as one token at a time would.
3. Where schemes are named, every query sees the whole text, the last `recent` tokens in full
   precision and the earlier ones quantised, with none, or the first n, or the pivots kept (in each
   layer the tokens of the 20 largest |a| of the state that enters it; RotateKV, Su et al. 2025,
   arXiv 2501.16383). KIVI (Liu et al. 2024, arXiv 2402.02750) keeps the last tokens as well.
4. Compare the losses token by token from where every window has left the start of the text, with
   intervals over blocks of tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.attention.kv_cache import cache_argument
from sinkscope.capture import paths, runner
from sinkscope.devices import trim
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.conditions import default_position
from sinkscope.experiments.precision import pivots
from sinkscope.experiments.result import Result, about, stacked
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.experiments.window_cache import (
    COUNTED,
    KeyRotation,
    Layout,
    Stored,
    WindowCache,
)
from sinkscope.interventions.base import check_mode, check_positions
from sinkscope.metrics.quantisation import Scheme
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.output import number, table_as_text
from sinkscope.prompts.texts import long_text
from sinkscope.prompts.tokens import Texts
from sinkscope.statistics import Interval, bootstrap
from sinkscope.validation import strings, whole_number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


AUTO = "auto"
"""The designated position when none is named."""


RECENT = 128
"""Tokens before a query that are not quantised, its own included."""
BLOCK = 128
"""Tokens of a block of the bootstrap: losses of neighbours are correlated, so blocks are drawn."""
EVERYTHING, NO_SINKS, PIVOTS = "everything", "0 sinks", "pivots"
_COUNTED = {"cache": "positions counted in the cache", "absolute": "positions counted absolutely"}


SINKS = (0, 1, 2, 4, 8)
_NATIVE = "TransformerLensNative"
"""Architecture of models that do not come from transformers, such as the toy models."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StreamedContext(Result):
    """Loss of every token of a long text, setting by setting.

    Attributes:
        kept: What is kept in each setting, in words.
        windows: Window of each setting; -1 for full attention. Where keys and values are quantised,
            how many recent tokens are not.
        schemes: How keys and values before the window are stored, such as "int4-token"; "" where
            they are unquantised, or not kept.
        counted: How positions were counted in each setting.
        moved_on: The first query that, in every setting, has all kept positions before it and the
            start outside its window.
        loss: Loss of each query's next token [nat]; nan at the last one, and where a setting has
            not run.
        seconds: Time that each setting took [s].
        cache_bytes: Size of the keys and values held between chunks at the end.
        full_bytes: Size of a cache of the whole text.
    """

    QUESTION = "How much do a few kept sinks help when a long text passes through a window?"

    kept: list[str]
    windows: list[int]
    counted: list[str]
    schemes: list[str]
    moved_on: int
    loss: Float[Tensor, "setting query"]
    seconds: Float[Tensor, "setting"]
    cache_bytes: Float[Tensor, "setting"]
    full_bytes: Float[Tensor, "setting"]

    @property
    def tokens(self) -> int:
        """Length of the text."""
        return self.loss.shape[1]

    @property
    def after(self) -> int:
        """First query of the evaluated part: `moved_on`, or the middle of a short text."""
        return self.moved_on if self.moved_on + BLOCK <= self.tokens else self.tokens // 2

    def perplexity(self, setting: int, start: int = 0, stop: int | None = None) -> float:
        """Exp of the mean loss of some queries.

        Args:
            setting: Index of the setting.
            start: First query.
            stop: After the last one.
        """
        return float(self._loss(setting, start, stop).mean().exp())

    def interval(self, setting: int, start: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the perplexity, over blocks of at least 128 tokens."""
        blocks = _over_blocks(self._loss(setting, start))
        low, high = torch.tensor([blocks.low, blocks.high]).exp().tolist()
        return low, high

    def difference(self, setting: int, other: int, start: int = 0) -> Interval:
        """Mean loss of a setting minus another's [nat], with a 95 % interval.

        Both are on the same tokens, so the difference is paired token by token and far more precise
        than either perplexity.

        Args:
            setting: Index of the setting.
            other: What is subtracted.
            start: First query.
        """
        return _over_blocks(self._loss(setting, start) - self._loss(other, start))

    def other(self, setting: int, kept: str) -> int | None:
        """The setting with the same window and counting that keeps something else, if any.

        Args:
            setting: Index of the setting.
            kept: What it keeps, as in `kept`; "everything" has no window.
        """
        for index, name in enumerate(self.kept):
            same = self._frame_of(index) == self._frame_of(setting)
            if name == kept and (same or kept == EVERYTHING):
                return index
        return None

    def _frame_of(self, setting: int) -> tuple[int, str, str]:
        return self.windows[setting], self.counted[setting], self.schemes[setting]

    def _loss(self, setting: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "_"]:
        loss = self.loss[setting, start:stop].double()
        return loss[: len(loss) - 1] if stop is None else loss

    def _against(self, setting: int, kept: str) -> Interval | None:
        other = self.other(setting, kept)
        return None if other in (None, setting) else self.difference(setting, other, self.after)

    def to_frame(self) -> pd.DataFrame:
        """One row per setting: perplexity of the whole text, and from `after` on."""
        import pandas as pd

        rows = []
        for setting, kept in enumerate(self.kept):
            low, high = self.interval(setting)
            after_low, after_high = self.interval(setting, self.after)
            rows.append(
                {
                    "kept": kept,
                    "window": self.windows[setting],
                    "positions": self.counted[setting],
                    "scheme": (scheme := self.schemes[setting]),
                    "bits": Scheme.parse(scheme).bits if scheme else math.nan,
                    "tokens": self.tokens,
                    "perplexity": self.perplexity(setting),
                    "perplexity_low": low,
                    "perplexity_high": high,
                    "perplexity_before": self.perplexity(setting, 0, self.after),
                    "perplexity_after": self.perplexity(setting, self.after),
                    "perplexity_after_low": after_low,
                    "perplexity_after_high": after_high,
                    "tokens_per_second": self.tokens / float(self.seconds[setting]),
                    "kv_megabytes": float(self.cache_bytes[setting]) / 1e6,
                    "kv_share": float(self.cache_bytes[setting] / self.full_bytes[setting]),
                }
            )
        return pd.DataFrame(rows)

    def statistics(self) -> dict[str, Any]:
        """The table of `to_frame`, and paired differences of the loss from `after` on."""
        rows = self.to_frame().to_dict("records")
        for setting, row in enumerate(rows):
            row["loss_over_everything"] = self._against(setting, EVERYTHING)
            row["loss_over_no_sinks"] = self._against(setting, NO_SINKS)
        return {"tokens": self.tokens, "after": self.after, "settings": rows}

    def summary(self) -> str:
        """The table of perplexities, and how much each kept set lowers the loss."""
        rows = self.statistics()["settings"]
        full = any(row["loss_over_everything"] for row in rows)
        return "\n".join([self._head(full), self._table(rows, full), *self._gains(rows)])

    def _head(self, full: bool) -> str:
        left = (
            "where every window has left the start of the text and all kept positions were read"
            if self.after == self.moved_on
            else "where not every window has left the start of the text"
        )
        over = ", and the loss minus that of full attention [nat]" if full else ""
        return (
            f"{self.tokens:,} tokens, whose keys and values would fill "
            f"{float(self.full_bytes.max()) / 1e6:,.1f} MB. Perplexity from token {self.after:,} "
            f"on, {left}{over}. 95 % intervals over blocks of at least {BLOCK} tokens."
        )

    def _table(self, rows: list[dict[str, Any]], full: bool) -> str:
        table = []
        quantised = any(self.schemes)
        for row in rows:
            over = row["loss_over_everything"]
            cells = [
                row["kept"],
                *([row["scheme"]] if quantised else []),
                "all" if row["window"] < 0 else f"{row['window']:,}",
                row["positions"],
                number(row["perplexity_after"]),
                *([over.signed() if over else ""] if full else []),
                f"{row['kv_megabytes']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            table.append(cells)
        scheme = ["before the window"] if quantised else []
        columns = [
            "kept",
            *scheme,
            "window",
            "counted",
            "perplexity",
            *(["loss − full"] if full else []),
        ]
        return table_as_text([*columns, "KV [MB]", "tokens/s"], table)

    def _gains(self, rows: list[dict[str, Any]]) -> list[str]:
        """Sentences on how much each kept set lowers the loss, by window."""
        sentences: dict[tuple[int, str, str], list[str]] = {}
        for setting, row in enumerate(rows):
            if row["loss_over_no_sinks"] is not None and row["window"] > 0:
                gain = row["loss_over_no_sinks"].negated()
                sentences.setdefault(self._frame_of(setting), []).append(
                    f"{row['kept']} {gain.to_decimals(3)}"
                )
        return [
            f"{_frame_in_words(*frame)}: reduction of the loss against keeping no sink [nat a "
            f"token]: {'; '.join(gains)}."
            for frame, gains in sentences.items()
        ]

    def figures(self) -> dict[str, go.Figure]:
        """Perplexity against the window and along the text, for each way of counting positions."""
        from sinkscope.plot import perplexity_along, perplexity_by_scheme, perplexity_by_window

        rows = self.to_frame().drop(columns=["perplexity", "perplexity_low", "perplexity_high"])
        rows = rows.rename(columns=lambda name: name.replace("perplexity_after", "perplexity"))
        drawn = {}
        if any(self.schemes):
            recent = max(w for w, s in zip(self.windows, self.schemes, strict=True) if s)
            subtitle = f"{self.about} · the last {recent:,} in full precision"
            chosen = rows[(rows["scheme"] != "") | (rows["window"] < 0)]
            drawn["perplexity-scheme"] = perplexity_by_scheme(chosen, about=subtitle)
        rows = rows[rows["scheme"] == ""]
        ways = dict.fromkeys(
            c
            for c, w, s in zip(self.counted, self.windows, self.schemes, strict=True)
            if w > 0 and not s
        )
        for counted in ways:
            about = f"{self.about} · {_COUNTED[counted]}"
            one_of_two = f", {_COUNTED[counted]}" if len(ways) > 1 else ""
            chosen = rows[(rows["positions"] == counted) | (rows["window"] < 0)]
            drawn[f"perplexity-{counted}"] = perplexity_by_window(
                chosen, about=f"{about} · from token {self.after:,} on"
            ).update_layout(title_text=f"Perplexity of a long text through a window{one_of_two}")
            for window in sorted(chosen[chosen["window"] > 0]["window"].unique().tolist()):
                drawn[f"along-{counted}-{window}"] = perplexity_along(
                    self._along(counted, window), about=f"{about} · window {window:,}"
                ).update_layout(
                    title_text=f"Perplexity along a long text, window {window:,}{one_of_two}"
                )
        return drawn

    def _along(self, counted: str, window: int) -> pd.DataFrame:
        """One row per setting and block: its middle, and the block's perplexity."""
        import pandas as pd

        pieces = []
        size = max(BLOCK, self.tokens // 64)
        for setting, kept in enumerate(self.kept):
            if self._frame_of(setting) == (window, counted, "") or self.windows[setting] < 0:
                blocks = self._loss(setting).split(size)
                pieces.append(
                    pd.DataFrame(
                        {
                            "kept": kept,
                            "position": [size * i + len(b) / 2 for i, b in enumerate(blocks)],
                            "perplexity": [float(b.mean().exp()) for b in blocks],
                        }
                    )
                )
        return stacked(pieces)


def _frame_in_words(window: int, counted: str, scheme: str) -> str:
    if scheme:
        return f"{scheme} but for the last {window:,} tokens"
    return f"Window {window:,}, {_COUNTED[counted]}"


def _over_blocks(x: Float[Tensor, "query"]) -> Interval:
    """The mean, and its interval over blocks of at least `BLOCK` tokens, nearly equal in size.

    Every token is in a block; leaving some out would give the interval of another mean. With fewer
    tokens than two blocks there is no interval.
    """
    blocks = [block.mean() for block in x.tensor_split(max(1, len(x) // BLOCK))]
    _, low, high = bootstrap(torch.stack(blocks))
    return Interval(float(x.mean()), float(low), float(high))


def streaming_context(
    model: Any,
    text: Any = "prose",
    *,
    tokens: int = 4096,
    windows: Iterable[int] = (256, 512, 1024),
    sinks: Iterable[int] = SINKS,
    designated: int | Iterable[int] | str | None = AUTO,
    counted: Iterable[str] = COUNTED,
    full: bool | None = None,
    quantise: str | Iterable[str] = (),
    recent: int = RECENT,
    chunk: int = 128,
    bos: str = "auto",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> StreamedContext:
    """Perplexity of a long text when each query sees a few kept positions and a window.

    Args:
        model: A bridge, or anything that `load_model` takes; causal, without windows of its own.
        text: What `texts()` takes, or exact `token_ids`; it may be longer than the context.
        tokens: Tokens of the text to use.
        windows: Recent positions that a query sees, its own included.
        sinks: How many first tokens are kept beside the window.
        designated: Positions to designate by a self-only mask and to keep *instead* of the first
            tokens, one setting each; each is run undesignated as well, as a control. None for none;
            "auto" for 255, or two thirds of the way along a text that hardly goes beyond it.
        counted: "cache" counts positions inside the cache (StreamingLLM), "absolute" from the
            text's start.
        full: Whether to run full attention too; by default where the text is no longer than the
            trained context.
        quantise: Schemes such as "int4-token" or "int2-group64-asym", by which keys and values are
            stored that are older than `recent` tokens, with none, with `sinks` and with the pivots
            kept in full precision; windows do not matter there.
        recent: Number of last tokens kept in full precision there, the query's own included.
        chunk: Queries processed at once; any number gives the same result.
        bos: The BOS policy, see `texts`.
        seed: Seed of the order of documents.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        The loss of every token, setting by setting.

    Raises:
        UnsupportedError: If the model is bidirectional, has no trained head, has sliding windows,
            or takes no cache; or if its positions cannot be counted as requested.
        TextError: If the text is too short; a number of sinks, a chunk or a position is not valid;
            or neither a window nor full attention is requested.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.
    """
    model = load_model(model)
    file = kept_in(file, model)
    caps = _check(capabilities(model))
    if chunk < 1:
        raise TextError(f"Texts cannot go through in chunks of {chunk} tokens; use 1 or more.")
    prompts = long_text(model, text, tokens, bos=bos, seed=seed)
    settings = plan(windows, sinks, designated, counted, full, tokens, caps)
    stored = plan_stored(quantise, sinks, recent, tokens)
    settings += stored
    check_lengths(settings, tokens, caps)
    rotation = KeyRotation(model, caps) if any(s.counted == "cache" for s in settings) else None
    request = {} if file is None else request_of(model, prompts, settings=list(map(str, settings)))
    with Kept(StreamedContext, file, request) as kept:
        result = kept.found or _empty(model, prompts, settings)
        missing = [i for i in range(len(settings)) if bool(result.seconds[i].isnan())]
        massive = None
        if any(settings[i].kept == PIVOTS for i in missing):
            massive = pivots(model, prompts)[:, 0]
        total = len(missing) * tokens
        with tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
            for index in missing:
                bar.set_description(f"{settings[index].kept}, window {settings[index].window}")
                setting = settings[index]
                how = setting.stored(caps.n_layers, massive)
                _run(model, prompts, setting, rotation, chunk, result, index, bar, how)
                kept.grew(result)
    return result


@dataclass(frozen=True)
class Setting:
    """Which keys the queries of one run can see.

    Attributes:
        kept: What is kept, such as "4 sinks" or "designated 255".
        keep: Positions that stay visible.
        window: Recent positions that a query sees, its own included; None for all.
        counted: How positions are counted, of `COUNTED`.
        alone: Positions designated by a self-only mask.
        scheme: Scheme of keys and values that have left the window; "" for full precision.
        sinks: Number of first tokens that stay in full precision; for "pivots", the pivots of each
            layer do.
    """

    kept: str
    keep: tuple[int, ...]
    window: int | None
    counted: str
    alone: tuple[int, ...] = ()
    scheme: str = ""
    sinks: int = 0

    def __str__(self) -> str:
        stored = f", stored as {self.scheme}" if self.scheme else ""
        return f"{self.kept}, window {self.window}, counted {self.counted}{stored}"

    def stored(self, layers: int, massive: Bool[Tensor, "layer position"] | None) -> Stored | None:
        """Return how its keys and values are stored; None for full precision.

        Args:
            layers: Number of layers of the model.
            massive: The pivot tokens of each layer, for "pivots".
        """
        if not self.scheme:
            return None
        if self.kept == PIVOTS:
            assert massive is not None
            return Stored(Scheme.parse(self.scheme), massive)
        first = torch.tensor(self.keep) < self.sinks
        return Stored(Scheme.parse(self.scheme), first.expand(layers, -1))

    @property
    def moved_on(self) -> int:
        """The first query with all kept positions before it and the start outside its window."""
        if self.window is None:
            return 0
        if self.scheme:
            return self.window + self.sinks
        return max(self.window + len(self.keep), max(self.keep, default=0) + 1)


def plan(
    windows: Iterable[int],
    sinks: Iterable[int],
    designated: int | Iterable[int] | str | None,
    counted: Iterable[str],
    full: bool | None,
    tokens: int,
    caps: Capabilities,
) -> list[Setting]:
    """List the requested runs, beginning with full attention.

    Raises:
        TextError: If there is none, or a window is empty.
    """
    sinks, chosen = _counts(sinks), _designated(designated, tokens)
    settings: list[Setting] = []
    fits = caps.n_ctx is None or tokens <= caps.n_ctx
    if full if full is not None else fits:
        settings.append(Setting("everything", (), None, "absolute"))
    for way in counted:
        check_mode(way, COUNTED)
        for window in windows:
            if window < 1:
                raise TextError(f"A window of {window} positions is empty; use 1 or more.")
            for n in sinks:
                name = f"{n} sink" if n == 1 else f"{n} sinks"
                settings.append(Setting(name, tuple(range(n)), window, way))
            for p in chosen:
                settings.append(Setting(f"{p} as it is", (p,), window, way))
                settings.append(Setting(f"designated {p}", (p,), window, way, (p,)))
    if not settings:
        raise TextError(
            "No run is requested: name a window and what to keep beside it, or run full attention "
            "(full=True)."
        )
    return settings


def plan_stored(
    schemes: str | Iterable[str], sinks: Iterable[int], recent: int, tokens: int
) -> list[Setting]:
    """List the runs in which old keys and values are quantised.

    Raises:
        TextError: If the number of recent tokens is not one.
        UnsupportedError: If there is no such scheme, or its range is over several tokens.
    """
    names = strings("quantise", schemes, UnsupportedError)
    recent = whole_number("recent", recent, at_least=1, error=TextError)
    every, settings = tuple(range(tokens)), []
    for name in dict.fromkeys(str(Scheme.parse(name)) for name in names):
        Stored(Scheme.parse(name), torch.zeros(1, 1, dtype=torch.bool))  # refuses what it cannot
        for n in _counts(sinks):
            words = f"{n} sink" if n == 1 else f"{n} sinks"
            settings.append(Setting(words, every, recent, "absolute", scheme=name, sinks=n))
        settings.append(Setting(PIVOTS, every, recent, "absolute", scheme=name))
    return settings


def _counts(sinks: Iterable[int]) -> tuple[int, ...]:
    """Check the numbers of first tokens to keep.

    Raises:
        TextError: If one is not a whole number from 0.
    """
    wanted = tuple(sinks)
    for n in wanted:
        if type(n) is not int or n < 0:
            raise TextError(
                f"{n!r} first tokens cannot be kept as sinks; expected whole numbers from 0, such "
                "as [0, 4]."
            )
    return wanted


def _designated(wanted: int | Iterable[int] | str | None, tokens: int) -> tuple[int, ...]:
    if wanted is None:
        return ()
    if wanted == AUTO:
        return (default_position(tokens, None),)
    return check_positions(wanted)  # pyright: ignore[reportArgumentType]: it refuses strings


def check_lengths(settings: Sequence[Setting], tokens: int, caps: Capabilities) -> None:
    """Refuse positions that a model has no vectors for, and designated ones beyond the text.

    Raises:
        UnsupportedError: If learned positions end before the text does.
        TextError: If a designated position is not in the text.
    """
    if caps.positions == "learned" and caps.n_ctx is not None and tokens > caps.n_ctx:
        raise UnsupportedError(
            f"{caps.architecture} has learned vectors for {caps.n_ctx} positions, fewer than the "
            f"{tokens} of the text."
        )
    for setting in settings:
        if max(setting.keep, default=0) >= tokens:
            raise TextError(
                f"Position {max(setting.keep)} is to be kept, and the text has {tokens} tokens."
            )


def _run(
    model: Any,
    prompts: Texts,
    setting: Setting,
    rotation: KeyRotation | None,
    chunk: int,
    result: StreamedContext,
    index: int,
    bar: Any,
    stored: Stored | None,
) -> None:
    """Fill one row of the result."""
    began = time.perf_counter()
    loss, cache = stream(model, prompts, setting, rotation, chunk, bar, stored)
    result.loss[index] = loss
    size = cache.bytes()
    per_token = size / max(1, _tokens_held(setting, prompts.tokens.shape[1]))
    if stored is not None:
        per_token = cache.token_bytes()
    result.cache_bytes[index] = size
    result.full_bytes[index] = per_token * prompts.tokens.shape[1]
    result.seconds[index] = time.perf_counter() - began  # last: the row is complete then


def _tokens_held(setting: Setting, tokens: int) -> int:
    """Count the positions whose keys and values are in a cache at the end."""
    if setting.window is None:
        return tokens
    return min(setting.window - 1, tokens) + len([k for k in setting.keep if k < tokens])


def stream(
    model: Any,
    prompts: Texts,
    setting: Setting,
    rotation: KeyRotation | None = None,
    chunk: int = 128,
    bar: Any = None,
    stored: Stored | None = None,
) -> tuple[Float[Tensor, "query"], WindowCache]:
    """Return the loss of every next token of one text under one setting, and the final cache.

    Args:
        model: A bridge.
        prompts: One prompt.
        setting: Which keys its queries can see.
        rotation: Rotation of the kept keys, where positions are counted in the cache.
        chunk: Queries that run at once.
        bar: A progress bar, if there is one.
        stored: How keys and values before the window are stored; unquantised by default.
    """
    device = input_device(model)
    tokens = prompts.tokens[:1].to(device)
    length = tokens.shape[1]
    cache = WindowCache(rotation if setting.counted == "cache" else None, stored)
    losses = torch.full((length,), torch.nan)
    with torch.inference_mode(), runner.evaluating(model), _opened(model) as streaming:
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            layout = Layout.of(
                start, stop, setting.window, setting.keep, setting.counted, setting.alone
            )
            cache.begin(layout, setting.keep)
            visible = layout.visible().to(device)
            logits = model.original_model(
                input_ids=tokens[:, start:stop],
                position_ids=torch.arange(start, stop, device=device)[None],
                attention_mask=visible if streaming else _additive(visible, model.cfg.dtype),
                use_cache=True,
                **{cache_argument(model.original_model): cache},
            ).logits[0]
            targets = tokens[0, start + 1 : stop + 1].to(logits.device)
            loss = torch.nn.functional.cross_entropy(
                logits[: len(targets)].float(), targets, reduction="none"
            )
            losses[start : start + len(targets)] = loss.cpu()
            del logits, loss
            if device.type == "cpu":
                trim()
            if bar is not None:
                bar.update(stop - start)
    return losses, cache


@contextmanager
def _opened(model: Any) -> Iterator[bool]:
    """The fastest exact attention path; true if it is the streaming one, which takes bool masks."""
    path = paths.choose(model, capabilities(model), "auto")
    with path.opened():
        yield path.name == "streaming"


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


def _check(caps: Capabilities) -> Capabilities:
    """Refuse a model without a next-token loss, or with windows of its own.

    Raises:
        UnsupportedError: With the reason.
    """
    if not caps.causal:
        reason = "is bidirectional, so it predicts no next token"
    elif not caps.lm_head:
        reason = "has no trained output head, so its losses mean nothing"
    elif len(caps.attending) < caps.n_layers:
        reason = (
            f"has {caps.n_layers - len(caps.attending)} of {caps.n_layers} layers without "
            "attention, which pass earlier text on whatever the window"
        )
    elif any(window is not None for window in caps.windows):
        reason = "has sliding windows of its own, which no kept position can outlast"
    elif caps.positions not in ("rotary", "learned", "none"):
        reason = f"has {caps.positions} positions, for which no counting in a cache is implemented"
    elif caps.architecture == _NATIVE:
        reason = "runs without a cache of keys and values"
    else:
        return caps
    raise UnsupportedError(f"{caps.architecture} {reason}.")


def _empty(model: Any, prompts: Texts, settings: Sequence[Setting]) -> StreamedContext:
    """The result before anything ran."""
    size, length = len(settings), prompts.tokens.shape[1]

    def nothing() -> Tensor:
        return torch.full((size,), torch.nan, dtype=torch.float64)

    return StreamedContext(
        about=about(model, prompts),
        kept=[s.kept for s in settings],
        windows=[-1 if s.window is None else s.window for s in settings],
        counted=[s.counted for s in settings],
        schemes=[s.scheme for s in settings],
        moved_on=max(s.moved_on for s in settings),
        loss=torch.full((size, length), torch.nan),
        seconds=nothing(),
        cache_bytes=nothing(),
        full_bytes=nothing(),
    )
