"""sinkscope: measure, explain and control attention sinks in transformer models.

Start with `load_model`, `texts` and `scan`: a scan returns a `SinkReport`, which `plot` draws and
`explore` shows with linked views. Interventions such as `SelfOnlyMask` change how a model runs;
`experiments` ask the questions of papers. The names are listed in `__init__.pyi` and are imported
when they are first used, so that `import sinkscope` loads neither torch nor Plotly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
