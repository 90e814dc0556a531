"""Write figures to files: HTML, or with Chrome PNG, SVG and PDF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sinkscope.errors import SinkscopeError
from sinkscope.output import write_file
from sinkscope.plot.theme import template

if TYPE_CHECKING:
    import plotly.graph_objects as go

IMAGES = (".png", ".svg", ".pdf", ".webp", ".jpg")
CONFIG = {"displaylogo": False, "responsive": True}
"""Plotly's settings for a figure in a page."""
_WIDTH = 900  # pixels of a picture whose figure has no width
_SLIDER = 80  # pixels of a slider below a figure


COLUMN, PAGE = 3.3, 6.8
"""Widths of a figure in a paper [inch]: of one column, and of the page."""
_PIXELS = 96  # pixels per inch of a picture
_POINT = 96 / 72  # pixels


def paper(
    figure: go.Figure, inches: float = COLUMN, *, height: float | None = None, points: float = 8
) -> go.Figure:
    """Return the figure for a paper: in its size and type size, without title or buttons.

    Args:
        figure: Any figure of this package; it is not modified.
        inches: Width: 3.3 for a column, 6.8 for a page.
        height: Height [inch]; by default 0.72 of the width, or less where the page is wide.
        points: Size of all text.

    Returns:
        A new figure in light colours. `save` writes it as a vector picture to ".pdf" or ".svg".
    """
    shown = _without_controls(figure)
    size = points * _POINT
    height = (
        inches * (0.72 if inches <= (COLUMN + PAGE) / 2 else 0.45) if height is None else height
    )
    font = dict(size=size)
    shown.layout.title = None
    shown.update_layout(
        template=template("light"), width=round(inches * _PIXELS),
        height=round(height * _PIXELS), margin=dict(l=4, r=4, t=4, b=4), font=font,
        legend=dict(font=font),
    )  # fmt: skip
    shown.update_xaxes(title_font=font, tickfont=font, title_standoff=4, automargin=True)
    shown.update_yaxes(title_font=font, tickfont=font, title_standoff=4, automargin=True)
    shown.update_annotations(font_size=size)
    if len(shown.layout.annotations) or shown.layout.legend.orientation != "v":
        shown.update_layout(margin_t=round(2.2 * size))
    bar = dict(title=dict(font=font, side="right"), tickfont=font, thickness=0.7 * size)
    for trace in shown.data:
        if trace.type == "heatmap":
            trace.update(colorbar=bar)
        elif trace.type == "scatter":
            width, dot = trace.line.width, trace.marker.size
            trace.update(line_width=min(width, 1.2) if width else 1.2, textfont_size=size)
            if isinstance(dot, int | float):
                trace.marker.size = min(dot, 4)
    return shown


def save(
    figure: go.Figure, path: str | Path, *, width: int | None = None, height: int | None = None,
    scale: float = 2.0,
) -> Path:  # fmt: skip
    """Write a figure to a file, in the format of its suffix.

    A picture shows the initial state of the figure, without sliders and buttons.

    Args:
        figure: What to write; `paper` gives it the size and type of a paper.
        path: ".html" for an interactive page that needs no network; ".png", ".svg", ".pdf",
            ".webp" or ".jpg" for a picture, drawn by Chrome through Kaleido.
        width: Width of a picture [pixel]; by default the figure's, or 900.
        height: Height of a picture [pixel]; by default the figure's.
        scale: Pixels of the file for each pixel of the picture (".png", ".webp", ".jpg").

    Returns:
        The path.

    Raises:
        SinkscopeError: If the suffix is another one, the folder is not writable, or Kaleido or
            Chrome is missing; the message says what to install.
    """
    path = Path(path)
    if path.suffix not in (".html", *IMAGES):
        raise SinkscopeError(
            f"{path} does not say what kind of file to write; end it in .html, {', '.join(IMAGES)}."
        )
    if path.suffix == ".html":
        return write_file(path, figure.to_html(include_plotlyjs=True, config=CONFIG))
    shown = _without_controls(figure)
    width = width or shown.layout.width or _WIDTH
    return write_file(path, _image(shown, path.suffix[1:], width, height, scale))


def _without_controls(figure: go.Figure) -> go.Figure:
    """Return a copy without sliders and buttons, and without their space."""
    import plotly.graph_objects as go

    shown = go.Figure(figure)
    below = bool(len(shown.layout.sliders))
    shown.layout.sliders = shown.layout.updatemenus = ()
    if below and shown.layout.height:
        shown.layout.height -= _SLIDER
    return shown


def _image(figure: go.Figure, kind: str, width: int, height: int | None, scale: float) -> bytes:
    """Return the picture's bytes, or raise an error that says what to install."""
    try:
        return figure.to_image(format=kind, width=width, height=height, scale=scale)
    except (ImportError, ValueError) as error:
        if "kaleido" not in str(error).lower():
            raise
        raise SinkscopeError(
            "Pictures need Kaleido, which is not installed: pip install 'sinkscope[image]'. "
            "HTML needs nothing: end the file in .html."
        ) from error
    except Exception as error:  # Kaleido raises its own errors when it finds no browser
        if "chrome" not in f"{type(error).__name__} {error}".lower():
            raise
        raise SinkscopeError(
            "Pictures are drawn by Chrome or Chromium, which was not found: install it (apt "
            "install chromium, brew install --cask chromium, or plotly_get_chrome), or set "
            "BROWSER_PATH to it. HTML needs nothing: end the file in .html."
        ) from error
