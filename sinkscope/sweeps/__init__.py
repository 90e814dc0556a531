"""Sweeps: models × texts × lengths × interventions, with each result saved in its own file.

=============== ==============================================================================
`grid`          the cells of a sweep, from Python or a YAML file
`fingerprint`   a hash of everything a cell's values depend on, which names its files
`folder`        the folder or object store with the cells
`cell`          a worker: loads a model once and measures its cells one by one
`deal`          assigns cells to workers, again if one is lost
`processes`     workers on this machine
`on_ray`        workers on a Ray cluster
`run`           `sweep`: plans, measures the missing cells, reports failures
`memory`        memory of a model, estimated from its files
`view`          `open_sweep`: all cells as one labelled collection
`monitor`       `Monitor` and `SinkCallback`: the same files, written while a model trains
=============== ==============================================================================
"""

import importlib
import random

import lazy_loader


def _import_without_drawing(module: str) -> None:
    """Import a module that uses Python's random generator, and restore the generator's state.

    A monitor is often made after a training run was seeded, which it must not affect.
    """
    state = random.getstate()
    importlib.import_module(module)
    random.setstate(state)


_import_without_drawing("rich.style")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
