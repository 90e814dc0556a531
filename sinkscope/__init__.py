"""sinkscope: measure, explain and control attention sinks in transformer models.

Start with `load_model`, `texts` and `scan`: a scan returns a `SinkReport`, which `plot` draws and
`explore` shows in linked views. Interventions such as `SelfOnlyMask` change how a model runs;
`experiments` reproduce the analyses of papers. The names are listed in `__init__.pyi` and imported
on first use, so that `import sinkscope` loads neither torch nor Plotly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
