"""A reader's guess beside the measured result, for lessons and talks."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped
from sinkscope.plot.theme import Theme, palette


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
        ReportError: If a guess has no result.
    """
    if missing := [name for name in guess if name not in result]:
        raise ReportError(
            f"There is no result for {missing[0]!r}; results are of {', '.join(result)}."
        )
    colours = palette(theme)
    names = [escaped(name) for name in guess]
    values = [float(result[name]) for name in guess]
    made = {name: float(x) for name, x in guess.items() if x is not None}
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
