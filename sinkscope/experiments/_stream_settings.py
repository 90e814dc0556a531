"""Which runs `streaming_context` makes: what is kept, in which window, counted how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sinkscope.capabilities import Capabilities
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments._observe import default_position
from sinkscope.experiments._window_cache import COUNTED
from sinkscope.interventions._base import check_mode, check_positions

AUTO = "auto"
"""The designated position that nobody named."""


@dataclass(frozen=True)
class Setting:
    """What the queries of one run may see.

    Attributes:
        kept: In words, such as "4 sinks" or "designated 255".
        keep: Positions that are never forgotten.
        window: Recent positions that a query sees, its own included; None for all.
        counted: How positions are counted, of `COUNTED`.
        alone: Positions designated by a self-only mask.
    """

    kept: str
    keep: tuple[int, ...]
    window: int | None
    counted: str
    alone: tuple[int, ...] = ()

    @property
    def moved_on(self) -> int:
        """The first query with all kept elements behind it and the start outside its window."""
        if self.window is None:
            return 0
        return max(self.window + len(self.keep), max(self.keep, default=0) + 1)


def plan(
    windows: Iterable[int],
    sinks: Iterable[int],
    designated: int | Iterable[int] | str | None,
    counted: Iterable[str],
    full: bool | None,
    tokens: int,
    can: Capabilities,
) -> list[Setting]:
    """Every run that was asked for, the model that sees everything first.

    Raises:
        TextError: If there is none, or a window shows nothing.
    """
    sinks, chosen = _counts(sinks), _designated(designated, tokens)
    found: list[Setting] = []
    fits = can.n_ctx is None or tokens <= can.n_ctx
    if full if full is not None else fits:
        found.append(Setting("everything", (), None, "absolute"))
    for way in counted:
        check_mode(way, COUNTED)
        for window in windows:
            if window < 1:
                raise TextError(f"A window of {window} positions shows nothing; use 1 or more.")
            for n in sinks:
                name = f"{n} sink" if n == 1 else f"{n} sinks"
                found.append(Setting(name, tuple(range(n)), window, way))
            for p in chosen:
                found.append(Setting(f"{p} as it is", (p,), window, way))
                found.append(Setting(f"designated {p}", (p,), window, way, (p,)))
    if not found:
        raise TextError(
            "Nothing is asked for: name a window and what to keep beside it, or run the model that "
            "sees everything (full=True)."
        )
    return found


def _counts(sinks: Iterable[int]) -> tuple[int, ...]:
    """Numbers of first tokens to keep.

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
    return check_positions(wanted)  # pyright: ignore[reportArgumentType]: it says what is wrong


def check_lengths(settings: Sequence[Setting], tokens: int, can: Capabilities) -> None:
    """Refuse positions that a model has no vectors for, and designated ones beyond the text.

    Raises:
        UnsupportedError: If learned positions end before the text does.
        TextError: If a designated position is not in the text.
    """
    if can.positions == "learned" and can.n_ctx is not None and tokens > can.n_ctx:
        raise UnsupportedError(
            f"{can.architecture} has learned vectors for {can.n_ctx} positions and cannot be asked "
            f"for {tokens}."
        )
    for setting in settings:
        if max(setting.keep, default=0) >= tokens:
            raise TextError(
                f"Position {max(setting.keep)} is to be kept, and the text has {tokens} tokens."
            )
