"""Experiments: a paper's question, asked of any model.

Each module is one question: a function that takes a model and texts, and the result that it
returns, with ``summary()`` (words), ``to_frame()`` (a tidy table), ``figures()`` (Plotly),
``to_dict()`` and ``save()``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
