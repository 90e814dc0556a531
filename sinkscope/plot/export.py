"""Figures as files: HTML anywhere, PNG, SVG and PDF where Chrome is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sinkscope.errors import SinkscopeError

if TYPE_CHECKING:
    import plotly.graph_objects as go

IMAGES = (".png", ".svg", ".pdf", ".webp", ".jpg")
CONFIG = {"displaylogo": False, "responsive": True}
"""Plotly's settings of a figure in a page."""


def save(
    figure: go.Figure, path: str | Path, *, width: int = 900, height: int | None = None,
    scale: float = 2.0,
) -> Path:  # fmt: skip
    """Write a figure as a file whose suffix says the kind.

    Args:
        figure: What to write.
        path: ".html" for an interactive page that needs no network; ".png", ".svg", ".pdf",
            ".webp" or ".jpg" for a picture, drawn by Chrome through Kaleido.
        width: Of a picture [pixel].
        height: Of a picture [pixel]; by default the figure's own.
        scale: Pixels of the file for each pixel of the picture (".png", ".webp", ".jpg").

    Returns:
        The path.

    Raises:
        SinkscopeError: If the suffix is another one, the folder cannot be written, or Kaleido or
            Chrome is not there; the sentence says what to install.
    """
    path = Path(path)
    if path.suffix not in (".html", *IMAGES):
        raise SinkscopeError(
            f"{path} does not say what kind of file to write; end it in .html, {', '.join(IMAGES)}."
        )
    try:
        if path.suffix == ".html":
            figure.write_html(path, include_plotlyjs=True, config=CONFIG)
        else:
            path.write_bytes(_image(figure, path.suffix[1:], width, height, scale))
    except OSError as error:
        raise SinkscopeError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _image(figure: go.Figure, kind: str, width: int, height: int | None, scale: float) -> bytes:
    """The picture's bytes, or an error that says what is missing."""
    try:
        return figure.to_image(format=kind, width=width, height=height, scale=scale)
    except (ImportError, ValueError) as error:
        if "kaleido" not in str(error).lower():
            raise
        raise SinkscopeError(
            "Pictures need Kaleido, which is not installed: pip install 'sinkscope[image]'. "
            "HTML needs nothing: end the file in .html."
        ) from error
    except Exception as error:  # Kaleido raises its own kinds when it finds no browser
        if "chrome" not in f"{type(error).__name__} {error}".lower():
            raise
        raise SinkscopeError(
            "Pictures are drawn by Chrome or Chromium, which was not found: install it (apt "
            "install chromium, brew install --cask chromium, or plotly_get_chrome), or set "
            "BROWSER_PATH to it. HTML needs nothing: end the file in .html."
        ) from error
