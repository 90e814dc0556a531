"""A reader's guess beside the measured result, for lessons and talks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.theme import Theme, palette
from sinkscope.validation import real_number, shown


def guess_and_result(
    guess: Mapping[str, float | None],
    result: Mapping[str, float],
    label: str,
    *,
    about: About,
    theme: Theme = None,
) -> go.Figure:
    """Draw a guess beside the measured result.

    Args:
        guess: A guess for each name; None for no guess, which is not drawn.
        result: The results by the same names; further ones are not drawn.
        label: Title of the axis, with the unit.
        about: Settings of a report, or a line with model, T, BOS and ε.
        theme: "light", "dark", or the default.

    Returns:
        A bar per name for the result, and a diamond for the guess, if there is one.

    Raises:
        ReportError: If a guess is no number, or has no result.
    """
    made = guessed_numbers(guess, result)
    if missing := [name for name in guess if name not in result]:
        raise ReportError(
            f"There is no result for {missing[0]!r}; results are of {', '.join(result)}."
        )
    colours = palette(theme)
    names = [escaped(name) for name in guess]
    values = [float(result[name]) for name in guess]
    figure = go.Figure(
        go.Bar(
            x=values, y=names, orientation="h", name="measured", marker_color=colours.other,
            text=[number(x) for x in values], textposition="outside", cliponaxis=False,
        )
    )  # fmt: skip
    if made:
        figure.add_scatter(
            x=list(made.values()), y=[escaped(name) for name in made], mode="markers",
            name="your guess", marker=dict(symbol="diamond", size=14, color=colours.sink),
        )  # fmt: skip
    figure.update_xaxes(title_text=label, rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    title = "Your guess beside the result" if made else "The result; no guess was made"
    return finish(figure, title, about, theme, height=200 + 48 * len(names))


def guessed_numbers(guess: Any, result: Mapping[str, float]) -> dict[str, float]:
    """The guesses that were made, as numbers by name.

    Raises:
        ReportError: If it is no mapping, or one of its values is neither a number nor None.
    """
    if not isinstance(guess, Mapping):
        raise ReportError(
            f"The guess is {shown(guess)}; expected a number, or None, for each name, such as "
            f"{{{next(iter(result))!r}: 0.5}}."
        )
    return {
        name: real_number(f"the guess for {name!r}", value, error=ReportError)
        for name, value in guess.items()
        if value is not None
    }
