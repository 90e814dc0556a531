"""Many measurements at once: models × texts × lengths × interventions, each kept in its own file.

=============== ==============================================================================
`grid`          the cells of a sweep, from Python or a YAML file
`fingerprint`   what decides a cell's numbers, as a hash that names its files
`folder`        the folder or object store that the cells are kept in
`cell`          one process's work: load a model once, measure its cells one by one
`deal`          hand cells to workers, and again where one is lost
`processes`     workers on this machine
`on_ray`        workers on a Ray cluster
`run`           `sweep`: plan, measure what is missing, say what failed
`memory`        what a model needs, estimated from its files
`view`          `open_sweep`: all cells as one labelled thing
`monitor`       `Monitor` and `SinkCallback`: the same files, written while a model trains
=============== ==============================================================================
"""

import importlib
import random

import lazy_loader


def _import_without_drawing(module: str) -> None:
    """Import a module that draws from Python's random generator, and put its state back.

    A monitor is often made when a training run was seeded already, and has to leave no trace in it.
    """
    state = random.getstate()
    importlib.import_module(module)
    random.setstate(state)


_import_without_drawing("rich.style")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
