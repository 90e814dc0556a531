"""A light and a dark template, with colours that colour-blind readers can distinguish.

A figure takes everything from its template: background, text, grid, and the order of its colours.
Sequential scales are viridis (van der Walt and Smith 2015);
signed values use blue against orange, with equal lightness steps from the background.
Lines use the colours of Okabe and Ito, lightened for the dark theme. Plotly's upload button is
removed, so that prompts are not sent to a server by a click.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import plotly.graph_objects as go

from sinkscope.errors import SinkscopeError
from sinkscope.validation import one_of, shown

Theme = str | None
"""A figure's theme, "light" or "dark"; None for the one set by `set_theme`."""

FONT = (
    'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", '
    "sans-serif"
)
SEQUENTIAL = "Viridis"
HIDDEN_BUTTONS = ("sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d", "autoScale2d")


@dataclass(frozen=True)
class Palette:
    """The colours of one theme.

    Attributes:
        paper: behind everything.
        ink: text.
        faint: secondary text and axes.
        grid: grid lines.
        button: text of buttons.
        muted: the outline of cells below a threshold, and their inside, which is empty, since any
            grey would be one of the scale's colours in greyscale.
        sink: the sink, in every figure.
        other: the positions that are not the sink, in every figure.
        series: further lines, in order; the sink and the others come first.
        diverging: scale of signed values, zero in the middle.
    """

    paper: str
    ink: str
    faint: str
    grid: str
    button: str
    muted: tuple[str, str]
    sink: str
    other: str
    series: tuple[str, ...]
    diverging: tuple[tuple[float, str], ...]


LIGHT = Palette(
    paper="#ffffff",
    ink="#1b1f24",
    faint="#57606a",
    grid="#e4e7eb",
    button="#1b1f24",
    muted=("#a4abb3", "#ffffff"),
    sink="#d55e00",
    other="#0072b2",
    series=("#d55e00", "#0072b2", "#009e73", "#b5508a", "#7a6a00", "#3d8fc4", "#8a4b08", "#4b4f56"),
    diverging=(
        (0.0, "#0a3d78"), (0.25, "#5a97c9"), (0.5, "#f4f3ef"), (0.75, "#dd8f45"), (1.0, "#7a3200"),
    ),
)  # fmt: skip
DARK = Palette(
    paper="#14171c",
    ink="#e6e9ed",
    faint="#9aa4af",
    grid="#2b313a",
    button="#77828e",
    muted=("#3d444d", "#14171c"),
    sink="#ff9d4d",
    other="#5cb3ec",
    series=("#ff9d4d", "#5cb3ec", "#3fc79a", "#e796c2", "#e8d95a", "#9fd0f2", "#d6a06a", "#b8bec6"),
    diverging=(
        (0.0, "#8cc4f5"), (0.25, "#3b76ad"), (0.5, "#23272e"), (0.75, "#b0682a"), (1.0, "#ffbd80"),
    ),
)  # fmt: skip

_default = ["light"]


def set_theme(theme: str) -> None:
    """Set the default theme of figures.

    Args:
        theme: "light" or "dark".

    Raises:
        SinkscopeError: If it is neither "light" nor "dark".
    """
    _default[0] = one_of("theme", theme, ("light", "dark"))


def palette(theme: Theme = None) -> Palette:
    """Return the colours of a theme.

    Raises:
        SinkscopeError: If it is neither "light", "dark" nor None.
    """
    palettes = {"light": LIGHT, "dark": DARK}
    name = _default[0] if theme is None else theme
    if not isinstance(name, str) or name not in palettes:
        raise SinkscopeError(f'theme is {shown(theme)}; expected "light", "dark", or None.')
    return palettes[name]


def template(theme: Theme = None) -> go.layout.Template:
    """Return the Plotly template of a theme; ``figure.update_layout(template=template("dark"))``.

    Args:
        theme: "light", "dark", or the default.

    Returns:
        The template: background, text, grid and the order of colours.

    Raises:
        SinkscopeError: If it is neither "light", "dark" nor None.
    """
    return _template(palette(theme))


@functools.cache
def _template(colours: Palette) -> go.layout.Template:
    axis = dict(
        gridcolor=colours.grid,
        linecolor=colours.faint,
        zerolinecolor=colours.grid,
        tickcolor=colours.faint,
        ticks="outside",
        ticklen=4,
        automargin=True,
        title=dict(standoff=8, font=dict(size=13)),
    )
    colorbar = dict(
        outlinewidth=0,
        thickness=12,
        ticklen=3,
        ticks="outside",
        title=dict(side="right", font=dict(size=13)),
    )
    return go.layout.Template(
        layout=dict(
            paper_bgcolor=colours.paper,
            plot_bgcolor=colours.paper,
            font=dict(family=FONT, size=13, color=colours.ink),
            title=dict(
                x=0, xref="paper", xanchor="left", y=1, yref="container", yanchor="top",
                pad=dict(t=18), font=dict(size=17), subtitle=dict(font=dict(size=12)),
            ),
            colorway=list(colours.series),
            colorscale=dict(
                sequential=SEQUENTIAL, sequentialminus=SEQUENTIAL, diverging=colours.diverging
            ),
            coloraxis=dict(colorbar=colorbar),
            xaxis=axis,
            yaxis=axis,
            hoverlabel=dict(
                align="left", font=dict(family=FONT, size=13, color=colours.ink),
                bgcolor=colours.paper, bordercolor=colours.faint,
            ),
            legend=dict(
                orientation="h", yanchor="bottom", y=1.01, xanchor="left", x=0,
                bgcolor="rgba(0,0,0,0)",
            ),
            modebar=dict(
                remove=list(HIDDEN_BUTTONS), bgcolor="rgba(0,0,0,0)",
                color=colours.faint, activecolor=colours.ink,
            ),
            # Plotly paints the pressed button nearly white; its text has to be visible on that.
            updatemenudefaults=dict(
                bgcolor=colours.paper, bordercolor=colours.grid, font=dict(color=colours.button)
            ),
            sliderdefaults=dict(
                bgcolor=colours.faint, bordercolor=colours.grid, activebgcolor=colours.ink,
                tickcolor=colours.faint, ticklen=4, minorticklen=0, font=dict(size=12),
            ),
            margin=dict(l=64, r=24, t=76, b=56),
        ),
        data=dict(
            heatmap=[dict(colorbar=colorbar, colorscale=SEQUENTIAL)],
            bar=[dict(marker_line_width=0)],
            scatter=[dict(marker=dict(colorbar=colorbar, colorscale=SEQUENTIAL))],
        ),
    )  # fmt: skip


def faded(colour: str, opacity: float) -> str:
    """Return a colour "#rrggbb" of the palette with an opacity, in Plotly's notation."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
