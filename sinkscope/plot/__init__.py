"""Figures: a report in, a `plotly.graph_objects.Figure` out; none is shown by itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
