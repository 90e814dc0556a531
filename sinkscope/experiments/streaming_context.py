"""Long texts through a small cache: what keeping a few sinks is worth, and which ones.

StreamingLLM (Xiao et al. 2309.17453): a model that may only see a window of recent tokens breaks
down once its first tokens have left the window, and recovers if a few of them are kept. Yan et al.
(2407.01601) claim that any *designated* waiver element will do; here one in the middle is kept
instead of the first tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capabilities import Capabilities, capabilities
from sinkscope.capture import paths, runner
from sinkscope.capture._kv_cache import cache_argument
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import _result
from sinkscope.experiments._heap import trim
from sinkscope.experiments._long_text import long_text
from sinkscope.experiments._partial import Growing, asked_of, kept_in
from sinkscope.experiments._stream_settings import AUTO, Setting, check_lengths, plan
from sinkscope.experiments._streamed import StreamedContext
from sinkscope.experiments._turner import Turner
from sinkscope.experiments._window_cache import COUNTED, Layout, WindowCache
from sinkscope.models import load_model
from sinkscope.texts import Texts

SINKS = (0, 1, 2, 4, 8)
_NATIVE = "TransformerLensNative"
"""Models that are no transformers ones, such as the laboratory's."""

__all__ = ["COUNTED", "SINKS", "Setting", "StreamedContext", "streaming_context"]


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
    chunk: int = 128,
    bos: str = "auto",
    seed: int = 0,
    file: str | Path | None = None,
    progress: bool = True,
) -> StreamedContext:
    """Perplexity of a long text when each query sees a few kept elements and a window.

    Args:
        model: A bridge, or anything that `load_model` takes; causal, without windows of its own.
        text: What `texts()` takes, or exact `token_ids`; it may be longer than the context.
        tokens: How much of it.
        windows: Recent positions that a query sees, its own included.
        sinks: How many first tokens are kept beside the window.
        designated: Positions to designate by a self-only mask and to keep *instead* of the first
            tokens, one setting each; each is run undesignated as well, as a control. None for none;
            "auto" for 255, or two thirds of the way in a text that hardly goes beyond.
        counted: "cache" counts positions inside the cache (StreamingLLM), "absolute" from the
            text's start.
        full: Whether to run the model that sees everything, too; by default where the text is no
            longer than the trained context.
        chunk: Queries that run at once; any number gives the same figures.
        bos: What stands in front, see `texts`.
        seed: Of the order of documents.
        file: A ``.nc`` file that the result grows in; a run that was interrupted goes on from it.
        progress: Whether to draw a progress bar.

    Raises:
        UnsupportedError: If the model is bidirectional, has no trained head, has sliding windows,
            or takes no cache; or if its positions cannot be counted as asked.
        TextError: If the text is too short; a number of sinks, a chunk or a position is none; or
            no window is asked for, nor the model that sees everything.
        ReportError: If the file holds something that was asked for otherwise; or hooks or
            interventions are in force, which a file cannot tell apart.
    """
    model = load_model(model)
    file = kept_in(file, model)
    can = _check(capabilities(model))
    if chunk < 1:
        raise TextError(f"Texts cannot go through in chunks of {chunk} tokens; use 1 or more.")
    prompts = long_text(model, text, tokens, bos=bos, seed=seed)
    settings = plan(windows, sinks, designated, counted, full, tokens, can)
    check_lengths(settings, tokens, can)
    turner = Turner(model, can) if any(s.counted == "cache" for s in settings) else None
    growing = Growing(_empty(model, prompts, settings), file)
    result = growing.result
    missing = [i for i in range(len(settings)) if bool(result.seconds[i].isnan())]
    total = len(missing) * tokens
    with growing.kept(), tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
        for index in missing:
            bar.set_description(f"{settings[index].kept}, window {settings[index].window}")
            _run(model, prompts, settings[index], turner, chunk, result, index, bar)
            growing.grown()
    return result


def _run(
    model: Any,
    prompts: Texts,
    setting: Setting,
    turner: Turner | None,
    chunk: int,
    result: StreamedContext,
    index: int,
    bar: Any,
) -> None:
    """Fill one row of the result."""
    began = time.perf_counter()
    loss, cache = stream(model, prompts, setting, turner, chunk, bar)
    result.loss[index] = loss
    held = cache.bytes()
    per_token = held / max(1, _tokens_held(setting, prompts.tokens.shape[1]))
    result.cache_bytes[index] = held
    result.full_bytes[index] = per_token * prompts.tokens.shape[1]
    result.seconds[index] = time.perf_counter() - began  # last: it says that the row is complete


def _tokens_held(setting: Setting, tokens: int) -> int:
    """Positions whose keys and values a cache holds at the end."""
    if setting.window is None:
        return tokens
    return min(setting.window - 1, tokens) + len([k for k in setting.keep if k < tokens])


def stream(
    model: Any,
    prompts: Texts,
    setting: Setting,
    turner: Turner | None = None,
    chunk: int = 128,
    bar: Any = None,
) -> tuple[Float[Tensor, "query"], WindowCache]:
    """The loss of every next token of one text under one setting, and the cache at the end."""
    device = runner.input_device(model)
    tokens = prompts.tokens[:1].to(device)
    length = tokens.shape[1]
    cache = WindowCache(turner if setting.counted == "cache" else None)
    losses = torch.full((length,), torch.nan)
    with torch.inference_mode(), runner.evaluating(model), _opened(model) as streams:
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            layout = Layout.of(
                start, stop, setting.window, setting.keep, setting.counted, setting.alone
            )
            cache.begin(layout, setting.keep)
            seen = layout.visible().to(device)
            logits = model.original_model(
                input_ids=tokens[:, start:stop],
                position_ids=torch.arange(start, stop, device=device)[None],
                attention_mask=seen if streams else _additive(seen, model.cfg.dtype),
                use_cache=True,
                **{cache_argument(model.original_model): cache},
            ).logits[0]
            told = tokens[0, start + 1 : stop + 1].to(logits.device)
            loss = torch.nn.functional.cross_entropy(
                logits[: len(told)].float(), told, reduction="none"
            )
            losses[start : start + len(told)] = loss.cpu()
            del logits, loss
            if device.type == "cpu":
                trim()
            if bar is not None:
                bar.update(stop - start)
    return losses, cache


@contextmanager
def _opened(model: Any) -> Iterator[bool]:
    """The fastest exact attention; whether it is the streaming one, which takes boolean masks."""
    path = paths.choose(model, capabilities(model), "auto")
    with path.opened():
        yield path.name == "streaming"


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )


def _check(can: Capabilities) -> Capabilities:
    """Refuse what has no next-token loss, or windows of its own.

    Raises:
        UnsupportedError: With the reason.
    """
    if not can.causal:
        reason = "is bidirectional, so it predicts no next token"
    elif not can.lm_head:
        reason = "has no trained output head, so its losses mean nothing"
    elif any(window is not None for window in can.windows):
        reason = "has sliding windows of its own, in which no kept element can stay"
    elif can.positions not in ("rotary", "learned", "none"):
        reason = f"has {can.positions} positions, which are not known to count on in a cache"
    elif can.architecture == _NATIVE:
        reason = "runs without a cache of keys and values, so no text can go through a small one"
    else:
        return can
    raise UnsupportedError(f"{can.architecture} {reason}.")


def _empty(model: Any, prompts: Texts, settings: Sequence[Setting]) -> StreamedContext:
    """The result before anything ran."""
    size, length = len(settings), prompts.tokens.shape[1]

    def nothing() -> Tensor:
        return torch.full((size,), torch.nan, dtype=torch.float64)

    return StreamedContext(
        about=_result.about(model, prompts),
        asked=asked_of(
            model,
            prompts,
            settings=[f"{s.kept}, window {s.window}, counted {s.counted}" for s in settings],
        ),
        kept=[s.kept for s in settings],
        windows=[-1 if s.window is None else s.window for s in settings],
        counted=[s.counted for s in settings],
        moved_on=max(s.moved_on for s in settings),
        loss=torch.full((size, length), torch.nan),
        seconds=nothing(),
        cache_bytes=nothing(),
        full_bytes=nothing(),
    )
