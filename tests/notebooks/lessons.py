"""The six lessons, and how a test reads them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]
CONFIG = FOLDER / "html" / "nbconvert_config.py"
FIGURE = "application/vnd.plotly.v1+json"
