"""The base of all interventions: context managers that leave the model as it was.

`Intervention` is the context manager; `HookedIntervention` is the base of most, which only names
hook points and edits; `Cursor` tracks which positions of the sequence a forward pass covers; the
`check_…` functions validate arguments. To add an intervention, subclass `HookedIntervention`, whose
docstring shows how; CONTRIBUTING.md lists where to register it.

Edits are hooks, so that no weights are modified (learned position vectors are the one exception;
they are copied back). Hooks run in the order in which they were added: enter an intervention before
adding hooks that should read its effect. Of two interventions on one activation the inner one is
applied last.
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
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.validation import one_of, shown, whole_numbers

Hooks = list[tuple[str, Callable[..., Tensor | None]]]


class Intervention(AbstractContextManager):
    """Base of all interventions.

    Interventions nest, compose with every measurement on both attention paths, and can be entered
    again after they have ended. Positions are token indices from 0; with a KV cache they count from
    the start of the sequence.

    Args:
        model: A TransformerBridge.

    Attributes:
        positions: The positions that every prompt must have.
        softmax: Whether attention rows are still those of a softmax (non-negative weights whose sum
            is at most one), so that their entropy is defined.
        even: Whether the edit of a prompt depends on all positions that run, so that padding would
            affect it.
    """

    positions: tuple[int, ...] = ()
    softmax = True
    even = False
    _arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments as given, for the repr, which reports record."""
        new = super().__new__(cls)
        new._arguments = args, kwargs
        return new

    def __repr__(self) -> str:
        args, kwargs = self._arguments
        given = inspect.signature(type(self)).bind(*args, **kwargs).arguments
        shown = [f"{name}={_plain(value)}" for name, value in given.items() if name != "model"]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __init__(self, model: Any) -> None:
        self.model = mended(model)
        self.caps = capabilities(model)
        self._undo: ExitStack | None = None

    def __enter__(self) -> Intervention:
        if self._undo is not None:
            raise SinkscopeError(
                f"This {type(self).__name__} is active already; create a second one to nest it."
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
        """Start the edit, and register on `undo` whatever reverts it."""
        raise NotImplementedError

    def _follow_hooks(self, undo: ExitStack, layer: int = 0) -> None:
        """Make an edit that is not a hook active only while the bridge's hooks are.

        Code that temporarily removes the hooks of a bridge, to examine the model itself, then also
        suspends this edit.
        """
        self._point = self.model.hook_dict[f"blocks.{layer}.hook_in"]
        undo.enter_context(self.model.hooks(fwd_hooks=[(self._point.name, self._marker)]))

    def _in_force(self) -> bool:
        return any(handle.user_hook == self._marker for handle in self._point.fwd_hooks)

    def _marker(self, x: Tensor, hook: Any) -> None:
        """Do nothing; its presence shows that the bridge's hooks are active."""


class HookedIntervention(Intervention):
    """Base of interventions that edit activations at hook points of the bridge.

    A subclass checks its arguments and names hook points, each with its edit::

        class ScaleQuery(HookedIntervention):
            def __init__(self, model, layer, head, factor):
                super().__init__(model)
                self.layers = check_attending(layer, self.caps)
                self.heads = check_indices(head, self.caps.n_heads, "head")
                self.factor = real_number("factor", factor, error=UnsupportedError)

            def _hooks(self):
                return [(self.caps.hook("query", layer), self._edit) for layer in self.layers]

            def _edit(self, x, hook):           # x: [prompt position head d_head]
                x = x.clone()
                heads = slice(None) if self.heads is None else list(self.heads)
                x[:, :, heads] *= self.factor
                return x

    `check_attending` is for signals of attention ("query", "key", "value", "z", "scores" and
    "pattern"), which a hybrid model has in some layers only, `check_layers` for the others;
    `check_indices` leaves None, which means all, as it is. Checks of numbers and words are in
    `sinkscope.validation`.

    `self.caps.hook(signal, layer)` gives the name of a hook point that was verified on this model.
    On entry it refuses a signal that the architecture does not expose: GPT-NeoX and Phi-3, for
    example, have no "query" and "key". The signals and their dimensions are in
    `sinkscope.capture.observers.base.SIGNALS` ("attention" is not a hook point); "query" and "key"
    are as multiplied, after any rotary embedding.

    An edit is called as ``edit(x, hook=point)`` and returns a new tensor of the same shape, or None
    to leave `x` as it is; it must not change `x` in place. With a KV cache `x` holds only the
    positions of the current pass: an edit at positions gets their rows from
    `self.cursor.rows(positions)`, and sets `self.positions`, so that prompts that are too short are
    refused.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.cursor = Cursor()

    def _begin(self, undo: ExitStack) -> None:
        undo.enter_context(self.cursor.following(self.model))
        undo.enter_context(self.model.hooks(fwd_hooks=self._hooks()))

    def _hooks(self) -> Hooks:
        """Return names of hook points, each with the function that edits the activation there."""
        raise NotImplementedError(
            f"{type(self).__name__} has no _hooks(self), which returns the names of hook points, "
            "each with an edit."
        )


class Cursor:
    """The positions in the sequence of the current forward pass.

    Attributes:
        past: Tokens before this pass (the length of its KV cache).
        length: Tokens of this pass.
        passes: Number of passes so far.
    """

    def __init__(self) -> None:
        self.past = self.length = self.passes = 0

    @contextmanager
    def following(self, model: Any) -> Iterator[None]:
        """Track the model's forward passes until the context ends."""
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
        """Return the rows of these positions in this pass, without those of earlier passes.

        Raises:
            TextError: If a position is beyond the tokens so far.
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
    """Return an argument as text; texts, tensors and other objects by their type only."""
    if isinstance(value, list | tuple | set | frozenset | range):
        listed = ", ".join(map(_plain, value))
        return f"({listed})" if isinstance(value, tuple) else f"[{listed}]"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__name__


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the residual states that a block or its attention is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def check_layers(layers: Any, n_layers: int) -> tuple[int, ...]:
    """Return layers as a tuple; None means all of them.

    Raises:
        UnsupportedError: If there are none, or one that the model does not have.
    """
    if layers is None:
        return tuple(range(n_layers))
    return _indices(layers, n_layers, "layer")


def check_attending(layers: Any, caps: Capabilities) -> tuple[int, ...]:
    """Return attention layers as a tuple; None means all of them.

    Raises:
        UnsupportedError: If there are none, or one that the model does not have, or that has no
            attention.
    """
    if layers is None and caps.attending:
        return caps.attending
    chosen = check_layers(layers, caps.n_layers)
    for layer in chosen:
        if layer not in caps.attending:
            raise caps.no_attention(layer)
    return chosen


def check_indices(indices: Any, size: int, what: str) -> tuple[int, ...] | None:
    """Return indices such as heads or dims as a tuple; None (all of them) stays None.

    Raises:
        UnsupportedError: If there are none, or one that the model does not have.
    """
    return None if indices is None else _indices(indices, size, what)


def check_positions(positions: Any) -> tuple[int, ...]:
    """Return positions as a tuple; whether a prompt has them is checked when it runs.

    Raises:
        TextError: If there are none, or one is not a whole number from 0.
    """
    return whole_numbers("positions", positions, error=TextError)


def check_mode(mode: str, modes: tuple[str, ...]) -> str:
    """Return the mode, if it is one of `modes`.

    Raises:
        UnsupportedError: If it is not.
    """
    return one_of("mode", mode, modes, error=UnsupportedError)


def _indices(indices: Any, size: int, what: str) -> tuple[int, ...]:
    try:
        return whole_numbers(what, indices, at_most=size - 1)
    except SinkscopeError:
        raise UnsupportedError(
            f"There is no {what} {shown(indices)}; this model's {what}s run from 0 to {size - 1}."
        ) from None
