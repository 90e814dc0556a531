"""What every intervention is: a context manager that leaves the model as it found it.

Edits are hooks, so nothing of the model is written to (the one exception, learned position
vectors, are copied back). Hooks that were added first run first: enter an intervention before the
hooks that are to see its effect. Of two interventions on the same activation the inner one has the
last word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor

from sinkscope.attention.upstream import mended
from sinkscope.errors import SinkscopeError, TextError, UnsupportedError
from sinkscope.models.active import enforced
from sinkscope.models.capabilities import capabilities

Hooks = list[tuple[str, Callable[..., Tensor | None]]]


class Intervention(AbstractContextManager):
    """Base of all interventions.

    Interventions nest, compose with every measurement on both attention paths, and can be entered
    again after they ended. Positions are token indices, counted from 0; through a KV cache they
    count from the start of the sequence.

    Args:
        model: A TransformerBridge.

    Attributes:
        positions: Those that every prompt must have.
        softmax: Whether rows of attention stay a softmax's: weights that sum to one at most.
    """

    positions: tuple[int, ...] = ()
    softmax = True
    _asked: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep what was asked for, whatever a subclass makes of it: reports name it."""
        new = super().__new__(cls)
        new._asked = args, kwargs
        return new

    def __repr__(self) -> str:
        args, kwargs = self._asked
        asked = inspect.signature(type(self)).bind(*args, **kwargs).arguments
        words = [f"{name}={_plain(value)}" for name, value in asked.items() if name != "model"]
        return f"{type(self).__name__}({', '.join(words)})"

    def __init__(self, model: Any) -> None:
        self.model = mended(model)
        self.can = capabilities(model)
        self._undo: ExitStack | None = None

    def __enter__(self) -> Intervention:
        if self._undo is not None:
            raise SinkscopeError(
                f"This {type(self).__name__} is in use already; make a second one to nest it."
            )
        with ExitStack() as undo:
            undo.enter_context(enforced(self.model, self))
            self._begin(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def _begin(self, undo: ExitStack) -> None:
        """Take effect, and leave in `undo` all it takes to undo that."""
        raise NotImplementedError

    def _follow_hooks(self, undo: ExitStack, layer: int = 0) -> None:
        """Be in force when the bridge's hooks are, for an edit that is none of them.

        Whoever puts the hooks of a bridge aside, to look at the model itself, means us too.
        """
        self._point = self.model.hook_dict[f"blocks.{layer}.hook_in"]
        undo.enter_context(self.model.hooks(fwd_hooks=[(self._point.name, self._witness)]))

    def _in_force(self) -> bool:
        return any(handle.user_hook == self._witness for handle in self._point.fwd_hooks)

    def _witness(self, x: Tensor, hook: Any) -> None:
        """Does nothing; its presence says that hooks are in force."""


class HookedIntervention(Intervention):
    """An intervention that edits activations where they fire."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.cursor = Cursor()

    def _begin(self, undo: ExitStack) -> None:
        undo.enter_context(self.cursor.following(self.model))
        undo.enter_context(self.model.hooks(fwd_hooks=self._hooks()))

    def _hooks(self) -> Hooks:
        """Hook names, and what edits the activation there."""
        raise NotImplementedError


class Cursor:
    """Where in the sequence the tokens of the running forward pass stand.

    Attributes:
        past: Tokens that came before this pass (the length of its KV cache).
        length: Tokens of this pass.
        passes: How many passes there have been.
    """

    def __init__(self) -> None:
        self.past = self.length = self.passes = 0

    @contextmanager
    def following(self, model: Any) -> Iterator[None]:
        """Follow the model's forward passes until the block ends."""
        handle = model.blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _begin(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from transformers import Cache

        given = [*args, *kwargs.values()]
        cache = next((value for value in given if isinstance(value, Cache)), None)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.length = hidden_states(args, kwargs).shape[1]
        self.passes += 1

    def rows(self, positions: Iterable[int]) -> list[int]:
        """Where these positions lie in this pass; those of earlier passes are left out.

        Raises:
            TextError: If a position lies beyond the tokens seen so far.
        """
        end = self.past + self.length
        for position in positions:
            if position >= end:
                raise TextError(
                    f"Position {position} lies outside the tokens that this forward pass reaches, "
                    f"0 to {end - 1}; use longer prompts or an earlier position."
                )
        return [position - self.past for position in positions if position >= self.past]


def _plain(value: Any) -> str:
    """An argument in words; what is no plain value by its kind alone, such as texts or tensors."""
    if isinstance(value, list | tuple | set | frozenset | range):
        listed = ", ".join(map(_plain, value))
        return f"({listed})" if isinstance(value, tuple) else f"[{listed}]"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__name__


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual states that a block or its attention is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def check_layers(layers: int | Iterable[int] | None, n_layers: int) -> tuple[int, ...]:
    """Layers as a tuple; None stands for all of them.

    Raises:
        UnsupportedError: If there are none, or one that the model does not have.
    """
    if layers is None:
        return tuple(range(n_layers))
    return _indices(layers, n_layers, "layer")


def check_indices(
    indices: int | Iterable[int] | None, size: int, what: str
) -> tuple[int, ...] | None:
    """Heads, dims and the like as a tuple; None (all of them) stays None.

    Raises:
        UnsupportedError: If there are none, or one that the model does not have.
    """
    return None if indices is None else _indices(indices, size, what)


def check_positions(positions: int | Iterable[int]) -> tuple[int, ...]:
    """Positions as a tuple; whether a prompt reaches them shows when it runs.

    Raises:
        TextError: If there are none, or one is not a whole number from 0.
    """
    wanted = (positions,) if isinstance(positions, int) else tuple(positions)
    if not wanted or any(type(position) is not int or position < 0 for position in wanted):
        raise TextError(
            f"Positions are {positions!r}; expected whole numbers from 0, such as 255 or [0, 255]."
        )
    return tuple(dict.fromkeys(wanted))


def check_mode(mode: str, modes: tuple[str, ...]) -> str:
    """The mode, if there is such a one.

    Raises:
        UnsupportedError: If there is not.
    """
    if mode not in modes:
        raise UnsupportedError(f"There is no mode {mode!r}; choose one of {', '.join(modes)}.")
    return mode


def _indices(indices: int | Iterable[int], size: int, what: str) -> tuple[int, ...]:
    wanted = (indices,) if isinstance(indices, int) else tuple(indices)
    for index in wanted:
        if type(index) is not int or not 0 <= index < size:
            raise UnsupportedError(
                f"There is no {what} {index!r}; this model's {what}s run from 0 to {size - 1}."
            )
    if not wanted:
        raise UnsupportedError(f"No {what} is named; name at least one, from 0 to {size - 1}.")
    return tuple(dict.fromkeys(wanted))
