"""Figures: functions that take a report and return a `plotly.graph_objects.Figure`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
